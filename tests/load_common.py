# SPDX-License-Identifier: Apache-2.0
"""Runs without training: the folder that a fit would leave, with weights that are drawn and moved off their start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moeapps.commands.run import Cli, import_tasks, quiet
from tests.systems import CONFIGS, tiny


def make_run(system: str, folder: Path, *overlays: Path) -> Any:
    """Write config and checkpoint of a system into a folder and return its objects (``model``, ``datamodule``)."""
    quiet()
    words = tiny(CONFIGS / f"{system}.yaml", *overlays)
    import_tasks(words)
    built = Cli([*words, "--trainer.logger", "false"], run=False)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in built.model.parameters():  # a last layer of zeros would hide what comes before it
            parameter.add_(0.05 * torch.randn_like(parameter))
    (folder / "checkpoints").mkdir(parents=True)
    built.parser.save(built.config, folder / "config.yaml", skip_none=False, overwrite=True)
    torch.save({"state_dict": built.model.state_dict()}, folder / "checkpoints" / "best.ckpt")
    attach(built.model, built.datamodule, built.trainer)
    return built


def attach(model: Any, data: Any, trainer: Any) -> None:
    """Let a task find its data, as `trainer.predict` would."""
    trainer.datamodule, model.trainer = data, trainer
    model.eval()
