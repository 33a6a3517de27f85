# SPDX-License-Identifier: Apache-2.0
"""What a config, a run folder or a checkpoint may import, decided before any of it is imported.

A class path in a file is code that runs. Class paths of the `FREE` packages are taken as they are. Other modules must
lie on Python's own path (installed, or in the working directory), never in a folder of runs, and one line names them
before they are imported. ``--trust none`` allows the free packages alone, ``--trust PACKAGE,...`` those and no others.

The parser enforces it (jsonargparse's list of import paths): a class path that is written where this file does not look
is refused, not imported.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_parsing_settings

from moeapps.bounds import BoundError, read_yaml
from moeapps.commands.tasks import run_folder_of
from moeapps.text import plain
from moeapps.training.folders import RunError

FREE = ("tasks", "moeapps", "lightning", "torch", "torchmetrics")
"""Packages whose classes any file may name."""
_BASE = (*FREE, "lightning_fabric", "lightning_utilities", "pytorch_lightning")  # where some of theirs are defined
_PATH = re.compile(r"(?<![\w./\\-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?![\w/\\-])")
log = logging.getLogger("moeapps")


class TrustError(RunError):
    """A file names code that is not to be imported."""


@dataclass
class Trust:
    """The decision for one command.

    Args:
        packages: what ``--trust`` allows beside `FREE`; None: whatever is on Python's path and not in a run folder.
        run: the run folder that the command was given, whose code is never imported.
        copies: files that are copies -> the files that people know.
    """

    packages: frozenset[str] | None = None
    run: Path | None = None
    copies: Mapping[str, Path] = field(default_factory=dict)
    _allowed: set[str] = field(default_factory=set)

    def admit(self, sources: Mapping[str, Any]) -> None:
        """Allow the parser what the sources name, say so, and refuse code of runs; nothing is imported.

        Args:
            sources: what names it (a file, "the command line") -> its values or its text.

        Raises:
            TrustError: a module in a run folder.
        """
        news: dict[str, tuple[str, Path]] = {}
        for source, value in sources.items():
            where = str(self.copies.get(source, source))
            for path in dict.fromkeys(class_paths(value)):
                if path.partition(".")[0] in FREE or (found := locate(path)) is None:
                    continue
                module, file = found
                folder = run_folder_of(file, *([] if self.run is None else [self.run]))
                if folder is not None:
                    raise TrustError(
                        f"{plain(where)} names {plain(path)}, which lies in the run folder {plain(folder)}: code of a "
                        "run is never imported; read it, then put it into a package of your own"
                    )
                if self.allows(module):
                    news.setdefault(_package(module), (where, file))
        for name in self._allowed:
            news.pop(name, None)
        self._allowed |= {*news, *(self.packages or ())}
        _tell_parser(self)
        if news and os.environ.get("LOCAL_RANK", "0") == "0":
            names = " and ".join(dict.fromkeys(plain(where) for where, _ in news.values()))
            code = ", ".join(f"{plain(name)} ({plain(file)})" for name, (_, file) in sorted(news.items()))
            log.info("named in %s, imported now: %s; --trust none would refuse it", names, code)

    def allows(self, module: str) -> bool:
        """Whether the user's words allow a module outside of the free packages, wherever it lies."""
        parts = module.split(".")
        if self.packages is not None:
            return any(".".join(parts[:n]) in self.packages for n in range(1, len(parts) + 1))
        # Python's own modules run programs and open files, and make no model.
        return parts[0] not in (*sys.stdlib_module_names, "test", "jsonargparse")


_parser: tuple[Trust, set[str]] = Trust(), set()
"""The decision that the parser works by, and all that it was ever told to allow beside the base."""


def _tell_parser(trust: Trust) -> None:
    """Let the parser import the base and what is allowed now, and nothing else."""
    global _parser
    before = _parser[1]
    set_parsing_settings(
        import_path_denylist=["*", *sorted(before - trust._allowed)],
        import_path_allowlist=[*_BASE, *sorted(trust._allowed)],
    )
    _parser = trust, before | trust._allowed


