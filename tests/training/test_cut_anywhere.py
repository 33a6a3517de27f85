# SPDX-License-Identifier: Apache-2.0
"""Trainings that end at moments of all kinds: within an epoch, a step of several batches, with max_steps set."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moeapps.cli import main
from moeapps.commands.run import run
from moeapps.training.checkpoints import read_checkpoint
from tests.systems import BASES, name, tiny

pytestmark = [
    pytest.mark.medium,
    pytest.mark.usefixtures("no_routing_figures"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key"),  # an epoch that is cut has no validation
]

# Rates that do not depend on where a training is to end: then one that is cut is the begin of one that is not.
CONSTANT = ["--model.schedule", "moeapps.training.optim.Constant"]
TOY = ["fit", "--config", "tests/toy.yaml", "--test_after_fit", "false", "--trainer.enable_model_summary", "false"]
ADD = "--trainer.callbacks+=tests.toy_callbacks."
EPOCH = 9
"""Batches of an epoch of the toy."""


def held(tmp_path: Path, run_name: str, file: str = "last.ckpt", system: str = "toy") -> Path:
    return tmp_path / "runs" / system / run_name / "version_0" / "checkpoints" / file


def differing(a: Path, b: Path) -> list[str]:
    """Names of what differs in two checkpoints, the count of steps included."""
    first, second = read_checkpoint(a), read_checkpoint(b)
    states = (first["state_dict"], second["state_dict"])
    found = [key for key, value in states[0].items() if not torch.equal(value, states[1][key])]
    return found + [key for key in ("global_step", "epoch") if first[key] != second[key]]


def rows(words: Sequence[str]) -> list[list[float]]:
    """What a training read, batch by batch."""
    tape: Any = next(each for each in run([*words, f"{ADD}RowTape"]).trainer.callbacks if hasattr(each, "rows"))
    found: list[list[float]] = tape.rows
    return found


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_training_with_max_steps_goes_on_from_an_end_of_an_epoch(tmp_path: Path, epoch: int) -> None:
    """Each epoch once and in its own order, and all of them where max_epochs is given as well."""
    words = [*TOY, "--trainer.max_epochs=3", "--trainer.max_steps=100"]
    whole = rows([*words, "--name=whole", f"{ADD}KeepEpochs"])
    start = held(tmp_path, "whole", f"epoch={epoch}.ckpt")
    rest = rows([*words, "--name=rest", f"--ckpt_path={start}"])

    assert len(whole) == 3 * EPOCH
    assert rest == whole[(epoch + 1) * EPOCH :]
    assert differing(held(tmp_path, "whole"), held(tmp_path, "rest")) == []


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("steps", [4, 9, 12])
def test_what_max_steps_cut_goes_on_within_its_epoch(tmp_path: Path, steps: int, accumulate: int) -> None:
    words = [*TOY, *CONSTANT, "--trainer.max_epochs=-1", f"--trainer.accumulate_grad_batches={accumulate}"]
    whole = rows([*words, "--trainer.max_steps=20", "--name=whole"])
    cut = rows([*words, f"--trainer.max_steps={steps}", "--name=cut"])
    rest = rows([*words, "--trainer.max_steps=20", "--name=rest", f"--ckpt_path={held(tmp_path, 'cut')}"])

    assert [*cut, *rest] == whole
    assert differing(held(tmp_path, "whole"), held(tmp_path, "rest")) == []


@pytest.fixture
def _restored_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("restored_signals", "_restored_sigterm")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("accumulate", "batch", "stops"), [(2, 4, 6), (3, 3, 6), (2, 8, 9)])
def test_a_signal_waits_for_all_batches_of_a_step(
    tmp_path: Path, sent: signal.Signals, accumulate: int, batch: int, stops: int
) -> None:
    """No checkpoint holds the gradients of half a step; the last step of an epoch may have fewer batches."""
    words = [*TOY, "--trainer.max_epochs=2", f"--trainer.accumulate_grad_batches={accumulate}"]
    whole = rows([*words, "--name=whole"])
    struck = [f"{ADD}SignalInBatch", f"--trainer.callbacks.batch={batch}", f"--trainer.callbacks.number={int(sent)}"]
    assert main([*words, "--name=cut", *struck]) == 128 + sent
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rest = rows([*words, "--name=rest", f"--ckpt_path={held(tmp_path, 'cut', 'interrupted.ckpt')}"])

    assert rest == whole[stops:]
    assert differing(held(tmp_path, "whole"), held(tmp_path, "rest")) == []


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("base", BASES, ids=name)
def test_a_system_goes_on_after_a_step_of_any_kind(tmp_path: Path, base: Path, step: int) -> None:
    """MixER's kinds take turns at this size: contexts or weights, with and without an open round."""
    flags = ["fit", *tiny(base), "--test_after_fit", "false", "--trainer.limit_train_batches=5"]
    flags += ["--trainer.callbacks=tests.toy_callbacks.StopWithin"]
    whole, cut, rest = ([*flags, f"--name={each}"] for each in ("whole", "cut", "rest"))
    assert main([*whole, "--trainer.callbacks.step=99"]) == 0
    assert main([*cut, f"--trainer.callbacks.step={step}"]) == 0
    start = held(tmp_path, "cut", system=base.stem)
    assert read_checkpoint(start)["global_step"] == step
    assert main([*rest, "--trainer.callbacks.step=99", f"--ckpt_path={start}"]) == 0

    assert differing(held(tmp_path, "whole", system=base.stem), held(tmp_path, "rest", system=base.stem)) == []
