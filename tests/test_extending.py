# SPDX-License-Identifier: Apache-2.0
"""docs/extending.md is run as a reader would: files are written, commands typed, tables compared with the code."""

from __future__ import annotations

import glob
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

import moeapps
from moeapps.cli import main
from moeapps.data.domain import DomainDataModule
from moeapps.training.task import BaseTask

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
SHORT = ["--config", "configs/debug/tiny.yaml"]  # two steps of everything
OURS = ("lightning", "moeapps")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def files() -> dict[str, str]:
    """The files that the page shows: blocks whose first line is a comment with a path."""
    found = {}
    for language in ("python", "yaml"):
        for block in blocks(language):
            named = re.match(r"# ([\w/]+\.(?:py|yaml))\n", block)
            if named:
                found[named[1]] = block
    return found


def commands() -> Iterator[list[str]]:
    """The words of every command of the page, in order; loops over seeds are unrolled."""
    lines: list[str] = []
    for block in (text.replace("\\\n", " ") for text in blocks("bash")):
        for loop, before in re.findall(
            r"^for seed in ([\d ]+); do\n(.*?)^done$", block, flags=re.MULTILINE | re.DOTALL
        ):
            unrolled = "".join(before.replace("$seed", seed) for seed in loop.split())
            block = re.sub(r"^for seed in .*?^done\n", unrolled, block, count=1, flags=re.MULTILINE | re.DOTALL)
        lines += block.splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words:
            yield words


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package of the page, in an empty folder, as the page makes it."""
    forget()
    monkeypatch.chdir(tmp_path)
    assert main(["new-task", "handwriting"]) == 0
    folder = tmp_path / "handwriting"
    for path, text in files().items():
        (folder / path).write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MOEAPPS_RUNS", "runs")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    forget()


def forget() -> None:
    """Take the package of an earlier test out of this process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "handwriting"]:
        del sys.modules[name]


def test_the_page_shows_a_whole_modality_in_under_100_lines_of_python() -> None:
    shown = files()
    lines = [line for path, text in shown.items() if path.endswith(".py") for line in text.splitlines() if line.strip()]

    assert [path for path in shown if path.endswith(".py")] == [
        "handwriting/datamodule.py",
        "handwriting/model.py",
        "handwriting/module.py",
    ]
    assert len(lines) < 100


@pytest.mark.medium
def test_the_commands_of_the_page_work_in_order(written: Path) -> None:
    said = list(commands())
    assert said[0] == ["moeapps", "new-task", "handwriting"]
    assert len([words for words in said if words[:2] == ["lightning", "fit"]]) >= 8
    done = set()
    for words in said[1:]:
        program, *rest = (part for word in words for part in (sorted(glob.glob(word)) if "*" in word else [word]))
        if program in ("cd", "pytest"):  # the fixture; tests/test_new_task.py
            continue
        assert program in OURS
        if rest[0] == "fit" and "--run" not in rest:
            rest += SHORT
        if rest[0] == "evidence" and "--list" not in rest:  # ten trainings
            continue
        assert main(rest) == 0, rest
        done.add(rest[0])

    assert done == {"fit", "test", "predict", "xeval", "report", "export", "evidence"}
    assert (written / "report.html").is_file()
    assert (written / "handwriting_files" / "model.safetensors").is_file()
    assert list(written.glob("runs/handwriting/moe/version_*/predictions/*"))


@pytest.mark.medium
def test_a_run_of_the_page_answers_raw_images_and_its_twin_computes_as_much(written: Path) -> None:
    spent = []
    for overlay in ([], ["--config", "configs/baselines/handwriting_dense.yaml"]):
        assert main(["fit", "--config", "configs/handwriting.yaml", *overlay, *SHORT]) == 0
    for name in ("base", "dense"):
        trained = moeapps.load(f"runs/handwriting/{name}")
        answer = trained.predict(np.random.default_rng(0).random((5, 8, 8)))
        assert answer["label"].shape == (5,)
        assert 0 <= int(answer["label"].min()) <= int(answer["label"].max()) < 10
        spent.append(yaml.safe_load((trained.run / "metrics" / "test.json").read_text())["header"]["train_flops"])

    assert spent[0] == pytest.approx(spent[1], rel=0.02)


@pytest.mark.parametrize(("kind", "heading"), [(BaseTask, "Of the task"), (DomainDataModule, "Of the data")])
def test_the_tables_of_hooks_name_methods_that_are_there(kind: type, heading: str) -> None:
    table = TEXT[TEXT.index(heading) :].split("\n\n")[1]
    named = re.findall(
        r"`(\w+)(?:\([^`]*\))?`(?:, `(\w+)\()?", "\n".join(row.split(" | ")[0] for row in table.splitlines()[2:])
    )
    hooks = {name for pair in named for name in pair if name}

    assert len(hooks) >= 9
    assert not [name for name in hooks if not hasattr(kind, name)]
    if kind is BaseTask:
        own = re.search(r"# What a subclass provides -+\n(.*?)\n    # Steps -", source(kind), flags=re.DOTALL)
    else:
        own = re.search(r"# What a subclass provides -+\n(.*?)\n    # Domains -", source(kind), flags=re.DOTALL)
    assert own is not None
    assert set(re.findall(r"^    def (\w+)", own[1], flags=re.MULTILINE)) <= hooks


def source(kind: type) -> str:
    return Path(sys.modules[kind.__module__].__file__ or "").read_text(encoding="utf-8")


def test_the_page_names_every_option_that_base_hands_on() -> None:
    import inspect

    paragraph = TEXT[TEXT.index("`**base` hands on") :].split("\n\n")[0]
    for kind in (BaseTask, DomainDataModule):
        options = set(inspect.signature(kind.__init__).parameters) - {"self", "facts"}
        assert not [name for name in options if f"`{name}`" not in paragraph]
