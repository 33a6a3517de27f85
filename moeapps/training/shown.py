# SPDX-License-Identifier: Apache-2.0
"""What a task shows people: pictures while it trains, and the numbers beside its scores that its users come for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor


class Sound(NamedTuple):
    """A clip: float32 [n] in [-1, 1], and samples per second."""

    wave: Tensor
    sample_rate: int


Pictures = Mapping[str, Any]
"""Name -> a matplotlib figure, an image [C, H, W] (uint8, or float in [0, 1]), or a `Sound`."""


class Shown:
    """The part of a task that `EpochPictures` and `EndTable` ask for; a subclass overrides what it has.

    Attributes:
        headlines: group and number in the summary of metrics/test.json, as ``partition/ari`` -> what it says in a few
            words, for the end table.
    """

    headlines: ClassVar[Mapping[str, str]] = {}

    def pictures(self, batch: Any, domain: str) -> Pictures:
        """Return small pictures of a validation batch, the first one of its domain; by default none.

        ``last_answer`` gives what ``predict_step`` would of the batch, where the task's step offers it. Random numbers
        drawn here leave those of the training alone.
        """
        return {}
