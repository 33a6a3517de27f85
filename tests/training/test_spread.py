# SPDX-License-Identifier: Apache-2.0
"""Training with spread experts and sharded weights is training in one process (slow: starts processes)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moeapps
from moeapps.cli import main
from moeapps.training.checkpoints import read_checkpoint
from tests.launched import Job, run_jobs
from tests.systems import BASES, CONFIGS, name, tiny

pytestmark = pytest.mark.slow

# 18 steps that two processes share; no batch norm and no dropout: a mean over rows is what it is over processes.
TOY = ["fit", "--config", "tests/toy.yaml", "--trainer.max_epochs", "2", "--trainer.gradient_clip_val", "0.5",
       "--model.net.dropout", "0", "--model.net.norm", "false", "--trainer.log_every_n_steps", "1",
       "--model.net.moe.init_args.num_shared", "1",
       "--model.schedule", "moeapps.training.optim.Constant"]  # fmt: skip
EMA = ["--trainer.callbacks", "moeapps.training.callbacks.AveragedWeights"]
ONE, TWO = ["--data.batch_size", "8"], ["--data.batch_size", "4", "--trainer.accelerator", "cpu"]
# Experts spread over pairs of processes, and cut further over the two pairs.
GRID = ["--data.batch_size", "2", "--trainer.accelerator", "cpu", "--config", "configs/trainer/ep_fsdp2.yaml",
        "--trainer.devices", "4", "--trainer.strategy.init_args.experts", "2"]  # fmt: skip
# Of three experts two processes have two, and two the third: a pair of copies cuts through it.
ODD = ["--model.net.moe.init_args.num_experts", "3"]
OVERLAYS = ["ep", "ep_fsdp2", "fsdp2"]


def overlay(path: str) -> list[str]:
    return ["--config", f"configs/trainer/{path}.yaml"]


def in_one(folder: Path, variant: str) -> list[str]:
    run = folder / "runs" / "toy" / variant
    return ["test", "--run", str(run), "--trainer.devices", "1", "--trainer.strategy", "auto"]


def by(folder: Path, command: str, variant: str, size: int, *more: str) -> Job:
    """A command with what another number of processes has written."""
    experts = ["--trainer.strategy.init_args.experts", "2"]
    run = str(folder / "runs" / "toy" / variant)
    return size, [command, "--run", run, "--trainer.devices", str(size), *experts, *more]


def jobs(folder: Path) -> list[Job]:
    """Runs of one process, and of several that must equal them."""
    short = ["--name", "short", "--trainer.max_epochs", "1"]
    return [
        (1, [*TOY, *ONE, "--name", "one"]),
        (1, [*TOY, *ONE, *EMA, "--name", "one_ema"]),
        *((2, [*TOY, *TWO, *overlay(path), "--name", path]) for path in OVERLAYS),
        (2, [*TOY, *TWO, *EMA, *overlay("ep"), "--name", "ep_ema"]),
        (4, [*TOY, *GRID, "--name", "grid"]),
        (1, [*TOY, *ODD, *ONE, "--name", "one_odd"]),
        (4, [*TOY, *ODD, *GRID, "--name", "grid_odd"]),
        (2, [*TOY, *TWO, *EMA, *overlay("ep_fsdp2"), *short]),
        (2, ["fit", "--run", str(folder / "runs/toy/short"), "--name", "resumed", "--trainer.max_epochs", "2"]),
        (2, [*TOY, *TWO, *EMA, *overlay("ep_fsdp2"), "--name", "whole"]),
        (1, in_one(folder, "ep")),
        (1, in_one(folder, "ep_fsdp2")),
        by(folder, "validate", "grid_odd", 2),
        by(folder, "validate", "ep_fsdp2", 4),
        (1, ["validate", *in_one(folder, "one_odd")[1:]]),
        (1, ["validate", *in_one(folder, "one")[1:]]),
        by(folder, "fit", "short", 4, "--name", "resumed_by_4", "--trainer.max_epochs", "2", "--data.batch_size", "2"),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of these runs."""
    folder = tmp_path_factory.mktemp("runs_of_two")
    run_jobs(folder, jobs(folder), seconds=900)
    return folder


def run(folder: Path, variant: str) -> Path:
    return folder / "runs" / "toy" / variant / "version_0"


