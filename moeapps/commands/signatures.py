# SPDX-License-Identifier: Apache-2.0
"""Which options a class or preset has, read off its source: nothing is imported, so that answers come at once.

Only what the source says plainly is known; None stands for everything else, and the parser of the command decides then.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# Bases that bring no options to a class whose own ``__init__`` passes none on.
_PLAIN_BASES = frozenset({"object", "ABC", "Protocol", "Generic", "Module", "LightningModule", "LightningDataModule"})


@dataclass(frozen=True)
class Source:
    """One module, as text.

    Args:
        name: dotted name.
        names: what its top level defines or imports: name -> definition, or (module, name) of an import.
        open: it may have further names (star imports, ``__getattr__``).
    """

    name: str
    names: dict[str, ast.stmt | tuple[str, str]] = field(hash=False)
    open: bool


@dataclass(frozen=True)
class Definition:
    """A class or function and where it stands."""

    node: ast.ClassDef | ast.FunctionDef
    source: Source

    @property
    def name(self) -> str:
        """Its name."""
        return self.node.name

    @property
    def is_dataclass(self) -> bool:
        """Whether ``@dataclass`` decorates it: a config may then leave out its class path."""
        return any("dataclass" in ast.dump(decorator) for decorator in self.node.decorator_list)


@dataclass(frozen=True)
class Missing:
    """A class path that leads nowhere.

    Args:
        module: the module that is there, or would be.
        names: what the module has; None where there is no such module.
    """

    module: str
    names: tuple[str, ...] | None


def source(module: str) -> Source | None:
    """Return a module of this project or of the user; None for installed packages and modules without source."""
    path = file_of(module)
    return None if path is None or path.suffix != ".py" else _parsed(module, path)


@cache
def _parsed(module: str, path: Path) -> Source:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: dict[str, ast.stmt | tuple[str, str]] = {}
    is_open = False
    for node in _top_level(tree.body):
        if isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (parent, node.module or "") if part)
            is_open = is_open or any(alias.name == "*" for alias in node.names)
            names |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.partition(".")[0]: (alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
    return Source(module, names, is_open or "__getattr__" in names)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            for part in ("body", "orelse", "finalbody"):
                yield from _top_level(getattr(node, part, []))
        else:
            yield node


def file_of(module: str) -> Path | None:
    """Return the file of a module of this project or the user without importing it; None where there is none."""
    first, *rest = module.split(".")
    for place in _roots(first):
        for part in rest:
            place = place / part
        file = place / "__init__.py" if place.is_dir() else place.with_name(place.name + ".py")
        if file.is_file():
            return file
    return None


def _roots(package: str) -> tuple[Path, ...]:
    """Return the folders (or the file without its ending) of a top-level package; none where others installed it."""
    return _roots_seen_from(package, Path.cwd())


@cache
def _roots_seen_from(package: str, here: Path) -> tuple[Path, ...]:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return ()
    if spec is None:
        return ()
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = folders or ([Path(spec.origin).with_suffix("")] if spec.origin and spec.origin.endswith(".py") else [])
    ours = package in ("moeapps", "tasks")
    return tuple(p for p in found if ours or ("site-packages" not in p.parts and p.is_relative_to(here)))


def is_ours(module: str) -> bool:
    """Whether a module lies here in source, not among the installed ones of others."""
    return bool(_roots(module.partition(".")[0]))


def resolve(path: str) -> Definition | Missing | None:
    """Return what a class path of this project leads to; None where that cannot be told from its source."""
    module, _, name = path.rpartition(".")
    if not module or not is_ours(module):
        return None
    found = source(module)
    if found is not None:
        return named(name, found)
    owner, _, attribute = module.rpartition(".")
    if owner and (above := source(owner)) is not None and attribute in above.names:
        return None  # something inside a class
    return None if file_of(module) is not None else Missing(module, None)


def named(name: str, where: Source, depth: int = 0) -> Definition | Missing | None:
    """Return what a name of a module leads to, also over imports; None where that cannot be told."""
    node = where.names.get(name)
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return Definition(node, where)
    if isinstance(node, tuple):
        origin = source(node[0]) if is_ours(node[0]) and depth < 10 else None
        return named(node[1], origin, depth + 1) if origin is not None and node[1] else None
    if node is not None or where.open or file_of(f"{where.name}.{name}") is not None:
        return None
    return Missing(where.name, tuple(key for key, kept in where.names.items() if not isinstance(kept, tuple)))


def options(found: Definition) -> dict[str, ast.expr | None] | None:
    """Return option -> annotation of a class or function, without ``self`` and facts; None where it may have others."""
    node = found.node
    if isinstance(node, ast.FunctionDef):
        return None if node.args.kwarg or node.decorator_list else _arguments(node)
    own = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if own is not None and own.args.kwarg is None:
        return _arguments(own, skip=1)
    taken = {} if own is None else _arguments(own, skip=1)
    fixed: set[str] | None = set() if own is None else _fixed(own)
    if fixed is None:
        return None
    fields: dict[str, ast.expr | None] = {}
    if own is None and found.is_dataclass:
        fields = {
            item.target.id: item.annotation
            for item in node.body
            if isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and "ClassVar" not in ast.dump(item.annotation)
        }
    for above in _bases(found):
        inherited = None if above is None else options(above)
        if inherited is None:
            return None
        taken = {**{key: kind for key, kind in inherited.items() if key not in fixed}, **taken}
    return {**taken, **fields}


def _bases(found: Definition) -> Iterator[Definition | None]:
    """Yield the bases of a class that may bring options; None for one that the sources do not tell."""
    for base in found.node.bases if isinstance(found.node, ast.ClassDef) else ():
        name = base.value if isinstance(base, ast.Subscript) else base
        word = name.attr if isinstance(name, ast.Attribute) else name.id if isinstance(name, ast.Name) else ""
        if word not in _PLAIN_BASES:
            above = named(word, found.source) if isinstance(name, ast.Name) else None
            yield above if isinstance(above, Definition) else None


def owner_of(option: str, found: Definition) -> Definition:
    """Return the class or function that an option is written in: names of its annotation mean what they do there."""
    own = found.node.body if isinstance(found.node, ast.ClassDef) else []
    written = [item for item in own if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    if not any(option in _arguments(item) for item in written):
        for above in _bases(found):
            if above is not None and option in (options(above) or {}):
                return owner_of(option, above)
    return found


def _arguments(node: ast.FunctionDef, skip: int = 0) -> dict[str, ast.expr | None]:
    listed = [*node.args.posonlyargs, *node.args.args][skip:]
    return {arg.arg: arg.annotation for arg in [*listed, *node.args.kwonlyargs] if arg.arg != "facts"}


def _fixed(init: ast.FunctionDef) -> set[str] | None:
    """Return the options that ``super().__init__`` is given by name beside ``**options``; None if it gets no such."""
    for call in (node for node in ast.walk(init) if isinstance(node, ast.Call)):
        words = ast.dump(call.func)
        if "super" in words and "__init__" in words and any(keyword.arg is None for keyword in call.keywords):
            return {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    return None


def dataclass_in(annotation: ast.expr | None, where: Source) -> Definition | None:
    """Return the one dataclass that an annotation such as ``list[X] | None`` names; None where there is no one."""
    classes = classes_in(annotation, where)
    return classes[0] if len(classes) == 1 and classes[0].is_dataclass else None


def classes_in(annotation: ast.expr | None, where: Source) -> list[Definition]:
    """Return the classes that an annotation such as ``list[X] | None`` names, as far as the sources say."""
    if annotation is None:
        return []
    words = {node.id for node in ast.walk(_unquoted(annotation)) if isinstance(node, ast.Name)}
    if words & {"dict", "Mapping"}:  # its keys are not those of the class
        return []
    found = [named(word, where) for word in sorted(words) if word in where.names]
    return [one for one in found if isinstance(one, Definition) and isinstance(one.node, ast.ClassDef)]


def literals_in(annotation: ast.expr | None, where: Source) -> tuple[object, ...] | None:
    """Return the words that an annotation allows, where it is a ``Literal`` (or an alias of one), perhaps or None."""
    if annotation is None:
        return None
    node = _unquoted(annotation)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        sides = [
            side for side in (node.left, node.right) if not (isinstance(side, ast.Constant) and side.value is None)
        ]
        return literals_in(sides[0], where) if len(sides) == 1 else None
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return tuple(item.value for item in items if isinstance(item, ast.Constant))
    if isinstance(node, ast.Name):
        kept = where.names.get(node.id)
        if isinstance(kept, tuple) and is_ours(kept[0]) and (origin := source(kept[0])) is not None and kept[1]:
            return literals_in(ast.Name(kept[1]), origin)
        value = kept.value if isinstance(kept, ast.Assign | ast.AnnAssign) else None
        return literals_in(value, where) if isinstance(value, ast.Subscript) else None
    return None


# What a plain value is annotated as; a name of ours may be an alias that allows None.
_VALUES = frozenset({"bool", "dict", "float", "int", "list", "Literal", "Mapping", "Path", "Sequence", "str", "tuple"})


def refuses_null(annotation: ast.expr | None) -> bool:
    """Whether an annotation is surely of values, None not among them; classes are the parser's to judge."""
    if annotation is None:
        return False
    node = _unquoted(annotation)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return refuses_null(node.left) and refuses_null(node.right)
    if isinstance(node, ast.Subscript):
        if isinstance(node.value, ast.Name) and node.value.id == "Literal" and "None" in ast.unparse(node.slice):
            return False
        node = node.value
    return isinstance(node, ast.Name) and node.id in _VALUES


def _unquoted(annotation: ast.expr) -> ast.expr:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return ast.parse(annotation.value, mode="eval").body
    return annotation


@cache
def trainer_options() -> tuple[str, ...]:
    """Return the options of Lightning's Trainer, read off its file; none where that is not where we know it."""
    spec = find_spec("lightning")
    file = Path(spec.origin).parent / "pytorch/trainer/trainer.py" if spec is not None and spec.origin else Path()
    if not file.is_file():
        return ()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            init = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
            return tuple(_arguments(init, skip=1))
    return ()