def may_import(path: str) -> bool:
    """Whether the parser may import a class path."""
    parts = path.split(".")
    allowed = {*_BASE, *_parser[0]._allowed}
    return any(".".join(parts[:n]) in allowed for n in range(1, len(parts) + 1))


def refusal(path: str) -> str:
    """Say why the parser did not import a class path, and what to do."""
    packages, top = _parser[0].packages, path.partition(".")[0]
    if _spec(top, None) is None:
        return f"{plain(path)}: there is no package {plain(top)}; install it, or run in the folder that holds it"
    if packages is None:
        return f"{plain(path)} is not imported: files name classes of models and data; --trust {plain(top)} allows it"
    allowed = ", ".join([*FREE, *sorted(packages)])
    more = ",".join([*sorted(packages), plain(top)])
    return f"{plain(path)} is not imported; --trust allows {allowed}. If you trust its code: --trust {more}"


def take_trust(words: Sequence[str]) -> tuple[list[str], frozenset[str] | None]:
    """Take ``--trust`` out of the words of a command line: the other words, and the packages it names.

    Raises:
        TrustError: it is not followed by ``none`` or names of packages.
    """
    kept: list[str] = []
    packages: frozenset[str] | None = None
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option != "--trust":
            kept.append(word)
            continue
        names = (value if equals else next(rest, "")).split(",")
        if not all(name and all(part.isidentifier() for part in name.split(".")) for name in names):
            raise TrustError(f"--trust {','.join(names)!r} is not allowed; give none, or packages: --trust mine,other")
        if "jsonargparse" in names:
            raise TrustError("--trust jsonargparse is not allowed: its classes could change what is trusted")
        packages = frozenset(names) - {"none"}
    return kept, packages


def given_run(words: Sequence[str]) -> Path | None:
    """The folder after ``--run``, whose code is not trusted wherever it lies."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--run" or word.startswith("--run="):
            return Path(word.removeprefix("--run=") if "=" in word else following)
    return None


def named_by(words: Sequence[str]) -> dict[str, Any]:
    """Return what the words and the files they name say: source -> plain values.

    Raises:
        TrustError: a file that asks for more memory or time than a config can need.
    """
    found: dict[str, Any] = {"the command line": list(words)}
    for word in words:
        path = Path(word.partition("=")[2] if word.startswith("--") and "=" in word else word)
        if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
            try:
                found[str(path)] = read_yaml(path)
            except yaml.YAMLError:
                continue  # the parser will say so
            except BoundError as error:
                raise TrustError(str(error)) from error
    return found


def class_paths(value: Any) -> Iterator[str]:
    """Yield what looks like a dotted path of a class in plain values: whole texts, and inside of YAML in a text."""
    if isinstance(value, str):
        if _PATH.fullmatch(value.strip()):
            yield value.strip()
        elif any(sign in value for sign in "{[:="):
            yield from _PATH.findall(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from class_paths(key)
            yield from class_paths(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from class_paths(item)


def locate(path: str) -> tuple[str, Path] | None:
    """Return the module that a class path leads to and its file, without importing it or a package above it.

    None where there is no such module, or one that was built into Python.
    """
    found: tuple[str, Path] | None = None
    places: Sequence[str] | None = None
    name = ""
    for part in path.split("."):
        name = f"{name}.{part}" if name else part
        spec = _spec(name, places)
        if spec is None:
            # A folder without __init__.py below another; Python finds it only once it has imported the upper one.
            places = [folder for place in places or () if os.path.isdir(folder := os.path.join(place, part))]
            if not places:
                break
            continue
        if spec.origin not in (None, "built-in", "frozen"):  # a folder without __init__.py holds no code itself
            found = name, Path(str(spec.origin))
        if spec.submodule_search_locations is None:
            break
        places = list(spec.submodule_search_locations)
    return found


def _spec(name: str, places: Sequence[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, places)
        except KeyError:  # a folder without __init__.py below another that is not imported
            continue
        if spec is not None:
            return spec
    return None


def _package(module: str) -> str:
    """What to allow: the topmost package; below a folder without __init__.py, which may be anywhere, the module."""
    top = module.partition(".")[0]
    spec = _spec(top, None)
    return module if spec is None or spec.origin is None else top
