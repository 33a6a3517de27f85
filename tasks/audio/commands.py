# SPDX-License-Identifier: Apache-2.0
"""The commands that audio systems add to ``moeapps``; what they do is imported when one runs."""

from __future__ import annotations

from moeapps.commands.tasks import TaskCommand

COMMANDS: tuple[TaskCommand, ...] = (
    TaskCommand(
        "sample",
        "draw clips of speech and music with a trained run",
        "tasks.audio.report.sample:main",
        data="tasks.audio.datamodule:AudioData",
        systems="systems that draw clips, such as configs/unimoe_audio.yaml",
        weights=True,
        options="tasks.audio.report.sample:parser",
    ),
)
