# SPDX-License-Identifier: Apache-2.0
"""What people are shown while a system trains and at its end: pictures, bars that name domains, headlines."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moeapps.cli import main
from moeapps.commands.run import run
from moeapps.training.callbacks import EpochPictures, ProgressLines
from moeapps.training.callbacks import progress as bars
from moeapps.training.callbacks.progress import DomainBar
from moeapps.training.callbacks.table import experts_line, headline_lines
from tests.systems import BASES, name, tiny
from tests.toy import TOY, ShowingTask, ToyTask


def showing(*words: str, task: str = "ShowingTask") -> Any:
    ShowingTask.calls.clear()
    return run(["fit", *TOY, f"--model.class_path=tests.toy.{task}", *words])


def tags(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in folder.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for kind in ("images", "audio"):
            found.setdefault(kind, []).extend(events.Tags()[kind])
    return found


def test_each_validation_shows_the_first_batch_of_each_domain_by_what_it_is(tmp_path: Path) -> None:
    built = showing()

    epochs, domains = range(3), ["a", "b", "c", "v"]
    assert ShowingTask.calls == [(domain, epoch) for epoch in epochs for domain in domains]
    found = tags(Path(built.trainer.log_dir))
    assert {f"{kind}/{domain}" for kind in ("figure", "image") for domain in domains} <= set(found["images"])
    assert set(found["audio"]) == {f"sound/{domain}" for domain in domains}


@pytest.mark.parametrize("words", [["--pictures=false"], ["--trainer.logger=false"], ["--trainer.fast_dev_run=true"]])
def test_nothing_is_drawn_where_it_is_not_wanted_or_nobody_sees_it(words: list[str]) -> None:
    showing(*words)

    assert ShowingTask.calls == []


def test_pictures_leave_the_training_as_it_is() -> None:
    with_them, without = showing().model, showing("--pictures=false").model

    for key, value in with_them.net.state_dict().items():
        assert torch.equal(value, without.net.state_dict()[key]), key


def test_a_picture_of_no_kind_costs_the_pictures_alone() -> None:
    with pytest.warns(RuntimeWarning, match="EpochPictures failed.*is a int; give a matplotlib figure"):
        built = showing(task="WronglyShowingTask")

    assert (Path(built.trainer.log_dir) / "metrics" / "test.json").is_file()
    with pytest.raises(ValueError, match="most_domains=0"):
        EpochPictures(0)


@pytest.mark.medium
@pytest.mark.parametrize("base", BASES, ids=name)
def test_every_system_shows_something_while_it_trains(base: Path) -> None:
    words = ["--pictures=true", "--test_after_fit=false", "--trainer.callbacks=null", "--trainer.limit_val_batches=1"]
    assert main(["fit", *tiny(base), *words]) == 0

    folder = max(Path(os.environ["MOEAPPS_RUNS"]).glob("*/*/version_*"))
    shown = [tag for tag in tags(folder)["images"] if not tag.startswith("routing/")]
    assert shown
    assert all(re.fullmatch(r"\w+/[\w-]+", tag) for tag in shown)


def test_bars_and_lines_name_the_domain_that_is_evaluated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = run(["fit", *TOY, "--test_after_fit=false"])
    trainer = built.trainer
    bar = DomainBar()
    bar.setup(trainer, built.model, "test")
    assert bar.test_description == "Testing"
    for loader, domain in enumerate(["a", "b", "c", "v", "u"]):
        bar.has_dataloader_changed(loader)
        assert bar.test_description == f"Testing {domain}"
        assert bar.predict_description == f"Predicting {domain}"
    bar.has_dataloader_changed(3)
    assert bar.validation_description == "Validation v"

    lines = ProgressLines(seconds=30.0)
    clock = iter([0.0, 1.0, 31.0, 32.0, 62.0])
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("moeapps.training.callbacks.progress.log.propagate", True)
    with caplog.at_level("INFO", logger="moeapps"):
        lines.on_test_start(trainer, built.model)
        for loader, batch in ((0, 0), (1, 2), (2, 0), (4, 1)):
            lines.on_test_batch_end(trainer, built.model, None, None, batch, loader)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("testing ")]
    assert told == ["testing b  batch 3  31.0 s", "testing u  batch 2  62.0 s"]


def test_the_end_table_says_headlines_what_the_experts_did_and_where_to_look(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moeapps.training.callbacks.table.Console", lambda: Console(width=160, force_terminal=False))
    built = showing("--trainer.callbacks+=tests.toy_callbacks.HalfReport")
    out = capsys.readouterr().out

    folder = Path(built.trainer.log_dir)
    assert "half of it: 0.5000" in out
    assert "The 4 experts of its one MoE layer" in out
    assert f"moeapps report {folder}" in out
    assert headline_lines(ToyTask.__new__(ToyTask)) == []
    (folder / "metrics" / "routing_test.json").write_text(json.dumps({"domains": 3}))
    assert "not told" in experts_line(folder)[0]
    (folder / "metrics" / "routing_test.json").unlink()
    assert experts_line(folder) == []
