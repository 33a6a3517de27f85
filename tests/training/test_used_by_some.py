# SPDX-License-Identifier: Apache-2.0
"""Weights that one process uses and another does not: no process waits, and training is that of one (slow)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import moeapps
from tests.launched import Job, run_jobs

pytestmark = pytest.mark.slow

TOY = ["fit", "--config", "tests/toy.yaml", "--model.net", "tests.training.by_domain.HeadsNet", "--model.net.norm",
       "false", "--trainer.max_epochs", "1", "--model.schedule", "moeapps.training.optim.Constant",
       "--model.optimizer.weight_decay", "0.1", "--test_after_fit", "false", "--trainer.gradient_clip_val", "0.3",
       "--trainer.accelerator", "cpu"]  # fmt: skip
# Of two rows one is of each domain; of two rows out of three domains one or two are missing on both processes.
EACH = ["--data.seen", "[a, b]", "--data.mixing", "balanced", "--model.net.num_domains", "2"]
TWICE = [*EACH, "--trainer.accumulate_grad_batches", "2"]
WHOLE = ["--model.class_path", "tests.training.by_domain.WholeTask"]
CASES = {"each": EACH, "twice": TWICE, "missing": [], "whole": WHOLE}
WAIT = "--trainer.strategy.init_args.timeout=60"
OVERLAYS = {
    **{path: ["--config", f"configs/trainer/{path}.yaml", WAIT] for path in ("ep", "fsdp2", "ep_fsdp2")},
    "ddp": ["--config", "configs/trainer/ddp2.yaml"],
}
# Where FSDP2 averages, a weight that no process has used has a gradient of zeros, so that it decays: none is there.
PAIRS = [
    *((case, path) for case in ("each", "twice") for path in OVERLAYS),
    *(("missing", "ddp"), ("whole", "ddp"), ("whole", "ep")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: one process with two rows, two with one each."""
    folder = tmp_path_factory.mktemp("used_by_some")
    listed: list[Job] = [
        (1, [*TOY, *flags, "--data.batch_size", "2", "--name", f"{case}_one"]) for case, flags in CASES.items()
    ]
    for case, path in PAIRS:
        words = [*TOY, *OVERLAYS[path], "--trainer.accelerator", "cpu", *CASES[case], "--data.batch_size", "1"]
        listed.append((2, [*words, "--name", f"{case}_{path}"]))
    run_jobs(folder, listed, seconds=600)
    return folder


def weights(folder: Path, variant: str) -> dict[str, Tensor]:
    run = folder / "runs" / "toy" / variant / "version_0"
    return moeapps.load(run, checkpoint=run / "checkpoints" / "last.ckpt").task.net.state_dict()


@pytest.mark.parametrize(("case", "path"), PAIRS)
def test_weights_are_those_of_one_process_where_each_uses_its_own(folder: Path, case: str, path: str) -> None:
    found, wanted = weights(folder, f"{case}_{path}"), weights(folder, f"{case}_one")
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-4, msg=lambda text, k=key: f"{k}: {text}")
