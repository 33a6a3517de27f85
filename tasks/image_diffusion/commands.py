# SPDX-License-Identifier: Apache-2.0
"""The commands that image systems add to ``moeapps``; what they do is imported when one runs."""

from __future__ import annotations

from moeapps.commands.tasks import TaskCommand

_DATA = "tasks.image_diffusion.datamodule:ImageData"
_SYSTEMS = "systems that draw images, such as configs/promoe.yaml"

COMMANDS: tuple[TaskCommand, ...] = (
    TaskCommand(
        "sample",
        "draw images with a trained run",
        "tasks.image_diffusion.report.sample:main",
        data=_DATA,
        systems=_SYSTEMS,
        weights=True,
    ),
    TaskCommand(
        "fid-stats",
        "statistics of images, for Fréchet distances",
        "tasks.image_diffusion.report.fid_stats:main",
        data=_DATA,
        systems=_SYSTEMS,
    ),
)
