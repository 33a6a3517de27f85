# SPDX-License-Identifier: Apache-2.0
"""Classes that stand for one another: which ones an abstract class has, read off the sources of its package.

A config names one of a family of classes (a source of data, a tokenizer); the class in the annotation is abstract. Who
gives an option of a class that was not named yet, or of another one, is told which classes have it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from moeapps.commands.signatures import Definition, classes_in, file_of, named, options, resolve, source

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_abstract(found: Definition) -> bool:
    """Whether a class has methods that its subclasses must give, and is made to ask for them, as the sources say."""
    return bool(_open_methods(found)) and any(_asks(one) for one in (found, *_above(found)))


def members(found: Definition) -> dict[str, Definition]:
    """Return the classes of a class's package that derive from it and can be made: class path -> class."""
    near = _classes_near(found)
    return {path: one for path, one in near if one != found and found in _above(one) and not is_abstract(one)}


def family_of(annotation: ast.expr | None, where: Definition) -> Definition | None:
    """Return the abstract class that an annotation such as ``Source | None`` names; None where there is none."""
    found = [one for one in classes_in(annotation, where.source) if is_abstract(one)]
    return found[0] if len(found) == 1 else None


def members_with(option: str, found: Definition) -> list[str]:
    """Return the class paths of the family that a class is of, or stands for, which have an option."""
    heads = [found] if is_abstract(found) else [one for one in _above(found) if is_abstract(one)]
    near = {path: one for head in heads for path, one in members(head).items()}
    return [path for path, one in near.items() if option in (options(one) or {})]


def abstract_sentence(path: str) -> str | None:
    """Say which classes can be named in place of an abstract one; None where a path leads to no such class."""
    found = resolve(path)
    if not isinstance(found, Definition) or not isinstance(found.node, ast.ClassDef) or not is_abstract(found):
        return None
    known = list(members(found))
    what = f"name one of {', '.join(known)}" if known else "name a class that derives from it"
    return f"{path} is what such classes have in common and cannot be made itself; {what}"


def _open_methods(found: Definition) -> set[str]:
    if not isinstance(found.node, ast.ClassDef):
        return set()
    left: set[str] = set()
    for above in reversed([*_bases(found)]):  # what an earlier base gives hides what a later one asks for
        asked = _open_methods(above)
        left = (left - (_given(above) - asked)) | asked
    marked = {
        item.name
        for item in found.node.body
        if isinstance(item, _FUNCTIONS) and any("abstractmethod" in ast.dump(mark) for mark in item.decorator_list)
    }
    return (left - _own(found)) | marked


def _asks(found: Definition) -> bool:
    """Whether a class is of `abc`, without which marks have no effect."""
    if not isinstance(found.node, ast.ClassDef):
        return False
    names = {getattr(base, "id", getattr(base, "attr", "")) for base in found.node.bases}
    return bool(names & {"ABC", "Protocol"}) or any(keyword.arg == "metaclass" for keyword in found.node.keywords)


def _own(found: Definition) -> set[str]:
    """Names that the body of a class defines."""
    body = found.node.body if isinstance(found.node, ast.ClassDef) else []
    given = {target.id for item in body for target in _targets(item) if isinstance(target, ast.Name)}
    return given | {item.name for item in body if isinstance(item, _FUNCTIONS)}


def _given(found: Definition) -> set[str]:
    return _own(found).union(*(_own(above) for above in _above(found)))


def _targets(item: ast.stmt) -> list[ast.expr]:
    if isinstance(item, ast.Assign):
        return item.targets
    return [item.target] if isinstance(item, ast.AnnAssign) and item.value is not None else []


def _bases(found: Definition) -> Iterator[Definition]:
    for base in found.node.bases if isinstance(found.node, ast.ClassDef) else ():
        name = base.value if isinstance(base, ast.Subscript) else base
        above = named(name.id, found.source) if isinstance(name, ast.Name) else None
        if isinstance(above, Definition) and above != found:  # a class may bear the name of the one it derives from
            yield above


def _above(found: Definition) -> list[Definition]:
    return [one for base in _bases(found) for one in (base, *_above(base))]


def _classes_near(found: Definition) -> Iterator[tuple[str, Definition]]:
    """Yield the classes of the package that a class is in: of ours the task, else the topmost package."""
    parts = found.source.name.split(".")
    package = parts[: 2 if parts[0] in ("tasks", "moeapps") else 1]
    top = file_of(".".join(package))
    if top is None:
        return
    files = sorted(top.parent.rglob("*.py")) if top.name == "__init__.py" else [top]
    for file in files:
        module = ".".join([*package, *_below(file, top)])
        text = source(module)
        if text is None:
            continue
        for name, node in text.names.items():
            if isinstance(node, ast.ClassDef):
                yield f"{module}.{name}", Definition(node, text)


def _below(file: Path, top: Path) -> list[str]:
    if file == top:
        return []
    parts = list(file.relative_to(top.parent).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts
