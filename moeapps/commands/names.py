# SPDX-License-Identifier: Apache-2.0
"""Words of configs and flags, checked before torch and Lightning are imported: a wrong one is answered in a second.

Told are wrong names of keys, options, classes and choices, files that cannot be read, and overlays without their base.
Whatever cannot be told from the sources alone is left to the parser of the command, which says the rest.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moeapps.commands.boundary import UsageError
from moeapps.commands.families import abstract_sentence, family_of, members, members_with
from moeapps.commands.listing import find_config, is_config_text, systems
from moeapps.commands.overlays import PARTS, has_base, one_system, owners_of
from moeapps.commands.signatures import (
    Definition,
    Missing,
    dataclass_in,
    literals_in,
    options,
    owner_of,
    refuses_null,
    resolve,
    trainer_options,
)
from moeapps.commands.tasks import moved_prefix, task_names
from moeapps.training.folders import known_runs, newest_version

_OWN = (
    "config",
    "seed_everything",
    "trainer",
    "model",
    "data",
    "system",
    "name",
    "test_after_fit",
    "pictures",
    "ckpt_path",
)
KEYS: dict[str, tuple[str, ...]] = {
    "fit": (*_OWN, "weights_only"),
    "validate": (*_OWN, "verbose", "weights_only", "untrained"),
    "test": (*_OWN, "verbose", "weights_only", "untrained"),
    "predict": (*_OWN, "return_predictions", "weights_only", "untrained"),
}
_INNER = ("class_path", "init_args", "dict_kwargs")
_CLASS_PATH = re.compile(r"(?:tasks|moeapps)(?:\.\w+)+")


class WrongWordError(UsageError):
    """A word that is not allowed where it stands.

    Args:
        text: the complaint.
        word: the word itself, to find its line.
    """

    def __init__(self, text: str, word: str) -> None:
        super().__init__(text)
        self.word = word


def check(words: Sequence[str]) -> None:
    """Check the words of a training command.

    Args:
        words: the command, then its words.

    Raises:
        UsageError: a word that cannot be right. The text says what was given, what is allowed and what to do.
    """
    command, rest = words[0], list(words[1:])
    files, flags = split(rest)
    _no_stray_file(command, rest)
    if {"-h", "--help"} & set(rest):
        return
    asked = any(re.match(r"--(run|ckpt_path|model|print_config)\b", word) for word in flags)
    if not files and not asked:
        if command != "fit":  # a config alone would have no trained weights
            raise UsageError(f"nothing to {command}; give {known_runs()}: moeapps {command} --run runs/SYSTEM/NAME")
        raise UsageError(
            "missing: model, data; give a config: moeapps fit --config configs/<system>.yaml (`moeapps list` "
            "shows them)"
        )
    reader = _Reader(KEYS[command])
    run = reader.learn(rest)
    # One that is missing is told elsewhere, with the nearest that is there.
    read = [(file, read_config(find_config(file))) for file in files if _is_there(file)]
    one_system(read, run)
    for file, config in read:
        try:
            reader.mapping(config)
        except WrongWordError as error:
            has_base(command, read, flags)
            meant = [] if file == read[0][0] else _fitting(command, file, config)
            if meant:
                raise UsageError(
                    f"{file} is an overlay for {' or '.join(meant)}, not for {read[0][0]}: {error}"
                ) from error
            raise UsageError(f"{file}{_line_of(error.word, find_config(file))}: {error}") from error
    if not any(word.partition("=")[0] in ("--run", "--ckpt_path") for word in rest):
        has_base(command, read, flags)
    for name, value in _pairs(flags):
        reader.flag(name, value)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the config files that words name, and the other words."""
    files: list[str] = []
    flags: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option in ("-c", "--config"):
            files.append(value if equals else next(rest, ""))
        else:
            flags.append(word)
    return files, flags


def _is_there(file: str) -> bool:
    return not is_config_text(file) and find_config(file).exists()


