# SPDX-License-Identifier: Apache-2.0
"""Pictures of the validation in TensorBoard while a system trains."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from moeapps.moe.ranks import alone
from moeapps.training.callbacks.side import SideReport
from moeapps.training.shown import Sound
from moeapps.training.task import BaseTask


class EpochPictures(SideReport):
    """Show in TensorBoard what a task makes of one validation batch of each domain, at every validation of a training.

    What is shown is the task's own (`Shown.pictures`); without TensorBoard nothing is drawn, and ``--pictures false``
    leaves it out.

    Args:
        most_domains: domains that are shown, the seen ones first.

    Raises:
        ValueError: ``most_domains`` is below 1.
    """

    def __init__(self, most_domains: int = 4) -> None:
        if most_domains < 1:
            raise ValueError(f"most_domains={most_domains} shows nothing; use 1 or more, or --pictures false")
        self.most_domains = most_domains

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        training = trainer.state.fn == "fit" and not trainer.sanity_checking and not getattr(trainer, "fast_dev_run", 0)
        if batch_idx or dataloader_idx >= self.most_domains or not training or not boards or not trainer.is_global_zero:
            return
        task = cast(BaseTask, pl_module)
        domain = str(task.last_domain)
        with isolate_rng(), alone():  # the other processes draw nothing, and must not be waited for
            shown = task.pictures(batch, domain)
        for name, picture in shown.items():
            for board in boards:
                _add(board.experiment, f"{name}/{domain}", picture, trainer.global_step)


def _add(writer: Any, tag: str, picture: Any, step: int) -> None:
    """Add one picture to a TensorBoard writer, by what it is.

    Raises:
        TypeError: it is none of the kinds.
    """
    from matplotlib.figure import Figure

    if isinstance(picture, Figure):
        writer.add_figure(tag, picture, step, close=False)
    elif isinstance(picture, Sound):
        writer.add_audio(tag, picture.wave.clamp(-1, 1).unsqueeze(0), step, sample_rate=picture.sample_rate)
    elif isinstance(picture, Tensor) and picture.dim() == 3:
        writer.add_image(tag, picture, step)
    else:
        raise TypeError(
            f"picture {tag!r} is a {type(picture).__name__}; give a matplotlib figure, an image [C, H, W] or a Sound"
        )
