# SPDX-License-Identifier: Apache-2.0
"""Averaged weights: their closed form, and that fit, test and a resumed run mean the same ones."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from moeapps.cli import main
from moeapps.commands.run import run
from moeapps.training.callbacks import AveragedWeights
from tests.systems import tiny

pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("no_routing_figures")]

TOY = ["--config", "tests/toy.yaml"]


def averaging(folder: Path, *others: str) -> list[str]:
    """Write an overlay that averages with a decay of 0.9, after other callbacks."""
    average = {"class_path": "moeapps.training.callbacks.AveragedWeights", "init_args": {"decay": 0.9}}
    callbacks = [*({"class_path": other} for other in others), average]
    path = folder / "average.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return ["--config", str(path)]


class Tape(L.Callback):
    """Keep the weights after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize(("precision", "close"), [("32-true", 1e-5), ("64-true", 1e-13)])
def test_average_in_the_checkpoint_is_the_closed_form(tmp_path: Path, precision: str, close: float) -> None:
    overlay = averaging(tmp_path, "test_averaging.Tape")
    words = ["--trainer.precision", precision, "--trainer.max_epochs", "1", "--test_after_fit", "false"]
    done = run(["fit", *TOY, *overlay, *words])
    tape = next(callback for callback in done.trainer.callbacks if isinstance(callback, Tape))
    path = Path(done.trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    saved = torch.load(path, weights_only=True)["state_dict"]

    assert len(tape.weights) > 3
    for name in tape.weights[0]:
        average = tape.weights[0][name]  # the first average is a copy
        for weights in tape.weights[1:]:
            average = 0.9 * average + 0.1 * weights[name]
        torch.testing.assert_close(saved[name], average, rtol=close, atol=close / 10)
        assert not torch.equal(saved[name], tape.weights[-1][name])


def test_the_test_after_fit_and_a_later_test_score_the_same_weights(tmp_path: Path) -> None:
    assert main(["fit", *TOY, *averaging(tmp_path)]) == 0
    folder = tmp_path / "runs" / "toy" / "base" / "version_0"
    after_fit = json.loads((folder / "metrics" / "test.json").read_text())["rows"]
    assert main(["test", "--run", str(folder), "--trainer.callbacks", "null"]) == 0

    assert json.loads((folder / "metrics" / "test.json").read_text())["rows"] == after_fit


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_a_resumed_run_averages_on_as_if_it_had_not_stopped(tmp_path: Path, accumulate: str) -> None:
    constant = ["--model.init_args.schedule", "moeapps.training.optim.Constant"]
    words = ["fit", *TOY, *averaging(tmp_path), *constant, "--test_after_fit", "false"]
    words += ["--trainer.accumulate_grad_batches", accumulate]
    runs = tmp_path / "runs" / "toy"
    half = str(runs / "half" / "version_0" / "checkpoints" / "last.ckpt")
    assert main([*words, "--trainer.max_epochs", "2", "--name", "whole"]) == 0
    assert main([*words, "--trainer.max_epochs", "1", "--name", "half"]) == 0
    assert main([*words, "--trainer.max_epochs", "2", "--name", "rest", "--ckpt_path", half]) == 0

    whole, rest = (
        torch.load(runs / name / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "rest")
    )
    for part in ("state_dict", "current_model_state"):
        for name, value in whole[part].items():
            torch.testing.assert_close(rest[part][name], value)


class Evaluated(L.Callback):
    """Keep the weights of the last evaluation."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def test_a_validation_after_the_fit_is_of_the_checkpoint_that_it_is_given(tmp_path: Path) -> None:
    overlay = averaging(tmp_path, "tests.toy_callbacks.KeepEpochs", "test_averaging.Evaluated")
    done = run(["fit", *TOY, *overlay, "--test_after_fit", "false", "--trainer.max_epochs", "2"])
    path = tmp_path / "runs" / "toy" / "base" / "version_0" / "checkpoints" / "epoch=0.ckpt"
    done.trainer.validate(done.model, datamodule=done.datamodule, ckpt_path=str(path), verbose=False)
    tape = next(callback for callback in done.trainer.callbacks if isinstance(callback, Evaluated))

    saved = torch.load(path, weights_only=True)["state_dict"]
    assert [name for name in saved if not torch.equal(saved[name], tape.weights[name])] == []


def checkpoint(tmp_path: Path, name: str, file: str) -> dict[str, dict[str, torch.Tensor]]:
    """Average and weights of a checkpoint of a run."""
    held = torch.load(tmp_path / "runs" / "toy" / name / "version_0" / "checkpoints" / file, weights_only=True)
    return {part: held[part] for part in ("state_dict", "current_model_state")}


def differing(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> list[str]:
    parts = ("state_dict", "current_model_state")
    return [f"{part} {name}" for part in parts for name in a[part] if not torch.equal(a[part][name], b[part][name])]


@pytest.mark.usefixtures("restored_signals")
@pytest.mark.parametrize("before", [(), ("moeapps.training.callbacks.InterruptCheckpoint",)], ids=["after", "before"])
def test_a_validation_that_is_cut_leaves_weights_and_average_in_their_places(
    tmp_path: Path, before: tuple[str, ...]
) -> None:
    """Whether the checkpoint is written after or before the average hears of the interruption."""
    words = ["fit", *TOY, "--test_after_fit", "false", "--trainer.max_epochs", "3"]
    assert main([*words, *averaging(tmp_path, "tests.toy_callbacks.KeepEpochs"), "--name", "whole"]) == 0
    cut = averaging(tmp_path, *before, "tests.toy_callbacks.PressKeyInValidation")
    assert main([*words, *cut, "--name", "cut"]) == 130
    at = checkpoint(tmp_path, "whole", "epoch=1.ckpt")
    assert differing(checkpoint(tmp_path, "cut", "interrupted.ckpt"), at) == []
    path = tmp_path / "runs" / "toy" / "cut" / "version_0" / "checkpoints" / "interrupted.ckpt"
    assert main([*words, *averaging(tmp_path), "--name", "rest", "--ckpt_path", str(path)]) == 0

    assert differing(checkpoint(tmp_path, "rest", "last.ckpt"), checkpoint(tmp_path, "whole", "last.ckpt")) == []


class PressAtEnd(L.Callback):
    """Send a real Ctrl-C when the last step is done."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("restored_signals")
def test_a_training_that_is_cut_after_its_last_step_still_knows_the_weights(tmp_path: Path) -> None:
    words = ["fit", *TOY, *averaging(tmp_path, "test_averaging.PressAtEnd"), "--test_after_fit", "false"]
    assert main([*words, "--trainer.max_epochs", "2"]) == 130

    last = checkpoint(tmp_path, "base", "last.ckpt")
    assert differing(checkpoint(tmp_path, "base", "interrupted.ckpt"), last) == []
    assert not torch.equal(*(last[part]["net.first.weight"] for part in ("state_dict", "current_model_state")))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_decay_outside_its_range_is_told(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay={decay}"):
        AveragedWeights(decay)


def test_the_average_follows_a_gate_that_is_fitted_while_training(tmp_path: Path) -> None:
    """How many rows a gate divides is known after its first fit; what it remembers of them has another size then."""
    base, folder = Path("configs/mixer.yaml"), tmp_path / "runs" / "mixer"
    words = ["fit", *tiny(base), "--test_after_fit", "false", *averaging(tmp_path, "tests.toy_callbacks.KeepEpochs")]
    words += ["--trainer.max_epochs", "2", "--model.init_args.net.init_args.gate.init_args.warmup", "0"]
    assert main([*words, "--name", "whole"]) == 0
    start = folder / "whole" / "version_0" / "checkpoints" / "epoch=0.ckpt"
    assert main([*words, "--name", "rest", "--ckpt_path", str(start)]) == 0

    whole, rest = (
        torch.load(folder / each / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
        for each in ("whole", "rest")
    )
    assert whole["state_dict"]["net.layer.router.partition.labels"].numel() == 20
    assert differing(whole, rest) == []