def read_config(file: Path) -> dict[str, Any]:
    """Return what a config file says.

    Raises:
        UsageError: it cannot be read, is not text, is no YAML or no table of keys. The text names file and line.
    """
    import yaml

    from moeapps.bounds import BoundError, read_yaml

    try:
        found = read_yaml(file)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}"
        told = ": ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
        raise UsageError(f"{file}{where}: {told}") from error
    except BoundError as error:
        cause = error.__cause__
        if isinstance(cause, UnicodeDecodeError):
            line = cause.object[: cause.start].count(b"\n") + 1
            text = f"{file}, line {line}: a byte that is not UTF-8; give a YAML file, saved as UTF-8"
            raise UsageError(text) from error
        raise UsageError(str(error)) from error
    except yaml.YAMLError as error:  # a character that YAML has not
        raise UsageError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict | None):
        raise UsageError(f"{file} holds {type(found).__name__} {str(found)[:40]!r}; a config is keys with values")
    return found or {}


def _no_stray_file(command: str, words: Sequence[str]) -> None:
    """Refuse a file that no option takes."""
    for before, word in zip(["--x=", *words], words, strict=False):
        free = not before.startswith("-") or "=" in before
        if free and not word.startswith("-") and Path(word).suffix in (".yaml", ".yml"):
            raise UsageError(
                f"{word!r} stands alone; a config is given with --config: moeapps {command} --config {word}"
            )


