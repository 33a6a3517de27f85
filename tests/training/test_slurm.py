# SPDX-License-Identifier: Apache-2.0
"""Under SLURM, as far as its variables and signals are SLURM: places of processes, and a job that is requeued."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeapps.training.checkpoints import read_checkpoint

TOY = ["fit", "--config", "tests/toy.yaml", "--config", "configs/trainer/slurm.yaml", "--trainer.accelerator", "cpu",
       "--model.net.dropout", "0", "--model.net.norm", "false", "--trainer.max_epochs", "2"]  # fmt: skip


def job(rank: int = 0, ranks: int = 1, number: int = 4711) -> dict[str, str]:
    """What srun tells a process of one machine."""
    told = {"JOB_ID": number, "NTASKS": ranks, "NTASKS_PER_NODE": ranks, "NNODES": 1}
    told |= {"NODEID": 0, "PROCID": rank, "LOCALID": rank}
    names = {"SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
    return {**{f"SLURM_{name}": str(value) for name, value in told.items()}, **names}


def begin(words: list[str], told: dict[str, str]) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **told}
    return subprocess.Popen([sys.executable, "-m", "moeapps", *words], env=environment, text=True, **pipes)


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        printed, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, printed[-3000:]
    return printed


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.slow
def test_two_processes_of_srun_are_one_training(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = {"MASTER_PORT": str(found.getsockname()[1])}
    words = [*TOY, "--trainer.devices", "2", "--data.batch_size", "4"]
    both = [begin(words, {**job(rank, 2), **port}) for rank in range(2)]
    for process in both:
        ended(process)
    ended(begin([*TOY, "--name", "one", "--data.batch_size", "8"], {}))

    runs = tmp_path / "runs" / "toy"
    assert [path.name for path in (runs / "base").iterdir()] == ["version_0"]
    for key, value in weights(runs / "one" / "version_0").items():
        torch.testing.assert_close(weights(runs / "base" / "version_0")[key], value, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.slow
def test_numbers_that_do_not_agree_are_told() -> None:
    printed = ended(begin([*TOY, "--trainer.devices", "2"], job(0, 1)), code=2)

    assert "devices=2" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_requeued_job_goes_on_where_it_was_and_another_one_does_not(tmp_path: Path) -> None:
    """`scontrol` ends the job, which SLURM begins again with the same words and number."""
    control = tmp_path / "bin" / "scontrol"
    control.parent.mkdir()
    control.write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "asked"}\nkill -TERM $PPID\n')
    control.chmod(0o755)
    path = {"PATH": f"{control.parent}:{os.environ['PATH']}"}
    words = [*TOY, "--data.batch_size", "8", "--trainer.callbacks+=tests.toy_callbacks.SendSigusr1"]
    ended(begin([*words, "--name", "whole"], {}))
    ended(begin(words, {**job(), **path}), code=143)
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert "hpc_ckpt_1.ckpt" in ended(begin(words, {**job(), **path}))
    assert "hpc_ckpt" not in ended(begin([*words, "--trainer.max_steps", "1"], {**job(number=4712), **path}))

    whole = weights(tmp_path / "runs" / "toy" / "whole" / "version_0")
    found = weights(tmp_path / "runs" / "toy" / "base" / "version_1")
    assert all(torch.equal(value, found[key]) for key, value in whole.items())
