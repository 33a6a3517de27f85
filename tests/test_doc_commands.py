# SPDX-License-Identifier: Apache-2.0
"""Command lines in README and docs can be typed: programs, commands, options, files, targets and modules are there."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moeapps.cli import COMMANDS, RUN_COMMANDS
from moeapps.commands.boundary import UsageError
from moeapps.commands.curriculum import plan
from moeapps.commands.listing import find_config
from moeapps.commands.names import check
from moeapps.commands.tasks import load, task_commands
from tests.test_docs import EVERY_PAGE, ROOT

PROGRAMS = ("moeapps", "lightning", "make", "python -m")
MAKEFILE = (ROOT / "Makefile").read_text()
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


class ParsedError(Exception):
    """All words were read; the command need not run."""


def lines_of(text: str) -> Iterator[str]:
    """Yield the command lines of a page: in blocks without a language or for a shell, and in the text."""
    for language, block in FENCE.findall(text):
        if language in ("", "bash", "sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"^\$ |^(?:[A-Z_]+=\S* )+|^\.venv/bin/", "", line.strip())
                yield re.sub(r"\s#\s.*", "", line).strip()
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands(page: Path) -> list[str]:
    starts = tuple(f"{program} " for program in PROGRAMS)
    found = dict.fromkeys(line for line in lines_of(page.read_text()) if line.startswith(starts))
    # Layouts and arrows are no commands.
    return [line for line in found if not re.search(r"^moeapps\s{2,}| -> |^make [a-z]+ [a-z]", line)]


LINES = [(page, line) for page in EVERY_PAGE for line in commands(page)]


def check_make(words: list[str]) -> None:
    for word in words:
        name, equals, _ = word.partition("=")
        known = rf"\$\({re.escape(name)}\)" if equals else rf"^{re.escape(name)}:"
        assert re.search(known, MAKEFILE, flags=re.MULTILINE), f"the Makefile has no {name!r}"


def check_module(words: list[str]) -> None:
    module = Path(*words[0].split("."))
    if module.parts[0] in ("benchmarks", "moeapps", "tasks", "tests"):
        assert (ROOT / module.with_suffix(".py")).is_file() or (ROOT / module / "__main__.py").is_file(), words[0]
    else:
        import_module(words[0])


def check_run(words: list[str], own: set[str]) -> None:
    """Read the words of fit, test, validate or predict as the program does before it imports anything heavy.

    Files outside of ``configs/``, and those of a task that the page makes, are the reader's own.
    """
    files = [Path(file) for option, file in pairwise(words) if option == "--config"]
    theirs = [file for file in files if file.parts[0] != "configs" or re.split(r"[_.]", file.name)[0] in own]
    for file in files:
        assert file in theirs or "<" in str(file) or find_config(str(file)).is_file(), file
    if not theirs and len(words) > 1 and not re.search(r"\.\.\.|<", " ".join(words)):
        check(words)


def check_parsed(main: Callable[[list[str]], Any], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command's own parser read the words, and stop there."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parse(self, *args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(ParsedError):
        main(words)


def check_task_command(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of the command in one of the tasks that have it."""
    read = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--run", "--ckpt_path", "--trust"):
        read.add_argument(option)
    read.add_argument("--config", action="append")
    rest = read.parse_known_args(words)[1]
    rest = rest if "--out" in rest else [*rest, "--out", "drawn"]
    for command in task_commands()[name]:
        with contextlib.suppress(SystemExit):
            if command.options is not None:
                parser: argparse.ArgumentParser = load(command.options)()
                parser.parse_args(rest)
            else:
                function = load(command.function)
                check_parsed(lambda words, function=function: function(words, None, None), rest, monkeypatch)
            return
    pytest.fail(f"no task reads {words} after {name}")


def test_pages_have_command_lines() -> None:
    assert len(LINES) > 100
    assert {"README.md", "docs/tour.md"} <= {str(page.relative_to(ROOT)) for page, _ in LINES}


def check_line(line: str, monkeypatch: pytest.MonkeyPatch, own: set[str] | None = None) -> None:
    program, *words = shlex.split(line.replace("...", "…"), comments=True)
    words = [word.replace("…", "...") for word in words]
    if program == "make":
        check_make(words)
    elif program == "python":
        check_module(words[1:])
    elif words[-1] in ("--help", "--version"):
        assert words[0] in (*COMMANDS, *task_commands(), words[-1])
    elif words[0] in task_commands():
        if len(words) > 1:
            check_task_command(words[0], words[1:], monkeypatch)
    elif words[0] in RUN_COMMANDS:
        check_run(words, own or set())
    else:
        assert words[0] in COMMANDS, f"moeapps has no command {words[0]!r}"
        main = import_module(COMMANDS[words[0]][0]).main
        if words[0] == "curriculum":
            if "--config" in words:
                assert plan(words[1:])
        elif len(words) > 1 and words[0] not in ("list", "doctor"):  # these have no options
            check_parsed(main, words[1:], monkeypatch)


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page.relative_to(ROOT)}: {line}" for page, line in LINES])
def test_a_command_line_can_be_typed(page: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_line(line, monkeypatch, set(re.findall(r"moeapps new-task (\w+)", page.read_text())))


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "make bench PEER=1",
        "python -m benchmarks.nothing",
        "moeapps lst",
        "moeapps xeval runs/a --basline runs/b",
        "moeapps sample --run runs/promoe/base --klasses 0",
        "lightning fit --config configs/nothing.yaml",
        "lightning fit --config configs/mixer.yaml --trainer.max_epoch 3",
        "lightning fit --config configs/mixer.yaml --config configs/baselines/promoe_tc.yaml",
        "moeapps curriculum --config configs/meta_dmoe.yaml --stage configs/stages/nothing.yaml",
    ],
)
def test_one_that_cannot_be_typed_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, UsageError, SystemExit, pytest.fail.Exception)):
        check_line(line, monkeypatch)
