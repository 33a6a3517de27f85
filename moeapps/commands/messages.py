# SPDX-License-Identifier: Apache-2.0
"""Short messages instead of the parser's long dumps: what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from operator import or_
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from moeapps.commands.boundary import UsageError as UsageError
from moeapps.commands.families import abstract_sentence
from moeapps.commands.names import suggestions
from moeapps.commands.trust import may_import, refusal

_NOISE = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value type:|Expected a path but|"
    r"Expected a <class 'NoneType'>$|Problem with given|$)"
)
# Config files and class flags of the command line being parsed, as plain values: errors arise in nested parsers and in
# other working directories, where neither is known.
RAW: ContextVar[dict[str, Any] | None] = ContextVar("moeapps_raw_config", default=None)
_KEY = re.compile(r'^(?:Type .+ expects a function or a callable class: )?Parser key "([^"]+)":\s*(.*)$')


class ShortErrorParser(LightningArgumentParser):
    """Parser that raises UsageError with a few lines instead of printing its usage and exiting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Without this, --trainer.max_epoch would silently mean max_epochs.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_lightning_class_args(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the options of a class, where 1 is a whole number first: one batch, and 1.0 all of them.

        typing caches ``Union[int, float]`` and ``Union[float, int]`` as one: the order of imports would decide.
        """
        added = super().add_lightning_class_args(*args, **kwargs)
        for action in self._actions:
            kinds = typing.get_args(getattr(action, "_typehint", None))
            if int in kinds and float in kinds:
                first = sorted(kinds, key=lambda kind: kind is not int)  # the others stay in order
                action._typehint = reduce(or_, first)  # type: ignore[attr-defined]
        return added

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Return a configuration as text; what was parsed was checked then, and is not checked again unless asked."""
        return cast(str, super().dump(*args, **{"skip_validation": True, **kwargs}))

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Write a configuration to a file, unchecked as by ``dump``."""
        super().save(*args, **{"skip_validation": True, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the short form of a parser message; nested parsers report to the one above them."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise UsageError(explain(message, self, RAW.get() or {})) from ex


@dataclass(frozen=True)
class Complaint:
    """One leaf of the parser's tree of errors.

    Args:
        keys: path of parser keys from the root.
        text: what is wrong there.
    """

    keys: tuple[str, ...]
    text: str


def explain(message: str, parser: LightningArgumentParser, raw: dict[str, Any]) -> str:
    """Return the short form of a parser message.

    Args:
        message: the parser's text, possibly an indented tree.
        parser: the parser that raised, for its option names.
        raw: the configuration as written (``merged_config``), for the classes that it names.
    """
    lines: list[str] = []
    for complaint in complaints(message):
        denied = re.match(r"Importing '([^']+)' is not allowed", complaint.text)
        told = [refusal(denied[1])] if denied else _explain_one(complaint, parser, raw)
        lines.append("\n".join(told).replace("\ndid you mean", "; did you mean", 1))
    lines = _joined(dict.fromkeys(lines))
    return "\n".join("\n".join(lines).splitlines()[:2]) if lines else message


def _joined(lines: Iterable[str]) -> list[str]:
    """Put what each kind of one annotation (a whole number, or true and false) says of the same value into one line."""
    found: dict[str, list[str]] = {}
    for line in lines:
        given, allowed, kind = line.partition(", allowed: ")
        found.setdefault(given + allowed, []).append(kind)
    return [start + " or ".join(kinds) if start.endswith(", allowed: ") else start for start, kinds in found.items()]


def complaints(message: str) -> list[Complaint]:
    """Return the leaves of an indented tree of errors, without the lines that only restate types and values."""
    stack: list[tuple[int, str]] = []
    found: list[Complaint] = []
    for raw in message.splitlines():
        text = raw.strip().removeprefix("- ").strip()
        indent = len(raw) - len(raw.lstrip(" -"))
        while stack and stack[-1][0] >= indent:
            stack.pop()
        if match := _KEY.match(text):
            stack.append((indent, match[1]))
            text = match[2]
        if text.startswith("Given value: "):
            _attach_value(found, text.removeprefix("Given value: "))
        elif not _NOISE.match(text):
            found.append(Complaint(tuple(key for _, key in stack), text))
    return list(dict.fromkeys(found))


def _attach_value(found: list[Complaint], value: str) -> None:
    """Complete 'Expected a ...' leaves that lack the value with it, unless it is a whole structure."""
    plain = not value.startswith(("{", "[", "Namespace(", "NestedArg("))
    for i, leaf in enumerate(found):
        if (
            plain
            and leaf.text.startswith("Expected a")
            and "Got value" not in leaf.text
            and "path string" not in leaf.text
        ):
            found[i] = Complaint(leaf.keys, f"{leaf.text}. Got value: {value}")


def _explain_one(complaint: Complaint, parser: LightningArgumentParser, raw: dict[str, Any]) -> list[str]:
    where = ".".join(complaint.keys)
    at = f"{where}: " if where else ""
    text = complaint.text
    if match := re.match(r"Option '([^']+)' is not accepted", text):
        owner, allowed = _allowed_at(complaint.keys, match[1], raw)
        return [f"{at}unknown option {match[1]!r}{f' of {owner}' if owner else ''}", *suggestions(match[1], allowed)]
    if match := re.search(r"expects a function or a callable class: Option '([^']+)' is not accepted", text):
        named = re.search(r"class_path='([\w.]+)'", text[match.end() :])
        target = _class_of({"class_path": named[1]}) if named else None
        allowed = option_names(target) if target is not None else []
        owner = f" of {named[1].rpartition('.')[2]}" if named else ""
        return [f"{at}unknown option {match[1]!r}{owner}", *suggestions(match[1], allowed)]
    if match := re.match(r"(?:Subcommand '\w+'|Group '\w+') does not accept option '([^']+)'", text):
        return _unknown_key(match[1], parser)
    if match := re.match(r"unrecognized arguments: --([\w.+-]+)", text):
        return _unknown_key(match[1], parser)
    if match := re.match(r"module '([^']+)' has no attribute '([^']+)'", text):
        return [f"{at}no class '{match[1]}.{match[2]}'", *_suggest_class(f"{match[1]}.{match[2]}")]
    if match := re.match(r"Expected a dot import path string: (\S+)", text):
        return [f"{at}no class {match[1]!r} is known", "give its full path, e.g. package.module.Class"]
    if match := re.search(r"Expected '([^']+)' to be a function that returns", text):
        return [f"{at}{match[1]!r} is not such a function itself", f"write it as class_path: {match[1]} with init_args"]
    return _value_or_class(where, text) or [f"{at}{text}"]


def _value_or_class(where: str, text: str) -> list[str]:
    """Explain a value of the wrong kind, a class that cannot be made, and what is missing; empty for anything else."""
    at = f"{where}: " if where else ""
    if (match := re.match(r"Expected an instantiatable class, but (\S+) is", text)) and (
        told := abstract_sentence(match[1])
    ):
        return [f"{at}{told}"]
    if match := re.match(r"Expected a (?:typing\.)?(.+?)\. Got value: (.*?)(?:\. Got value: Namespace\(.*)?$", text):
        kind = re.sub(r"^<class '(?:\w+\.)*(\w+)'>$", r"\1", match[1])
        kind = f"one of {kind[8:-1]}" if kind.startswith("Literal[") else kind
        return [f"{at}given {match[2]!r}, allowed: {kind}"]
    if match := re.match(r"the following arguments are required: (.+)", text):
        names = ", ".join(name.split(".", 1)[-1] for name in match[1].split(", "))
        if where:
            given = " ".join(f"--{where}.{name} VALUE" for name in names.split(", "))
            return [f"{at}missing: {names}", f"give {given}, or the same in a config, below init_args"]
        return [
            f"missing: {names}",
            "give a config: moeapps fit --config configs/<system>.yaml (moeapps list shows them)",
        ]
    return []


def _unknown_key(key: str, parser: LightningArgumentParser) -> list[str]:
    """Explain a dotted key that no option of a command has."""
    names = {action.dest for action in _actions(parser)} - {"help", "print_config"}
    parts = key.rstrip("+").split(".")
    for depth in range(len(parts)):
        prefix = ".".join(parts[:depth])
        inside = {
            name[len(prefix) + bool(prefix) :].split(".")[0]
            for name in names
            if name.startswith(prefix and prefix + ".")
        }
        if parts[depth] not in inside:
            known = ".".join(parts[: depth + 1])
            return [f"unknown key {known!r}", *suggestions(parts[depth], sorted(inside))]
    return [f"unknown key {key!r}"]


def _actions(parser: LightningArgumentParser) -> Iterator[Any]:
    """Yield the options of the requested command (the only sub-parser there is) or, without one, of the parser."""
    commands = getattr(parser, "_subcommands_action", None)
    chosen = list(commands._name_parser_map.values())[:1] if commands is not None else []
    yield from (chosen[0] if chosen else parser)._actions


def _suggest_class(path: str) -> list[str]:
    module_name, _, name = path.rpartition(".")
    if not may_import(path):
        return []
    try:
        module = import_module(module_name)
    except ImportError:
        return [f"there is no module {module_name!r}"]
    classes = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module_name]
    close = difflib.get_close_matches(name, classes, n=1)
    return [f"did you mean '{module_name}.{close[0]}'?"] if close else [f"{module_name} has: {', '.join(classes)}"]


# Which options a place in the configuration has ------------------------------------------------------------------


def _allowed_at(keys: Sequence[str], wrong: str, raw: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the class at a path of parser keys and its option names; ("", []) where that cannot be told."""
    node: Any = raw
    target: Any = None
    for key in keys:
        node, target = _step(node, target, key)
    for item in node if isinstance(node, list) else [node]:
        named = _class_of(item)
        if named is not None and (len(keys) == 1 or not isinstance(node, list) or wrong in str(item)):
            target = named
    return (
        (target.__name__, option_names(target)) if inspect.isclass(target) or inspect.isfunction(target) else ("", [])
    )


def _step(node: Any, target: Any, key: str) -> tuple[Any, Any]:
    """Go one key down in the raw config and in the annotations."""
    owner = _class_of(node) or target
    below = node.get("init_args", node) if isinstance(node, dict) else {}
    child = below.get(key) if isinstance(below, dict) else None
    if child is None and isinstance(node, dict):
        child = node.get(key)
    hint = None
    if owner is not None:
        function = vars(owner).get("__init__", object) if isinstance(owner, type) else owner
        try:
            hint = typing.get_type_hints(function).get(key)
        except (NameError, TypeError):
            hint = None
    return child, _first_class(hint)


def _first_class(hint: Any) -> Any:
    """Return the first plain class in an annotation such as ``list[X] | None``."""
    if inspect.isclass(hint) and typing.get_origin(hint) is None:
        return None if hint is type(None) else hint
    for argument in typing.get_args(hint):
        found = _first_class(argument)
        if found is not None:
            return found
    return None


def _class_of(node: Any) -> Any:
    path = node.get("class_path") if isinstance(node, dict) else None
    if not isinstance(path, str) or "." not in path or not may_import(path):
        return None
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module_name), name, None)
    except ImportError:
        return None