def weights(folder: Path, variant: str, checkpoint: str = "last.ckpt") -> dict[str, Tensor]:
    """Weights as a network in one process names them."""
    file = run(folder, variant) / "checkpoints" / checkpoint
    return moeapps.load(run(folder, variant), checkpoint=file).task.net.state_dict()


def rows(folder: Path, variant: str, stage: str = "test") -> list[dict[str, Any]]:
    return json.loads((run(folder, variant) / "metrics" / f"{stage}.json").read_text())["rows"]


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-4, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.parametrize(
    ("variant", "alone"),
    [*((path, "one") for path in (*OVERLAYS, "grid")), ("ep_ema", "one_ema"), ("grid_odd", "one_odd")],
)
def test_weights_and_scores_are_those_of_one_process(folder: Path, variant: str, alone: str) -> None:
    close(weights(folder, variant), weights(folder, alone))
    for left, right in zip(rows(folder, variant), rows(folder, alone), strict=True):
        assert (left["domain"], left["metric"], left["n"]) == (right["domain"], right["metric"], right["n"])
        assert left["value"] == pytest.approx(right["value"], abs=1e-4)


def test_experts_are_different_after_training(folder: Path) -> None:
    stack = weights(folder, "ep")["moe.experts.w_in"]

    assert stack.shape[0] == 5  # four routed, one shared
    assert len({tuple(expert.flatten().tolist()) for expert in stack}) == 5


def test_a_resumed_training_is_the_whole_one_to_the_bit(folder: Path) -> None:
    last = [run(folder, variant) / "checkpoints" / "last.ckpt" for variant in ("whole", "resumed")]
    whole, resumed = (read_checkpoint(file)["state_dict"] for file in last)

    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert whole["net.moe.experts.w_in"].shape[0] == 5


@pytest.mark.parametrize("variant", ["ep", "ep_fsdp2"])
def test_one_process_tests_what_two_have_trained(folder: Path, variant: str) -> None:
    for left, right in zip(rows(folder, variant), rows(folder, "one"), strict=True):
        assert left["value"] == pytest.approx(right["value"], abs=1e-4)


@pytest.mark.parametrize(("variant", "alone"), [("grid_odd", "one_odd"), ("ep_fsdp2", "one")])
def test_another_number_of_processes_reads_the_parts(folder: Path, variant: str, alone: str) -> None:
    """Four wrote and two read, two wrote and four read."""
    for left, right in zip(rows(folder, variant, "val"), rows(folder, alone, "val"), strict=True):
        assert (left["domain"], left["metric"], left["n"]) == (right["domain"], right["metric"], right["n"])
        assert left["value"] == pytest.approx(right["value"], abs=1e-4)


def test_four_processes_go_on_where_two_have_stopped(folder: Path) -> None:
    close(weights(folder, "resumed_by_4"), weights(folder, "whole"))


@pytest.mark.parametrize(("variant", "alone"), [*((path, "one") for path in OVERLAYS), ("grid_odd", "one_odd")])
def test_an_export_of_parts_has_the_weights_of_one_process(
    folder: Path, variant: str, alone: str, tmp_path: Path
) -> None:
    assert main(["export", str(run(folder, variant)), "--out", str(tmp_path / "out")]) == 0

    best = moeapps.load(run(folder, alone)).task.state_dict()
    close(load_file(tmp_path / "out" / "model.safetensors"), best)
    close(moeapps.load(run(folder, variant)).task.state_dict(), best)


def test_each_checkpoint_keeps_one_folder_of_parts(folder: Path) -> None:
    for variant in OVERLAYS:
        held = run(folder, variant) / "checkpoints"
        named = sorted(read_checkpoint(held / f"{kind}.ckpt", weights=False)["parts"] for kind in ("best", "last"))
        assert sorted(path.name for path in held.glob("*.parts-*")) == named


def test_a_damaged_part_is_told(folder: Path, tmp_path: Path) -> None:
    held = shutil.copytree(run(folder, "fsdp2") / "checkpoints", tmp_path / "held")
    (parts,) = held.glob("best.ckpt.parts-*")
    (parts / "__0_0.distcp").write_bytes(b"nothing")

    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(held / "best.ckpt")


