# SPDX-License-Identifier: Apache-2.0
"""Bits per code, by codebook: what a network that predicts codes is scored by.

Shape legend: B clips, L steps, K codebooks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from tasks.audio.nets.language_model import IGNORED


def code_bits(nats_BLK: Tensor, target_BLK: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Bits of the real codes of each clip and how many there are; an end is predicted, but is no code.

    Args:
        nats_BLK: negative log-likelihoods in nats.
        target_BLK: int64 [B, L, K].
        num_codes: V; symbols from V on are no codes.

    Returns:
        Two float64 [B, K]: bits, and numbers of codes.
    """
    real = (target_BLK != IGNORED) & (target_BLK < num_codes)
    bits = torch.where(real, nats_BLK.double() / math.log(2), 0.0).sum(1)
    return bits, real.sum(1).double()


def unit_parts(index_B: Tensor, bits_BK: Tensor, counts_BK: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each clip adds to ``bits`` and ``bits_<book>``, see `moeapps.evaluation.units`; for intervals over clips."""
    parts = torch.stack([bits_BK, counts_BK, counts_BK], dim=-1)  # [B, K, 3]
    books = {f"bits_{book}": (index_B, parts[:, book : book + 1]) for book in range(parts.shape[1])}
    return {"bits": (index_B, parts), **books}


class CodeBits(Metric):
    """Bits per code pooled over all codes: ``bits_<book>`` of each codebook, and ``bits``, the mean over the books.

    Log2 V (8 for 256 codes) knows nothing; lower is better.

    Args:
        num_codebooks: K.

    Attributes:
        scorable: after `compute`, clips with a code.
    """

    full_state_update = False
    higher_is_better = False
    bits: Tensor
    counts: Tensor
    clips: Tensor

    def __init__(self, num_codebooks: int) -> None:
        super().__init__()
        self.scorable = 0
        self.larger_is_better = dict.fromkeys(["bits", *(f"bits_{book}" for book in range(num_codebooks))], False)
        self.add_state("bits", torch.zeros(num_codebooks, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_codebooks, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("clips", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, bits_BK: Tensor, counts_BK: Tensor) -> None:
        """Add clips: bits of their codes and numbers of codes."""
        self.bits += bits_BK.detach().sum(0)
        self.counts += counts_BK.sum(0)
        self.clips += (counts_BK > 0).any(1).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the scores; not a number without codes."""
        per_book = self.bits / self.counts
        self.scorable = int(self.clips)  # now, while the counts are those of all processes
        return {"bits": per_book.mean(), **{f"bits_{book}": value for book, value in enumerate(per_book.unbind())}}


def audio_metrics(num_codebooks: int) -> MetricCollection:
    """Metrics of one domain."""
    return MetricCollection({"codes": CodeBits(num_codebooks)})
