# SPDX-License-Identifier: Apache-2.0
"""Twenty losses of the three systems with spread experts are those of one process (slow: starts processes).

Each process has half of a batch; the forms that allow this are in tests/training/decomposable.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launched import Job, run_jobs
from tests.systems import CONFIGS, name, tiny

pytestmark = pytest.mark.slow

STEPS = 20
WHOLE, CUT = "whole", "cut"
NET = "model.init_args.net.init_args"
# The task that one process trains, the one that two do, and what else must be off: what is drawn for a step or for a
# place in a batch (orders of curves, cuts of clips), and losses on the routing of a whole batch.
FORMS: dict[str, tuple[str, str, list[str]]] = {
    "point_moe": (
        *("PointsByRow", "CutPoints"),
        ["model.init_args.lovasz_weight=0", f"{NET}.drop_path=0", f"{NET}.orders=[z]", "data.init_args.max_voxels=150"],
    ),
    "promoe": (
        *("ImagesOfFixedNoise", "ImagesOfFixedNoise"),
        [f"{NET}.label_dropout=0", "model.init_args.aux_losses=[]"],
    ),
    "unimoe_audio": (
        *("tasks.audio.module.AudioTask", "CutClips"),
        [f"{NET}.prompt_dropout=0", f"{NET}.moe.init_args.jitter=0", "model.init_args.aux_losses=[]",
         "data.init_args.max_frames=1000", "data.init_args.label_dropout=0"],
    ),
}  # fmt: skip
BATCH = {"point_moe": 3, "promoe": 4, "unimoe_audio": 3}  # of each of two processes
SYSTEMS = [CONFIGS / f"{system}.yaml" for system in FORMS]
OVERLAYS = ["ep", "ep_fsdp2"]


def words(base: Path, form: str, batch: int) -> list[str]:
    """Twenty steps, two in each epoch; evaluation is another test's."""
    off = [f"--{option}" for option in FORMS[base.stem][2]]
    path = form if "." in form else f"tests.training.decomposable.{form}"
    return ["fit", *tiny(base), "--model.class_path", path, *off,
            "--model.init_args.schedule=moeapps.training.optim.Constant", "--data.init_args.batch_size", str(batch),
            "--trainer.callbacks", "tests.training.decomposable.KeepLosses", "--trainer.max_epochs", str(STEPS // 2),
            "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0", "--test_after_fit", "false",
            ]  # fmt: skip


def jobs(folder: Path, base: Path) -> list[Job]:
    alone, cut, _ = FORMS[base.stem]
    batch = BATCH[base.stem]
    both = words(base, cut, batch)
    spread = {path: ["--config", f"configs/trainer/{path}.yaml"] for path in OVERLAYS}
    half = ["--trainer.max_epochs", str(STEPS // 4), "--name", "half"]
    resumed = ["fit", "--run", str(folder / "runs" / base.stem / "half"), "--name", "resumed"]
    return [
        (1, [*words(base, alone, 2 * batch), "--name", "one"]),
        *((2, [*both, *spread[path], "--name", path]) for path in OVERLAYS),
        (2, [*both, *spread["ep"], *half]),
        (2, [*resumed, "--trainer.max_epochs", str(STEPS // 2)]),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs."""
    folder = tmp_path_factory.mktemp("losses_of_two")
    listed = [job for base in SYSTEMS for job in jobs(folder, base)]
    run_jobs(folder, sorted(listed, key=lambda job: job[0]), seconds=1800)
    return folder


def losses(folder: Path, system: str, variant: str, ranks: int) -> dict[int, float]:
    """Loss of each step, the mean over processes."""
    run = folder / "runs" / system / variant / "version_0"
    told = [json.loads((run / f"losses.{rank}.json").read_text()) for rank in range(ranks)]
    assert len({tuple(found) for found in told}) == 1
    return {int(step): sum(found[step] for found in told) / ranks for step in told[0]}


@pytest.mark.parametrize("variant", OVERLAYS)
@pytest.mark.parametrize("base", SYSTEMS, ids=name)
def test_twenty_losses_are_those_of_one_process(folder: Path, base: Path, variant: str) -> None:
    wanted, found = losses(folder, base.stem, "one", 1), losses(folder, base.stem, variant, 2)

    assert list(found) == list(wanted) == list(range(1, STEPS + 1))
    assert len({round(value, 4) for value in wanted.values()}) > STEPS / 2  # it learns
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, abs=1e-4, rel=1e-4), f"step {step}"


@pytest.mark.parametrize("base", SYSTEMS, ids=name)
def test_losses_of_a_resumed_training_are_those_of_the_whole(folder: Path, base: Path) -> None:
    wanted, found = losses(folder, base.stem, "ep", 2), losses(folder, base.stem, "resumed", 2)

    assert list(found) == list(range(STEPS // 2 + 1, STEPS + 1))
    assert found == {step: wanted[step] for step in found}