def test_code_in_the_description_of_parts_is_not_run(folder: Path, tmp_path: Path) -> None:
    held = shutil.copytree(run(folder, "ep") / "checkpoints", tmp_path / "held")
    (parts,) = held.glob("last.ckpt.parts-*")
    known = "torch.distributed.checkpoint.filesystem"
    hidden = pickle.dumps(known)[:-1] + pickle.dumps("os.mkdir")[2:-1] + b"\x93"  # a name that this module imports
    hidden += pickle.dumps((str(tmp_path / "ran"),))[2:-1] + b"R."
    for content in (pickle.dumps(Runs(str(tmp_path / "ran"))), hidden):
        (parts / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match=r"mkdir is not allowed in a checkpoint"):
            read_checkpoint(held / "last.ckpt")
        assert not (tmp_path / "ran").exists()
    pickle.loads(hidden)
    assert (tmp_path / "ran").exists()  # what it would have done


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


SYSTEMS = [CONFIGS / f"{system}.yaml" for system in ("point_moe", "promoe", "unimoe_audio")]


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the systems' runs on two processes, one overlay after the other."""
    folder = tmp_path_factory.mktemp("systems_of_two")
    listed: list[Job] = []
    for base in SYSTEMS:
        # A schedule without an end: what is resumed goes on beyond it.
        constant = "--model.init_args.schedule=moeapps.training.optim.Constant"
        words = ["fit", *tiny(base), "--trainer.accelerator", "cpu", constant]
        listed += [(2, [*words, *overlay(path), "--name", path]) for path in OVERLAYS]
        resumed = ["--name", "resumed", "--trainer.max_epochs", "2"]
        listed.append((2, ["fit", "--run", str(folder / "runs" / base.stem / "ep"), *resumed]))
    run_jobs(folder, listed, seconds=1800)
    return folder


@pytest.mark.parametrize("variant", [*OVERLAYS, "resumed"])
@pytest.mark.parametrize("base", SYSTEMS, ids=name)
def test_a_system_trains_and_tests_on_two_processes(systems: Path, base: Path, variant: str) -> None:
    found = json.loads((systems / "runs" / base.stem / variant / "version_0/metrics/test.json").read_text())

    assert {row["role"] for row in found["rows"]} == {"seen", "validation", "unseen"}


OTHERS = [base for base in BASES if base not in SYSTEMS]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one step of the other systems on two processes, with sharded weights."""
    folder = tmp_path_factory.mktemp("other_systems_of_two")
    short = ["--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "1"]
    listed = [
        (2, ["fit", *tiny(base), *short, *overlay(path), "--name", path])
        for base in OTHERS
        for path in ("fsdp2", "ep_fsdp2")
    ]
    run_jobs(folder, listed, seconds=1800)
    return folder


@pytest.mark.parametrize("variant", ["fsdp2", "ep_fsdp2"])
@pytest.mark.parametrize("base", OTHERS, ids=name)
def test_a_step_of_every_other_system_with_sharded_weights(others: Path, base: Path, variant: str) -> None:
    found = json.loads((others / "runs" / base.stem / variant / "version_0/metrics/test.json").read_text())

    assert {row["role"] for row in found["rows"]} == {"seen", "validation", "unseen"}


@pytest.mark.parametrize("killed", [0, 1])
def test_one_killed_process_ends_the_other(tmp_path: Path, killed: int) -> None:
    command = [sys.executable, "-m", "moeapps", *TOY, *TWO, *overlay("ep"), "--trainer.max_epochs", "10000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes) as first:
        try:
            saved = tmp_path / "runs/toy/base/version_0/checkpoints/last.ckpt"
            deadline = time.monotonic() + 300
            while not saved.is_file() and time.monotonic() < deadline and first.poll() is None:
                time.sleep(0.5)
            (second,) = map(int, Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split())
            os.kill((first.pid, second)[killed], signal.SIGKILL)
            began = time.monotonic()
            told, _ = first.communicate(timeout=60)  # until both have closed what they print to
        finally:
            with suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
    assert time.monotonic() - began < 60
    assert first.returncode == (-signal.SIGKILL if killed == 0 else 2)
    assert "Traceback" not in told, told[-3000:]
    assert len([line for line in told.splitlines() if line.startswith("error: ")]) == 1, told[-3000:]