def _pairs(flags: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield option (without dashes) and value of ``--a.b=c``, ``--a.b c`` and ``--a.b``."""
    for word, following in itertools.zip_longest(flags, flags[1:], fillvalue="--"):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            yield name, value if equals else None if following.startswith("--") else following


def _fitting(command: str, file: str, config: dict[str, Any]) -> list[str]:
    """Return the systems whose base config an overlay of ours fits; none for files of the user."""
    found = []
    bases = {system.name: system.config for system in systems()}
    owners = owners_of(file, bases) or bases
    for system in systems() if Path(file).parts[:1] == ("configs",) else ():
        if system.name not in owners:
            continue
        reader = _Reader(KEYS[command])
        try:
            reader.mapping(read_config(find_config(system.config)))
            reader.mapping(config)
        except UsageError:
            continue
        found.append(system.name)
    return found


def _line_of(word: str, file: Path) -> str:
    """Name the line of a file that holds a word, where there is but one."""
    lines = file.read_text(encoding="utf-8").splitlines()
    held = [number for number, line in enumerate(lines, 1) if re.search(rf"(?<![\w.]){re.escape(word)}(?![\w.])", line)]
    return f", line {held[0]}" if len(held) == 1 else ""


def _no_class_yet(key: str, place: str, annotation: tuple[Any, Definition] | None) -> None:
    """Refuse an option where no class is named and the class of the annotation cannot be made itself."""
    family = None if annotation is None else family_of(*annotation)
    if family is None or not (known := members(family)):
        return
    having = members_with(key, family)
    told = f"{place}.{key}: no class is named for {place}, so it has no options yet"
    if not having:
        raise WrongWordError(f"{told}, and no class has {key!r}\nthere are: {', '.join(known)}", key)
    raise WrongWordError(f"{told}\nname one that has {key!r} first: --{place} {' or '.join(having)}", key)


def _no_null(value: Any, place: str, annotation: ast.expr | None) -> None:
    """Refuse null where None means nothing; the parser would take it, and a comparison or a size fail on it."""
    if value is None and refuses_null(annotation):
        assert annotation is not None
        key = place.rpartition(".")[2]
        raise WrongWordError(
            f"{place}: given null, allowed: {ast.unparse(annotation)}; leave it out for the default", key
        )


class _Reader:
    """What files and flags have named so far, and the complaints on what comes next.

    Args:
        keys: what the command takes.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = keys
        self.classes: dict[str, str] = {}  # dotted place, without init_args -> class path

    def learn(self, words: Sequence[str]) -> dict[str, Any] | None:
        """Take the classes of the run that words name, and return its config, which is not complained of here."""
        held = None
        for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
            option, equals, value = word.partition("=")
            file = newest_version(Path(value if equals else following), trained=True) / "config.yaml"
            if option == "--run" and file.is_file():
                try:
                    held = read_config(file)
                    self.mapping(held)
                except UsageError:
                    self.classes.clear()
        return held

    def mapping(self, config: dict[str, Any]) -> None:
        """Check what a whole file says."""
        for key, value in config.items():
            self._key(str(key))
            if value is None and key in ("name", "system"):  # a folder called None would be made
                raise WrongWordError(f"{key}: given null, allowed: str; leave it out for the default", key)
            if key == "trainer" and isinstance(value, dict):
                for word, inner in value.items():
                    self._trainer(str(word).removesuffix("+"))  # `callbacks+` adds to a list
                    self._any(inner, f"trainer.{word}")
            elif key in PARTS:
                self._value(value, key, None)

    def flag(self, name: str, value: str | None) -> None:
        """Check a flag: every key on its way, then the class or the word it gives."""
        keys = name.rstrip("+").split(".")
        if keys[0] in ("help", "print_config", "run", "debug", "trust", "untrained", "shared") or "-" in keys[0]:
            return
        self._key(keys[0])
        if keys[0] == "trainer" and len(keys) > 1 and keys[1] != "help":
            self._trainer(keys[1])
        if keys[0] not in PARTS or name.endswith("+") or "help" in keys or "dict_kwargs" in keys:
            return
        keys = [key for key in keys if key != "init_args"]
        named = len(keys) == 1 or keys[-1] == "class_path"
        keys = keys[:-1] if keys[-1] == "class_path" else keys
        place, kind = keys[0], self._class_at(keys[0], None)
        annotation: Any = None
        for key in keys[1:]:
            known = options(kind) if kind is not None else None
            if kind is None and place not in self.classes:
                _no_class_yet(key, place, annotation)
            if kind is None or known is None:
                return
            self._option(key, known, kind, place)
            place, annotation = f"{place}.{key}", (known.get(key), owner_of(key, kind))
            kind = self._class_at(place, annotation)
        named = named or place in self.classes or (annotation is not None and family_of(*annotation) is not None)
        if value is not None and (named or _CLASS_PATH.fullmatch(value)):
            self._class(value, place)
        elif value is not None and annotation is not None:
            _no_null(None if value in ("null", "None") else value, place, annotation[0])
            self._word(value, place, annotation)

    def _key(self, word: str) -> None:
        if word not in self.keys:
            raise WrongWordError(_unknown(f"unknown key {word!r}", word, self.keys), word)

    def _trainer(self, word: str) -> None:
        known = trainer_options()
        if known and word not in known:
            raise WrongWordError(_unknown(f"unknown key {'trainer.' + word!r}", word, known), word)

    def _class_at(self, place: str, annotation: tuple[Any, Definition] | None) -> Definition | None:
        """The class that files and flags have named there, else the dataclass of its annotation."""
        if place in self.classes:
            found = resolve(self.classes[place])
            return found if isinstance(found, Definition) else None
        return None if annotation is None else dataclass_in(annotation[0], annotation[1].source)

    def _class(self, path: str, place: str) -> None:
        """Take note of a class path."""
        if self.classes.get(place) != path:
            for inner in [key for key in self.classes if key.startswith(f"{place}.")]:
                del self.classes[inner]  # options of the class before
        self.classes[place] = path
        if "." not in path or moved_prefix(path) is not None:
            return
        package = path.split(".")
        if package[0] == "tasks" and package[1] not in task_names():
            known = ", ".join(task_names()) or "none"
            raise WrongWordError(f"there is no task package tasks.{package[1]}; there are: {known}", path)
        found = resolve(path)
        if (told := abstract_sentence(path)) is not None and place.count(".") > 0:
            raise WrongWordError(f"{place}: {told}", path)
        if isinstance(found, Missing) and found.names is None:
            raise WrongWordError(f"{place}: no class {path!r}; there is no module {found.module!r}", path)
        if isinstance(found, Missing) and found.names is not None:
            close = difflib.get_close_matches(path.rpartition(".")[2], found.names, n=1)
            hint = f"; did you mean '{found.module}.{close[0]}'?" if close else ""
            has = ", ".join(name for name in found.names if not name.startswith("_"))
            raise WrongWordError(f"{place}: no class {path!r}{hint}\n{found.module} has: {has}", path)

    def _option(self, key: str, known: dict[str, Any], kind: Definition, place: str) -> None:
        if key not in known and key != "facts":
            others = members_with(key, kind)
            have = "have" if len(others) > 1 else "has"
            hint = f"; {' and '.join(others)} {have} it, if named first" if others else ""
            text = _unknown(f"{place}: unknown option {key!r} of {kind.name}", key, list(known))
            raise WrongWordError("\n".join([text.splitlines()[0] + hint, *text.splitlines()[1:]]), key)

    def _word(self, value: Any, place: str, annotation: tuple[Any, Definition]) -> None:
        allowed = literals_in(annotation[0], annotation[1].source)
        # Numbers and truth values are the parser's to read; null is a word where None is allowed.
        words = [word for word in allowed or () if isinstance(word, str)]
        told = isinstance(value, str) and value not in ("null", "None", "true", "false")
        if words and len(words) == len(allowed or ()) and told and value not in words:
            close = difflib.get_close_matches(value, words, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise WrongWordError(f"{place}: given {value!r}, allowed: {', '.join(map(repr, words))}{hint}", value)

    def _value(self, value: Any, place: str, annotation: tuple[Any, Definition] | None) -> None:
        """Check a value of a file and what is inside it."""
        if isinstance(value, list):
            for item in value:
                self._value(item, f"{place}[]", annotation)
                for key in [key for key in self.classes if key.startswith(f"{place}[]")]:
                    del self.classes[key]
        elif isinstance(value, dict):
            self._table(value, place, annotation)
        elif place in self.classes or place in PARTS:  # another class, by its path or its short name, or none
            self._class(str(value), place)
        elif annotation is not None:
            self._word(value, place, annotation)

    def _table(self, value: dict[Any, Any], place: str, annotation: tuple[Any, Definition] | None) -> None:
        path = value.get("class_path")
        if isinstance(path, str):
            self._class(path, place)
        kind = self._class_at(place, annotation)
        inner = value.get("init_args") if set(value) <= set(_INNER) else value
        if inner is None and "init_args" in value:
            raise WrongWordError(
                f"{place}.init_args: given null, allowed: options with values; leave it out", "init_args"
            )
        known = options(kind) if kind is not None else None
        for key, item in inner.items() if isinstance(inner, dict) else ():
            if key in _INNER:
                continue
            if kind is not None and known is not None:
                self._option(str(key), known, kind, place)
                _no_null(item, f"{place}.{key}", known.get(str(key)))
                self._value(item, f"{place}.{key}", (known.get(str(key)), owner_of(str(key), kind)))
            else:
                self._value(item, f"{place}.{key}", None)

    def _any(self, value: Any, place: str) -> None:
        """Check the classes inside an option of the trainer."""
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and isinstance(item.get("class_path"), str):
                self._value(item, f"{place}[]", None)
                self.classes = {key: kept for key, kept in self.classes.items() if not key.startswith(f"{place}[]")}


def _unknown(problem: str, given: str, allowed: Sequence[str]) -> str:
    """Say what was given, what is near it and, on a second line, what is allowed."""
    return "\n".join([problem, *suggestions(given, allowed)]).replace("\ndid you mean", "; did you mean", 1)


def suggestions(given: str, allowed: Sequence[str]) -> list[str]:
    """Return the nearest allowed name, if one is near, and the allowed names."""
    if not allowed:
        return []
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    shown = ", ".join(allowed[:30]) + (" ..." if len(allowed) > 30 else "")
    return [*(f"did you mean {name!r}?" for name in close), f"allowed: {shown}"]
