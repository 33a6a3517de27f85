# SPDX-License-Identifier: Apache-2.0
"""No ``except Exception`` hides an error: it chains what it caught around calls of a library, or says why not.

What is wrong with our own code (a TypeError, a KeyError) would be told as a damaged file if a broad handler stood
around it. So each handler of Exception or more goes on with the error, chained, where ``--debug`` shows it; and stands
around calls of libraries alone. The exceptions are listed, each with its reason.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCES = sorted(path for folder in ("moeapps", "tasks", "benchmarks") for path in Path(folder).rglob("*.py"))
NOT_RAISED = {
    "moeapps/training/callbacks/side.py guarded": "told in a warning, noted in metrics/test.json; raised by --debug",
    "moeapps/commands/export.py _write_program": "the tracer's first line goes into about.json and to the user",
    "benchmarks/gpu.py done": "a part that fails is written into the results with its reason; the exit code says so",
    "benchmarks/peers/race.py main": "a row that fails is written into the results with its reason and a traceback",
    "tasks/dynamics/data/readers/arff_format.py _fails": "asks which line scipy refuses, after it has refused the file",
}
"""Handlers that do not raise, and what becomes of the error."""
AROUND_OURS = {
    "moeapps/training/callbacks/side.py guarded": "a report of any task, which must not cost the results",
    "moeapps/loading.py _restore": "_read calls the readers of two formats and nothing else",
    "moeapps/data/images/pictures.py open_picture": "Pillow decodes lazily, in whatever is done with the picture",
    "moeapps/data/images/arrays.py _readable": "around numpy's readers; what they read is judged outside",
    "moeapps/commands/export.py _write_program": "a network is traced, whatever it is",
    "tasks/point_cloud/data/readers/las.py read_las": "only a panic of the decompressor is taken, all else is raised",
    "tasks/point_cloud/data/readers/las.py _check_compression": "the same",
    "moeapps/commands/new_task.py write_task": "removes what it has written and raises again",
    "moeapps/training/checkpoints.py _add_parts": "read_parts is torch's reader of parts, which names its errors",
    "tasks/dynamics/data/readers/npz_format.py _readable": "around numpy's readers; what they read is judged outside",
    "tasks/dynamics/data/readers/arff_format.py read_arff": "_load is scipy's reader with the bound on cells kept",
    "benchmarks/gpu.py done": "any part of the check may fail on a device of a kind that nobody here has",
    "benchmarks/peers/race.py main": "a row runs other projects beside ours",
    "tasks/dynamics/data/readers/arff_format.py _fails": "the same",
    "tasks/recommendation/data/inputs.py columns_of": "read_arrays has told its reason, which is kept",
}
"""Handlers around calls of our own code, or of whoever uses a context, and why that is right."""


@dataclass(frozen=True)
class Broad:
    """A handler of Exception or more: where it is, whether it always raises, chained, and what of ours it covers."""

    place: str
    chains: bool
    ours: tuple[str, ...]


def broad_handlers(tree: ast.Module, file: str) -> Iterator[Broad]:
    own = names_of_ours(tree)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            continue
        name = function.name if not isinstance(function, ast.Module) else "(module)"
        for part in inside(function):
            if isinstance(part, ast.Try | ast.TryStar):
                covered = tuple(sorted(called(part.body) & own)) + ("yield",) * yields(part.body)
                for handler in part.handlers:
                    if is_broad(handler.type):
                        yield Broad(f"{file} {name}", chained(handler), covered)
            elif isinstance(part, ast.Call) and isinstance(part.func, ast.Name | ast.Attribute):
                called_name = part.func.id if isinstance(part.func, ast.Name) else part.func.attr
                if called_name == "suppress" and any(is_broad(given) for given in part.args):
                    yield Broad(f"{file} {name}", chains=False, ours=())


def inside(function: ast.AST) -> Iterator[ast.AST]:
    """All parts of a function but those of functions inside of it."""
    for part in ast.iter_child_nodes(function):
        yield part
        if not isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from inside(part)


def is_broad(kind: ast.expr | None) -> bool:
    names = (
        {part.id for part in ast.walk(kind) if isinstance(part, ast.Name)} if kind is not None else {"BaseException"}
    )
    return bool(names & {"Exception", "BaseException"})


def chained(handler: ast.ExceptHandler) -> bool:
    raised = [part for part in ast.walk(handler) if isinstance(part, ast.Raise)]
    good = all(
        part.exc is None or (isinstance(part.cause, ast.Name) and part.cause.id == handler.name) for part in raised
    )
    return good and isinstance(handler.body[-1], ast.Raise)


def called(body: list[ast.stmt]) -> set[str]:
    """First names of what is called: ``np`` of ``np.load(...)``."""
    found = set()
    for call in (part for stmt in body for part in ast.walk(stmt) if isinstance(part, ast.Call)):
        root = call.func
        while isinstance(root, ast.Attribute | ast.Call | ast.Subscript):
            root = root.func if isinstance(root, ast.Call) else root.value
        if isinstance(root, ast.Name):
            found.add(root.id)
    return found


def yields(body: list[ast.stmt]) -> bool:
    return any(isinstance(part, ast.Yield | ast.YieldFrom) for stmt in body for part in ast.walk(stmt))


def names_of_ours(tree: ast.Module) -> set[str]:
    """Names of a module that are ours: defined in it, or imported from our packages; arguments that are called too."""
    found: set[str] = set()
    for part in ast.walk(tree):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= {part.name, *(argument.arg for argument in part.args.args)}
        elif isinstance(part, ast.ClassDef):
            found.add(part.name)
        elif isinstance(part, ast.ImportFrom) and (part.module or "").split(".")[0] in (
            "moeapps",
            "tasks",
            "benchmarks",
        ):
            found |= {alias.asname or alias.name for alias in part.names}
    return found - {*dir(builtins)}


FOUND = [held for path in SOURCES for held in broad_handlers(ast.parse(path.read_text()), path.as_posix())]


@pytest.mark.parametrize("held", FOUND, ids=lambda held: held.place)
def test_a_broad_handler_chains_or_says_why_not(held: Broad) -> None:
    assert held.chains or held.place in NOT_RAISED
    assert not held.ours or held.place in AROUND_OURS, held.ours


def test_reasons_are_of_handlers_that_are_there() -> None:
    assert len(FOUND) >= 12
    assert {*NOT_RAISED} == {held.place for held in FOUND if not held.chains}
    assert {*AROUND_OURS} == {held.place for held in FOUND if held.ours}


@pytest.mark.parametrize(
    ("handler", "chains", "ours"),
    [
        ("except Exception as e:\n  raise ValueError(x) from e", True, ()),
        ("except Exception as e:\n  raise ValueError(x) from None", False, ()),
        ("except Exception as e:\n  raise ValueError(x)", False, ()),
        ("except (OSError, Exception):\n  raise", True, ()),
        ("except:\n  pass", False, ()),
        ("except BaseException as e:\n  if x:\n   raise\n  print(e)", False, ()),
        ("except BaseException as e:\n  if x:\n   raise\n  raise ValueError(x) from e", True, ()),
    ],
)
def test_hiding_is_found(handler: str, chains: bool, ours: tuple[str, ...]) -> None:
    """The law itself, by examples."""
    text = f"def f(x):\n try:\n  len(x)\n {handler.replace(chr(10), chr(10) + ' ')}\n"
    assert [*broad_handlers(ast.parse(text), "a.py")] == [Broad("a.py f", chains, ours)]


def test_what_is_ours_is_found() -> None:
    text = (
        "from moeapps.files import sha256_of\ndef g(): ...\n"
        "def f(x):\n try:\n  g()\n  sha256_of(x).strip()\n  yield\n except Exception as e:\n  raise ValueError from e\n"
        "def h(x):\n with suppress(Exception):\n  g()\n"
        "def k(x):\n try:\n  g()\n except OSError:\n  pass\n"
    )
    found = [*broad_handlers(ast.parse(text), "a.py")]
    assert found == [Broad("a.py f", True, ("g", "sha256_of", "yield")), Broad("a.py h", False, ())]
