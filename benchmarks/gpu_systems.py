# SPDX-License-Identifier: Apache-2.0
"""Training steps for `benchmarks.gpu`: the command of a user, in bfloat16, with the time and memory of each step."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import lightning as L
import numpy as np
import torch
from typing_extensions import override

from benchmarks.gpu_device import Device, Report, verdict
from moeapps.commands.run import run
from moeapps.training.task import BaseTask

NET = "--model.init_args.net.init_args"
LATENTS = {"train": 320, "other_for_choices": 16, "other": 16}
"""Files of the domains that configs/data/latents.yaml names; the first holds more than a batch of the paper."""

SIZES: dict[str, tuple[str, list[str]]] = {
    "point_moe": (
        "Point-MoE-S, a batch of 16 generated scans",
        ["--config", "configs/paper/point_moe_s.yaml", "--data.init_args.train_scenes", "8"],
    ),
    "promoe": (
        "ProMoE-S, 256 latents of noise",
        ["--config", "configs/paper/promoe_s.yaml", "--config", "configs/data/latents.yaml"],
    ),
    "unimoe_audio": (
        "four of the 36 layers of UniMoE-Audio, the one size of its paper, on generated clips",
        [f"{NET}.dim", "2048", f"{NET}.num_heads", "16", f"{NET}.num_kv_heads", "2",
         f"{NET}.moe.init_args.expansion", "1.34375", f"{NET}.moe.init_args.shared_expansion", "0.671875"],
    ),
}  # fmt: skip
"""What is measured, and the flags that make it; systems that are not here have no published size that we know."""


class Steps(L.Callback):
    """Seconds of each training step, without its data, its loss, and the tokens of a batch."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens = 0

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.device.wait()
        self.begun = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.device.wait()
        self.seconds.append(time.perf_counter() - self.begun)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            self.losses.append(float(loss))
        self.tokens = cast(BaseTask, pl_module).num_tokens(batch)


def steps(device: Device, system: str) -> Report:
    """A few steps of a paper's small size, or of the base config where none is published."""
    what, flags = SIZES.get(system, ("the network of the base config: no size is published that we know", []))
    if device.small:
        what, flags = "the tiny form", ["--config", "configs/debug/tiny.yaml"]
        own = f"configs/debug/{system}.yaml"
        flags += ["--config", own] if Path(own).is_file() else []
    count = device.size(8, 2)
    kept = Steps(device)
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, MOEAPPS_RUNS=folder, MPLBACKEND="Agg"):
        words = ["fit", "--config", f"configs/{system}.yaml", *flags, *options(device, count)]
        if "configs/data/latents.yaml" in words:
            write_latents(Path(folder) / "latents")
            words += ["--data.init_args.source.init_args.root", str(Path(folder) / "latents")]
        with patch.object(L.Trainer, "fit", watched(L.Trainer.fit, kept)):
            done = run(words)
    warm = kept.seconds[count // 2 :]
    report = {
        **{"what": what, "steps": len(kept.seconds), "parameters": sum(p.numel() for p in done.model.parameters())},
        **{"first_step_s": round(kept.seconds[0], 4), "step_s": round(statistics.median(warm), 4)},
        **{"tokens": kept.tokens, "losses": [round(loss, 5) for loss in kept.losses]},
        "peak_bytes": None if device.small else int(torch.cuda.max_memory_allocated()),
    }
    return verdict(report, None if np.isfinite(kept.losses).all() else "a loss is not finite")


def options(device: Device, count: int) -> list[str]:
    """So many training steps in bfloat16 and nothing else."""
    told = {
        **{"accelerator": device.name, "devices": 1, "precision": "bf16-mixed", "max_epochs": -1, "max_steps": count},
        **{"limit_train_batches": 1.0, "limit_val_batches": 0, "num_sanity_val_steps": 0, "callbacks": "null"},
        **{"enable_progress_bar": "false", "logger": "false"},
    }
    words = [word for name, value in told.items() for word in (f"--trainer.{name}", str(value))]
    return [*words, "--test_after_fit", "false"]


def watched(fit: Any, callback: L.Callback) -> Any:
    """`Trainer.fit` with one callback more, which no config can name: it holds what it is asked for."""

    def fit_watched(trainer: L.Trainer, *args: Any, **options: Any) -> Any:
        trainer.callbacks.append(callback)  # type: ignore[attr-defined]
        return fit(trainer, *args, **options)

    return fit_watched


def write_latents(root: Path) -> None:
    """Latents of noise in ten classes, 4 x 32 x 32, as ProMoE's own code stores them."""
    random = np.random.default_rng(0)
    for domain, count in LATENTS.items():
        for i in range(count):
            path = root / domain / f"n{i % 10}" / f"{i}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, latent=random.standard_normal((8, 32, 32), dtype=np.float32))
