# SPDX-License-Identifier: Apache-2.0
"""A resumed run ends where the uninterrupted one ends, to the bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.reliability.faults import EPOCH, Case, cases, chain
from moeapps.commands.run import run
from tests.systems import BASES, name, tiny

pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("no_routing_figures")]

TOY = ["fit", "--config", "tests/toy.yaml", "--test_after_fit", "false", "--trainer.enable_model_summary", "false"]


def checkpoints(tmp_path: Path, version: int, system: str = "toy") -> Path:
    return tmp_path / "runs" / system / "base" / f"version_{version}" / "checkpoints"


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (key, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), key


@pytest.mark.parametrize(
    "flags",
    [
        ["--data.mixing", "concat"],
        ["--data.mixing", "balanced", "--trainer.check_val_every_n_epoch", "2"],
        ["--data.mixing", "one_domain", "--trainer.limit_train_batches", "5"],
        ["--data.num_workers", "1"],
        ["--trainer.precision", "64-true"],
    ],
    ids=["concat", "balanced, rare validation", "one_domain, limited", "workers", "double precision"],
)
def test_resume_at_an_epoch_end_is_bit_equal(tmp_path: Path, flags: list[str]) -> None:
    keep = "--trainer.callbacks+=tests.toy_callbacks.KeepEpochs"
    whole = run([*TOY, *flags, keep, "--trainer.max_epochs", "3"])
    for epoch in (0, 1):
        checkpoint = checkpoints(tmp_path, 0) / f"epoch={epoch}.ckpt"
        resumed = run([*TOY, *flags, "--trainer.max_epochs", "3", "--ckpt_path", str(checkpoint)])

        assert resumed.trainer.global_step == whole.trainer.global_step
        assert_equal(resumed.model, whole.model)


def test_last_checkpoint_is_written_when_the_best_does_not_improve(tmp_path: Path) -> None:
    run([*TOY, "--model.optimizer.lr", "1e-12", "--model.net.norm", "false", "--trainer.max_epochs", "3"])

    best = torch.load(checkpoints(tmp_path, 0) / "best.ckpt", weights_only=True)
    last = torch.load(checkpoints(tmp_path, 0) / "last.ckpt", weights_only=True)
    assert best["epoch"] == 0
    assert last["epoch"] == 2


def test_resumed_run_takes_the_best_checkpoint_along(tmp_path: Path) -> None:
    run([*TOY, "--trainer.max_epochs", "1"])
    last = checkpoints(tmp_path, 0) / "last.ckpt"
    resumed = run([*TOY, "--trainer.max_epochs", "2", "--ckpt_path", str(last), "--model.optimizer.lr", "1e-12"])

    first = torch.load(checkpoints(tmp_path, 0) / "best.ckpt", weights_only=True)
    carried = torch.load(checkpoints(tmp_path, 1) / "best.ckpt", weights_only=True)
    assert carried["epoch"] == first["epoch"] == 0
    origins = [json.loads((checkpoints(tmp_path, k).parent / "run.json").read_text()) for k in (0, 1)]
    assert [origin["continued_from"] for origin in origins] == [None, str(last)]
    assert resumed.trainer.checkpoint_callback.best_model_path == str(checkpoints(tmp_path, 1) / "best.ckpt")


@pytest.mark.parametrize("replaced", [False, True])
def test_the_best_so_far_is_found_once_the_runs_were_moved(tmp_path: Path, replaced: bool) -> None:
    """Also where another run has taken the place, whose best is not this one's."""
    run([*TOY, "--trainer.max_epochs", "1"])
    (tmp_path / "runs").rename(tmp_path / "moved")
    if replaced:
        run([*TOY, "--trainer.max_epochs", "1", "--seed_everything", "5"])
    held = tmp_path / "moved" / "toy" / "base" / "version_0" / "checkpoints"
    words = ["--trainer.max_epochs", "2", "--ckpt_path", str(held / "last.ckpt"), "--model.optimizer.lr", "1e-12"]
    resumed = run([*TOY, *words])

    best = checkpoints(tmp_path, int(replaced)) / "best.ckpt"
    assert resumed.trainer.checkpoint_callback.best_model_path == str(best)
    assert best.read_bytes() == (held / "best.ckpt").read_bytes()


def test_the_best_so_far_is_found_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new folder has the name there that the old one has here."""
    toy = ["fit", "--config", str(Path("tests/toy.yaml").resolve()), *TOY[3:]]
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.setenv("MOEAPPS_RUNS", "runs")
    monkeypatch.chdir(here)
    run([*toy, "--trainer.max_epochs", "1"])
    monkeypatch.chdir(there)
    held = checkpoints(here, 0)
    words = ["--trainer.max_epochs", "2", "--ckpt_path", str(held / "last.ckpt"), "--model.optimizer.lr", "1e-12"]
    run([*toy, *words])

    assert (checkpoints(there, 0) / "best.ckpt").read_bytes() == (held / "best.ckpt").read_bytes()


@pytest.fixture
def _restored_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_restored_signals")
def test_ctrl_c_leaves_a_checkpoint_from_which_the_remaining_rows_are_trained_once(tmp_path: Path) -> None:
    tape = "--trainer.callbacks+=tests.toy_callbacks.RowTape"
    whole = run([*TOY, tape, "--trainer.max_epochs", "2"])
    with pytest.raises(SystemExit):
        run([*TOY, tape, "--trainer.callbacks+=tests.toy_callbacks.PressCtrlC", "--trainer.max_epochs", "2"])

    checkpoint = checkpoints(tmp_path, 1) / "interrupted.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 13
    resumed = run([*TOY, tape, "--trainer.max_epochs", "2", "--ckpt_path", str(checkpoint)])

    rows = [next(c.rows for c in done.trainer.callbacks if hasattr(c, "rows")) for done in (whole, resumed)]
    assert rows[1] == rows[0][13:]
    assert resumed.trainer.global_step == whole.trainer.global_step
    assert_equal(resumed.model, whole.model)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES, ids=name)
def test_resume_of_a_system_is_bit_equal(tmp_path: Path, base: Path) -> None:
    flags = [*tiny(base), "--test_after_fit", "false", "--trainer.callbacks", "tests.toy_callbacks.KeepEpochs"]
    whole = run(["fit", *flags, "--trainer.max_epochs", "2"])
    checkpoint = checkpoints(tmp_path, 0, base.stem) / "epoch=0.ckpt"
    resumed = run(["fit", *flags, "--trainer.max_epochs", "2", "--ckpt_path", str(checkpoint)])

    assert resumed.trainer.global_step == whole.trainer.global_step
    assert_equal(resumed.model, whole.model)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases().values(), ids=cases())
def test_a_chain_of_killed_and_interrupted_processes_takes_every_step_to_the_bit(tmp_path: Path, case: Case) -> None:
    """SIGKILL at drawn steps and at an end of an epoch, Ctrl-C, SIGTERM; each process goes on where one was struck."""
    outcome = chain(case, tmp_path)

    assert outcome.differing == []
    assert outcome.missing == []
    assert outcome.compared > len(case.runs) * EPOCH
    signals = [fault.signal for fault in outcome.faults]
    assert signals.count("SIGKILL") >= 4
    assert "SIGINT" in signals
    # A signal that can be caught loses nothing, a kill at most the epoch that it falls into.
    assert all(fault.repeated <= (EPOCH if fault.signal == "SIGKILL" else 0) for fault in outcome.faults)
