# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes: the same numbers as one process with the same global batch (slow: starts processes)."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moeapps.training.checkpoints import read_checkpoint
from tests.systems import BASES, name, tiny

pytestmark = pytest.mark.slow

TOY = ["fit", "--config", "tests/toy.yaml", "--trainer.precision", "64-true", "--trainer.max_epochs", "2",
       "--model.net.dropout", "0", "--model.net.norm", "false", "--trainer.log_every_n_steps", "1"]  # fmt: skip
TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]


def started(*command: str) -> str:
    """Run a command and return what it printed; after 400 s it is ended with the processes that it started."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes) as process:
        try:
            told, _ = process.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"not done after 400 s: {process.communicate()[0][-3000:]}")
    assert process.returncode == 0, told[-3000:]
    return told


def moeapps(*words: str) -> str:
    return started(sys.executable, "-m", "moeapps", *words)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def results(folder: Path, file: str = "test.json") -> Any:
    return json.loads((folder / "metrics" / file).read_text())


@pytest.mark.parametrize(
    "flags",
    [[], ["--data.mixing", "one_domain"], ["--data.num_items", "22", "--data.eval_batch_size", "5"]],
    ids=["concat", "one domain", "ragged evaluation"],
)
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path: Path, flags: list[str]) -> None:
    moeapps(*TOY, *flags, "--name", "one", "--data.batch_size", "8")
    moeapps(*TOY, *flags, "--name", "two", "--data.batch_size", "4", *TWO)

    one, two = (tmp_path / "runs" / "toy" / variant / "version_0" for variant in ("one", "two"))
    assert sorted(p.name for p in (tmp_path / "runs" / "toy").glob("*/version_*")) == ["version_0", "version_0"]
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(two)[key], value, atol=1e-9, rtol=1e-9, msg=key)
    for left, right in zip(results(one)["rows"], results(two)["rows"], strict=True):
        assert (left["domain"], left["metric"], left["n"]) == (right["domain"], right["metric"], right["n"])
        assert left["value"] == pytest.approx(right["value"], abs=1e-6)
    for domain, units in results(one)["units"].items():
        assert sorted(units["accuracy"]) == sorted(results(two)["units"][domain]["accuracy"])
    assert (
        results(one, "routing_test.json")["layers"]["net.moe"]["work"]
        == (results(two, "routing_test.json")["layers"]["net.moe"]["work"])
    )
    with (two / "metrics.csv").open() as lines:
        steps = [row["step"] for row in csv.DictReader(lines) if row.get("train/loss")]
    assert len(steps) == len(set(steps))


def test_an_expert_without_rows_and_bias_balancing_work_on_two_processes(tmp_path: Path) -> None:
    flags = [
        "--model.net.moe",
        '{"class_path": "tests.toy.biased_moe"}',
        "--trainer.callbacks",
        "tests.toy.FastBalancing",
    ]
    moeapps(*TOY, *flags, "--name", "one", "--data.batch_size", "8")
    moeapps(*TOY, *flags, "--name", "two", "--data.batch_size", "4", *TWO)

    one, two = (weights(tmp_path / "runs" / "toy" / variant / "version_0") for variant in ("one", "two"))
    torch.testing.assert_close(two["net.moe.router.choose.bias"], one["net.moe.router.choose.bias"])
    torch.testing.assert_close(two["net.first.weight"], one["net.first.weight"], atol=1e-9, rtol=1e-9)


def test_checkpoint_of_two_processes_resumes_on_two_and_loads_in_one(tmp_path: Path) -> None:
    stochastic = [*TOY, "--model.net.dropout", "0.2", "--data.batch_size", "4", "--test_after_fit", "false", *TWO]
    moeapps(*stochastic, "--name", "whole", "--trainer.callbacks+=tests.toy_callbacks.KeepEpochs")
    whole = tmp_path / "runs" / "toy" / "whole" / "version_0"
    moeapps(*stochastic, "--name", "resumed", "--ckpt_path", str(whole / "checkpoints" / "epoch=0.ckpt"))
    resumed = tmp_path / "runs" / "toy" / "resumed" / "version_0"

    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(whole).items())
    moeapps("test", "--run", str(whole), "--trainer.devices", "1", "--trainer.strategy", "auto")
    assert (whole / "metrics" / "test.json").is_file()


def test_torchrun_starts_it_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "moeapps"]
    started(*command, *TOY, *TWO, "--trainer.max_epochs", "1")

    assert [p.name for p in (tmp_path / "runs" / "toy" / "base").iterdir()] == ["version_0"]


@pytest.mark.parametrize("base", BASES, ids=name)
def test_a_system_trains_and_tests_on_two_processes(tmp_path: Path, base: Path) -> None:
    moeapps("fit", *tiny(base), *TWO)

    rows = results(tmp_path / "runs" / base.stem / "base" / "version_0")["rows"]
    assert {row["role"] for row in rows} == {"seen", "validation", "unseen"}


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


@pytest.mark.slow
@pytest.mark.parametrize("reached", ["both, as a terminal does", "the first alone", "the second alone"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_two_processes_and_the_run_goes_on(
    tmp_path: Path, reached: str, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "moeapps", *TOY[:-2], *TWO, "--trainer.max_epochs", "10000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = tmp_path / "runs/toy/base/version_0"
    begin = partial(subprocess.Popen, command, env=environment, text=True, start_new_session=True, **pipes)
    # A shell starts what stands in its background deaf to Ctrl-C, and so what that starts.
    with begin(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        try:
            deadline = time.monotonic() + 300
            while not (run / "checkpoints/last.ckpt").is_file() and time.monotonic() < deadline:
                time.sleep(0.5)
            if reached == "both, as a terminal does":
                os.killpg(process.pid, number)
            else:
                os.kill(process.pid if reached == "the first alone" else children(process.pid)[0], number)
            told, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, told[-3000:]
    assert "Traceback" not in told, told[-3000:]

    saved = read_checkpoint(run / "checkpoints/interrupted.ckpt")
    states, step = saved["callbacks"]["RandomState"]["states"], saved["global_step"]
    assert len(states) == 2  # of both processes, so that each draws on
    moeapps("fit", "--run", str(run), *TWO, "--trainer.max_steps", str(step + 10))
    last = read_checkpoint(tmp_path / "runs/toy/base/version_1/checkpoints/last.ckpt")
    assert last["global_step"] == step + 10