def option_names(target: Any) -> list[str]:
    """Return the options of a class or function that a config can set, those passed on by ``**kwargs`` included."""
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(target) else parser.add_function_arguments
    return [name for name in add(target, as_group=False, fail_untyped=False) if name != "facts"]


def merged_config(args: Sequence[str]) -> dict[str, Any]:
    """Return config files and class flags of a command line as one plain dictionary, for explanations only."""
    merged: dict[str, Any] = {}
    words = list(args)
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        value = value if equals else (words[i + 1] if i + 1 < len(words) else "")
        if name in ("-c", "--config") and Path(value).is_file():
            try:
                loaded = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except yaml.YAMLError:
                continue  # the parser will say so
            deep_merge(merged, loaded if isinstance(loaded, dict) else {})
        elif (
            name.startswith("--") and re.fullmatch(r"[\w.]+\.[A-Za-z_]\w*", value) and not name.startswith("--trainer")
        ):
            node = merged
            for key in name[2:].split("."):
                node = node.get("init_args", node) if key != "class_path" else node
                node = node.setdefault(key, {}) if isinstance(node.get(key, {}), dict) else {}
            node["class_path"] = value
    return merged


def deep_merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    """Merge ``over`` into ``base`` in place; lists and scalars replace."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            deep_merge(base[key], value)
        else:
            base[key] = value
