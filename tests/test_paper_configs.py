# SPDX-License-Identifier: Apache-2.0
"""Every paper size trains: in a shrunken form, with its own precision, clipping, optimizer, schedule and averaging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from moeapps.commands.run import run
from tests.systems import CONFIGS, PAPERS, TINY, base_of, flags, name
from tests.tasks.image_diffusion.image_common import write_latent

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key"),  # a step without a validation
]

NET = "--model.init_args.net.init_args"


class FirstStep(L.Callback):
    """Keep the weights before the first step, and the gradients as the optimizer got them."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = {key: p.detach().clone() for key, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.gradients = {key: p.grad.clone() for key, p in pl_module.named_parameters() if p.grad is not None}


def words(**options: object) -> list[str]:
    return [word for key, value in options.items() for word in (f"{NET}.{key}", str(value))]


def latents(folder: Path) -> list[str]:
    """Latents of three classes in the folders that configs/data/latents.yaml names, of the size the paper has."""
    for domain in ("train", "other_for_choices", "other"):
        for k in range(30):
            write_latent(folder / domain / f"n{k % 3}" / f"{k}.npz", torch.randn(8, 32, 32), torch.randn(8, 32, 32))
    source = "--data.init_args.source.init_args"
    return [
        *flags(CONFIGS / "data" / "latents.yaml"),
        f"{source}.root",
        str(folder),
        "--data.init_args.batch_size",
        "4",
    ]


def small_images(folder: Path) -> list[str]:
    return [*latents(folder), *words(patch_size=8, dim=32, depth=2, num_heads=2)]


def small_scans(folder: Path) -> list[str]:
    sizes = {"enc_depths": [1] * 5, "dec_depths": [1] * 4, "enc_dims": [16] * 5, "dec_dims": [16] * 4, "patch_size": 64}
    return [*flags(CONFIGS / "debug" / "point_moe.yaml"), *words(**sizes)]


SMALL: dict[str, Callable[[Path], list[str]]] = {"promoe": small_images, "point_moe": small_scans}
"""How the paper sizes of a system become small: widths, depths and data, nothing else."""


def step(folder: Path, *config_flags: str, steps: int = 1) -> tuple[L.Trainer, FirstStep]:
    """Run optimizer steps of a configuration."""
    limits = ["--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0", "--test_after_fit", "false"]
    keep = ["--trainer.callbacks+", "tests.test_paper_configs.FirstStep"]
    done = run(["fit", *config_flags, *limits, *keep])
    return done.trainer, next(c for c in done.trainer.callbacks if type(c).__name__ == "FirstStep")


def check_step(trainer: L.Trainer, kept: FirstStep) -> None:
    """One step was taken, on gradients no longer than the clipping allows, and it moved what has a gradient."""
    assert trainer.global_step == 1
    norm = torch.stack([gradient.double().norm() for gradient in kept.gradients.values()]).norm().item()
    assert 0 < norm <= trainer.gradient_clip_val * (1 + 1e-4)
    after = dict(trainer.lightning_module.named_parameters())
    for key, gradient in kept.gradients.items():
        assert torch.isfinite(after[key]).all(), key
        if gradient.abs().max() > 1e-6:
            assert not torch.equal(after[key], kept.before[key]), key


@pytest.mark.parametrize("path", PAPERS, ids=name)
def test_paper_size_takes_a_real_step(path: Path, tmp_path: Path) -> None:
    base = base_of(path)
    config = [*flags(base, path, TINY), *SMALL[base.stem](tmp_path / "latents")]
    if "16-mixed" in path.read_text() and "bf16-mixed" not in path.read_text():
        config += ["--trainer.precision", "bf16-mixed"]  # a CPU has no float16 to train with

    trainer, kept = step(tmp_path, *config)

    assert isinstance(trainer.precision_plugin, MixedPrecision)
    check_step(trainer, kept)


def test_the_base_of_promoe_takes_a_real_step_in_bfloat16(tmp_path: Path) -> None:
    base = CONFIGS / "promoe.yaml"
    small = [*flags(base, TINY, CONFIGS / "debug" / "promoe.yaml"), "--trainer.precision", "bf16-mixed"]

    trainer, kept = step(tmp_path, *small)

    assert trainer.optimizers[0].param_groups[0]["fused"] is True
    check_step(trainer, kept)
