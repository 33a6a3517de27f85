# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the source: tasks -> moeapps, never back, never task -> task; nobody in a circle.

An import counts wherever it stands: at module level, inside a function, and as a text that names a module or a class
(``import_module("tasks.x")``, ``"tasks.x.module:function"``).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

LIBRARY = sorted(Path("moeapps").rglob("*.py"))
TASKS = sorted(Path("tasks").rglob("*.py"))
ROOTS = sorted(path.parent for path in Path("tasks").glob("*/__init__.py"))
HEAVY = ("lightning", "torchmetrics", "pytorch_lightning")
# These find task packages by their place, whichever there are.
FINDERS = [Path("moeapps/commands/tasks.py"), Path("moeapps/commands/run.py")]
NAMED = re.compile(r"((?:moeapps|tasks|tests|benchmarks)(?:\.\w+)*)\.?(?::\w+)?")


def dotted(path: Path) -> str:
    """Return the name of the module that a file holds."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in (*LIBRARY, *TASKS)}


def module_of(name: str) -> str:
    """Return the module that a dotted name lies in; the name itself where it is none of ours."""
    parts = name.split(".")
    ours = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((module for module in ours if module in MODULES), name)


def statements(node: ast.AST, *, lazy: bool, typing: bool) -> Iterator[ast.AST]:
    """Yield the nodes below one; without ``lazy`` what runs at import, without ``typing`` what ever runs."""
    for child in ast.iter_child_nodes(node):
        if not lazy and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if not typing and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from statements(child, lazy=lazy, typing=typing)


def names_in(node: ast.AST, path: Path) -> Iterator[str]:
    """Yield the dotted names that one node imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = ".".join(path.with_suffix("").parts[: -node.level]) if node.level else ""
        package = ".".join(part for part in (above, node.module or "") if part)
        found = {module_of(f"{package}.{alias.name}") for alias in node.names}
        yield from (package if name.startswith(f"{package}.") and name not in MODULES else name for name in found)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "find_spec"):
        parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else node.args[:1]
        yield from text_names(parts[0])
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
        yield from text_names(node)


def text_names(node: ast.AST) -> Iterator[str]:
    """Yield the module that a text names, if it names one of ours."""
    if isinstance(node, ast.Constant) and (found := NAMED.fullmatch(str(node.value))):
        yield module_of(found[1])


@cache
def imported(path: Path, *, lazy: bool = True, typing: bool = True) -> frozenset[str]:
    """Return the dotted names of all modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(name for node in statements(tree, lazy=lazy, typing=typing) for name in names_in(node, path))


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_every_way_to_import_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    ways = {
        "import tasks.dynamics.model": "tasks.dynamics.model",
        "from tasks import dynamics": "tasks.dynamics",
        "from tasks.dynamics.model import MixER": "tasks.dynamics.model",
        "def f():\n    from tasks.dynamics import model": "tasks.dynamics.model",
        "import_module('tasks.dynamics.model')": "tasks.dynamics.model",
        "importlib.import_module(f'tasks.dynamics.{name}')": "tasks.dynamics",
        "RUN = {'a': 'tasks.dynamics.model.MixER'}": "tasks.dynamics.model",
        "RUN = 'tasks.dynamics.model:main'": "tasks.dynamics.model",
    }
    for text, name in ways.items():
        path.write_text(text)
        imported.cache_clear()
        assert imported(path) == {name}, text
    imported.cache_clear()


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_the_library_imports_no_task(path: Path) -> None:
    wrong = [name for name in imported(path) if inside(name, "tasks", "tests", "benchmarks")]

    assert not [name for name in wrong if name != "tasks" or path not in FINDERS]


@pytest.mark.parametrize("path", TASKS, ids=str)
def test_a_task_imports_no_other_task(path: Path) -> None:
    own = ".".join(path.parts[:2]) if len(path.parts) > 2 else "tasks"
    wrong = [name for name in imported(path) if inside(name, "tasks") and not inside(name, own)]

    assert not [name for name in wrong if name != "tasks"]
    assert not [name for name in imported(path) if inside(name, "tests", "benchmarks")]


@pytest.mark.parametrize("path", [path for path in TASKS if path.name == "model.py"], ids=str)
def test_a_model_file_imports_no_lightning_and_no_training(path: Path) -> None:
    wrong = [name for name in imported(path) if inside(name, *HEAVY, "moeapps.training", "moeapps.commands")]

    assert not wrong


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.parts[1] in ("moe", "nn")], ids=str)
def test_the_core_imports_torch_and_itself(path: Path) -> None:
    allowed = ("torch", "typing_extensions", "numpy", "moeapps.moe", "moeapps.nn")

    assert not [n for n in imported(path) if n.split(".")[0] not in sys.stdlib_module_names and not inside(n, *allowed)]


def test_importing_the_core_loads_neither_lightning_nor_torchmetrics() -> None:
    code = f"import sys, moeapps.moe; sys.exit(any(name in sys.modules for name in {HEAVY!r}))"

    subprocess.run([sys.executable, "-c", code], check=True)


QUICK = [
    Path("moeapps/cli.py"),
    Path("moeapps/commands/boundary.py"),
    *sorted(Path("moeapps/commands").glob("[dhlx]*.py")),
    Path("moeapps/commands/tasks.py"),
    *sorted(Path("tasks").glob("*/commands.py")),
]


@pytest.mark.parametrize("path", QUICK, ids=str)
def test_the_command_line_imports_the_standard_library_at_module_level(path: Path) -> None:
    top: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            top.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            top.add(node.module or "")
    outside = {name for name in top if name.split(".")[0] not in sys.stdlib_module_names}

    assert outside <= {"moeapps", *(dotted(quick) for quick in QUICK)}


# Circles -------------------------------------------------------------------------------------------------------------


def packages_of(name: str) -> set[str]:
    """Return the packages that a module lies in: Python runs their ``__init__`` before it."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))} & MODULES.keys()


