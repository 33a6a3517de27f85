# SPDX-License-Identifier: Apache-2.0
"""A grid as a YAML file: read, checked, and every complaint told with its file and line (docs/evidence_grids.md)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moeapps.bounds import BoundError, read_yaml_nodes
from moeapps.evaluation.statistics import DIRECTIONS, RULES
from moeapps.evidence.grid import Claim, Grid, GridError, Ladder, Pair, Variant

Where = tuple[str | int, ...]
DATA_SEED_FLAGS = ("--data.init_args.seed",)
_OURS = Path("benchmarks/grids")  # in a checkout
_WORDS = ("overlays", "flags", "data_seed_flags")
_VARIANT = ("overlays", "flags", "pairs", "data_seed_flags", "stages")
_LEVEL = ("overlays", "flags")
_LADDER = ("levels", "system", "baseline", "metric", "direction", "text", "pairs")
_CLAIM = tuple(name for name in Claim.__dataclass_fields__ if name != "id")
_TOP = (
    *("system", "config", "seeds", "pairs", "data_seed_flags", "flags", "variants", "headline", "ladder", "claims"),
    *("show", "settings_tried", "choice", "results", "page", "command", "templates"),
)
_NUMBERS = ("margin", "baseline_value")
_WORDS_OF = {"match": ("flops", "params", "none"), "scale": ("linear", "log10"), "direction": DIRECTIONS, "rule": RULES}


@dataclass(frozen=True)
class GridFile:
    """A grid and where its files lie.

    Args:
        path: the YAML file.
        grid: what it says.
        results: folder of ``<name>/cells/*.json`` and ``<name>.json``, relative to the folder that it is run in.
        page: Markdown page of all results in that folder.
        command: what to type to run it.
        lines: place in the file, key by key -> its line, from 1.
    """

    path: Path
    grid: Grid
    results: Path
    page: Path
    command: str
    lines: Mapping[Where, int] = field(repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the file without its ending: that of its results."""
        return self.path.stem

    def at(self, *where: str | int) -> str:
        """Give file and line of a place, or of the nearest one around it."""
        return _at(self.path, self.lines, where)


def read_grid(path: Path) -> GridFile:
    """Read a grid.

    Raises:
        GridError: there is no such file, or something in it is wrong; the text names the line.
    """
    raw, lines = _read(path)
    try:
        return _file(path, _Reader(path, lines).top(raw), lines)
    except _PlaceError as error:
        raise GridError(f"{_at(path, lines, error.where)}: {error}") from error


class _PlaceError(ValueError):
    """A complaint about a place of the file."""

    def __init__(self, text: str, *where: str | int) -> None:
        super().__init__(text)
        self.where = where


def _at(path: Path, lines: Mapping[Where, int], where: Where) -> str:
    while where and where not in lines:
        where = where[:-1]
    return f"{path}, line {lines[where]}" if where in lines else str(path)


def _grids_near(path: Path) -> str:
    """Name the grids that there are where one is looked for and where ours lie, the nearest first."""
    folders = dict.fromkeys((path.parent, _OURS))
    there = {str(file): file.stem for folder in folders for file in sorted(folder.glob("*.yaml")) if _is_grid(file)}
    if not there:
        return "; see `moeapps evidence --help`"
    close = difflib.get_close_matches(path.stem, list(there.values()), n=1)
    hint = next((f"; did you mean {file}?" for file, stem in there.items() if stem in close), ";")
    return f"{hint} there are: {', '.join(there)}"


def _is_grid(file: Path) -> bool:
    try:
        return re.search(r"^(variants|claims):", file.read_text(encoding="utf-8"), re.MULTILINE) is not None
    except (OSError, ValueError):
        return False


def _read(path: Path) -> tuple[Any, dict[Where, int]]:
    try:
        raw, node = read_yaml_nodes(path)
    except OSError as error:
        raise GridError(f"there is no grid {path} ({error.strerror or error}){_grids_near(path)}") from error
    except BoundError as error:
        raise GridError(str(error)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        told = ": ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
        raise GridError(f"{path}{'' if mark is None else f', line {mark.line + 1}'}: {told}") from error
    except yaml.YAMLError as error:
        raise GridError(f"{path}: {' '.join(str(error).split())}") from error
    lines: dict[Where, int] = {}
    if node is not None:
        _take_lines(node, (), lines)
    return raw, lines


def _take_lines(node: yaml.Node, where: Where, lines: dict[Where, int]) -> None:
    """Keep the line of every key and item."""
    lines.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*where, str(key.value))] = key.start_mark.line + 1  # a key that replaces a merged one comes later
            _take_lines(value, (*where, str(key.value)), lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _take_lines(item, (*where, i), lines)


@dataclass
class _Reader:
    """Turns what YAML holds into the arguments of a grid."""

    path: Path
    lines: Mapping[Where, int]

    def top(self, raw: Any) -> dict[str, Any]:
        found = self.table(raw, _TOP)
        for name in ("system", "config", "variants"):
            if not found.get(name):
                raise _PlaceError(f"the key {name!r} is missing; a grid has at least system, config and variants")
        for name in ("system", "config", "choice", "results", "page", "command"):
            self.text(found, name)
        found["seeds"] = self.seeds(found.get("seeds", 3))
        for name in ("settings_tried", "pairs"):
            self.whole(found, name)
        pairs = found.pop("pairs", len(found["seeds"]))
        found["variants"] = {
            self.name(name, "variants"): self.variant(value, pairs, "variants", name)
            for name, value in self.entries(found["variants"], "variants")
        }
        found["claims"] = tuple(
            self.claim(self.name(name, "claims"), value) for name, value in self.entries(found.get("claims"), "claims")
        )
        if found.get("ladder") is not None:
            found["ladder"] = self.ladder(found["ladder"])
        for name in ("headline", "show", "flags", "data_seed_flags"):
            if name in found:
                found[name] = self.words(found[name], name)
        found.setdefault("data_seed_flags", DATA_SEED_FLAGS)
        return found

    def table(self, raw: Any, known: tuple[str, ...], *where: str | int) -> dict[str, Any]:
        """A mapping of known keys; an empty one may be left out."""
        if not isinstance(raw, dict | None):
            kind = "an empty file" if raw is None else type(raw).__name__
            raise _PlaceError(f"given {kind}, wanted keys with values: {', '.join(known)}", *where)
        for key in raw or {}:
            if key not in known:
                raise _PlaceError(f"unknown key {key!r}; allowed are {', '.join(known)}", *where, str(key))
        return dict(raw or {})

    def entries(self, raw: Any, where: str) -> list[tuple[Any, Any]]:
        if not isinstance(raw, dict | None):
            raise _PlaceError(f"{where}: give names with what belongs to each, not a {type(raw).__name__}", where)
        return list((raw or {}).items())

    def name(self, name: Any, where: str) -> str:
        if not isinstance(name, str):
            raise _PlaceError(f"the name {name!r} is no text to YAML; put it between quotes", where, str(name))
        return name

    def text(self, found: dict[str, Any], name: str, *where: str | int) -> None:
        value = found.get(name, "")
        if not isinstance(value, str):
            raise _PlaceError(f"{name}: given {value!r}, wanted a text", *where, name)

    def whole(self, found: dict[str, Any], name: str, *where: str | int) -> None:
        value = found.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _PlaceError(f"{name}: given {value!r}, wanted a whole number", *where, name)

    def words(self, raw: Any, *where: str | int) -> tuple[str, ...]:
        """Words of a list; lists inside of it are laid flat, so that one can stand for several by an alias."""
        if not isinstance(raw, list):
            raise _PlaceError(f"{where[-1]}: given {raw!r}, wanted a list of words", *where)
        found: list[str] = []
        for i, word in enumerate(raw):
            if isinstance(word, list):
                found += self.words(word, *where, i)
            elif isinstance(word, str):
                found.append(word)
            else:
                raise _PlaceError(f"{word!r} is no text to YAML; put it between quotes", *where, i)
        return tuple(found)

    def seeds(self, raw: Any) -> tuple[Pair, ...]:
        """A number of seeds from 1, or the seeds, or pairs of a seed of the model and one of the data."""
        if isinstance(raw, int) and not isinstance(raw, bool) and raw > 0:
            return tuple((seed, seed) for seed in range(1, raw + 1))
        if not isinstance(raw, list) or not raw:
            raise _PlaceError(f"seeds: given {raw!r}, wanted a number, a list of seeds, or of pairs", "seeds")
        found: list[Pair] = []
        for i, seed in enumerate(raw):
            pair = [seed, seed] if not isinstance(seed, list) else seed
            if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in pair):
                raise _PlaceError(f"{seed!r} is neither a seed nor a pair [seed, data seed]", "seeds", i)
            found.append((pair[0], pair[1]))
        return tuple(found)

    def variant(self, raw: Any, pairs: int, *where: str | int, known: tuple[str, ...] = _VARIANT) -> Variant:
        found = self.table(raw, known, *where)
        self.whole(found, "pairs", *where)
        for name in _WORDS:
            if name in found:
                found[name] = self.words(found[name], *where, name)
        if "stages" in found:
            stages = found["stages"]
            if not isinstance(stages, list) or not all(isinstance(stage, list) and stage for stage in stages):
                raise _PlaceError("stages: give of each stage a list of its overlay and its words", *where, "stages")
            found["stages"] = tuple(self.words(stage, *where, "stages", i) for i, stage in enumerate(stages))
        return Variant(**{"pairs": pairs, **found})

    def claim(self, name: str, raw: Any) -> Claim:
        where = ("claims", name)
        found = self.table(raw, _CLAIM, *where)
        for key, value in found.items():
            found[key] = self.claim_value(key, value, *where)
        if "text" not in found:
            raise _PlaceError(f"claim {name}: say in 'text' what is claimed, in one sentence", *where)
        try:
            return Claim(name, **found)
        except GridError as error:
            raise _PlaceError(str(error), *where) from error

    def claim_value(self, key: str, value: Any, *where: str) -> Any:
        if key == "minus":
            pair = self.words(value, *where, key)
            if len(pair) != 2:
                raise _PlaceError("minus: give two variants, of system and baseline", *where, key)
            return pair
        if key in _NUMBERS and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        kinds: dict[str, tuple[type, str]] = {"clustered": (bool, "true or false"), "skip": (int, "a whole number")}
        kind, wanted = kinds.get(key, (str, "a number" if key in _NUMBERS else "a text"))
        allowed = _WORDS_OF.get(key)
        if key in _NUMBERS or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise _PlaceError(f"{key}: given {value!r}, wanted {wanted}", *where, key)
        if allowed and value not in allowed:
            raise _PlaceError(f"{key}: given {value!r}, allowed are {', '.join(allowed)}", *where, key)
        return value

    def ladder(self, raw: Any) -> Ladder:
        found = self.table(raw, _LADDER, "ladder")
        missing = [name for name in _LADDER[:-1] if name not in found]
        if missing:
            raise _PlaceError(f"the ladder lacks {', '.join(missing)}", "ladder")
        self.whole(found, "pairs", "ladder")
        for name in _LADDER[1:-1]:
            self.text(found, name, "ladder")
        levels = {
            self.name(name, "ladder"): self.variant(value, 1, "ladder", "levels", name, known=_LEVEL)
            for name, value in self.entries(found["levels"], "levels")
        }
        # What a level adds is words; how often it runs is the ladder's to say.
        found["levels"] = {name: Variant(level.overlays, level.flags) for name, level in levels.items()}
        return Ladder(**found)


def _file(path: Path, found: dict[str, Any], lines: Mapping[Where, int]) -> GridFile:
    results = Path(found.pop("results", "evidence"))
    page = Path(found.pop("page", results / "evidence.md"))
    command = found.pop("command", f"moeapps evidence {path}")
    found.pop("templates", None)
    try:
        grid = Grid(**found)
    except GridError as error:
        raise _PlaceError(str(error), *_blamed(str(error))) from error
    return GridFile(path, grid, results, page, command, lines)


def _blamed(text: str) -> Where:
    """The place that a complaint of the grid is about: the claim, variant or key that it names first."""
    patterns = {"claims": r"claim (\S+)", "variants": r"^variant '([^']+)'", "ladder": r"^(?:the )?ladder()"}
    for kind, pattern in patterns.items():
        match = re.search(pattern, text)
        if match:
            return (kind, match[1])
    return next(((word,) for word in ("headline", "seeds") if word in text), ())