def graph(*, lazy: bool) -> dict[str, set[str]]:
    """Return module -> modules that it imports, with their packages, but for those that it lies in itself."""
    found = {}
    for name, path in MODULES.items():
        targets = {module_of(target) for target in imported(path, lazy=lazy, typing=False)}
        around = {package for target in targets for package in packages_of(target)}
        found[name] = (targets | (around - packages_of(name))) - {name}
    return found


@pytest.mark.parametrize("lazy", [False, True], ids=["at module level", "inside functions too"])
def test_nobody_imports_in_a_circle(lazy: bool) -> None:
    try:
        TopologicalSorter(graph(lazy=lazy)).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_circle_through_the_init_of_a_package_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``a/__init__`` -> ``a.one`` -> ``b`` -> ``a.two``: no file imports in a circle, yet ``import b`` alone fails."""
    texts = {"a": "from a.one import x", "a.one": "from b import x", "a.two": "x = 1", "b": "from a.two import x"}
    paths = {name: tmp_path / f"{name}.py" for name in texts}
    for name, text in texts.items():
        paths[name].write_text(text)
    monkeypatch.setattr(f"{__name__}.MODULES", paths)

    with pytest.raises(CycleError):
        TopologicalSorter(graph(lazy=False)).prepare()


# Rooms ---------------------------------------------------------------------------------------------------------------

ALWAYS = {
    *("__init__.py", "README.md", "model.py", "nets", "module.py", "metrics.py", "datamodule.py", "data"),
    *("rivals", "report"),
}
WHERE_NEEDED = {"losses.py", "commands.py", "packages.py"}


@pytest.mark.parametrize("root", ROOTS, ids=str)
def test_the_roots_of_tasks_are_alike(root: Path) -> None:
    found = {path.name for path in root.iterdir() if path.name != "__pycache__"}

    assert found - WHERE_NEEDED == ALWAYS
    assert {path.name for path in root.iterdir() if path.is_dir()} - {"__pycache__"} == {
        name for name in ALWAYS if "." not in name
    }


def test_nothing_lies_beside_the_tasks() -> None:
    assert {path.name for path in Path("tasks").iterdir() if path.is_file()} == {"__init__.py", "moved.json"}


def test_whatever_is_imported_is_a_requirement_of_its_own() -> None:
    """A package that only comes along with another one can stay away after any upgrade of that one."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    required = {re.split(r"[\[<>=]", line)[0].lower().replace("_", "-") for line in wanted}
    known = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}  # names that differ from the package's
    files = (*LIBRARY, *TASKS, *Path("tests").rglob("*.py"))
    packages = {name.partition(".")[0] for path in files for name in imported(path)}
    own = {"moeapps", "tasks", "tests", "benchmarks", *(path.stem for path in files)}
    foreign = packages - own - set(sys.stdlib_module_names)

    assert {known.get(name, name.replace("_", "-")).lower() for name in foreign} <= required


def test_a_folder_of_our_name_beside_a_script_hides_nothing(tmp_path: Path) -> None:
    """Who works in the folder that the checkout lies in finds the package, not an empty one of the checkout's name."""
    (tmp_path / "moeapps").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import moeapps; print(moeapps.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert Path(done.stdout.strip()).name == "__init__.py", done.stdout + done.stderr
