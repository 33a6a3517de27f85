# SPDX-License-Identifier: Apache-2.0
"""Popularity: rank candidates by how often each was taken in training, whoever asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeapps.moe.ranks import sum_over_ranks
from tasks.recommendation.data.lists import Lists
from tasks.recommendation.nets.list_banks import ListScores


class Popularity(nn.Module):
    """Count what was taken; a scale and a shift make the logarithm of the count a logit.

    Every training step counts its positives, so that further epochs multiply all counts alike and change no order. An
    item that was never taken, and an unknown one, has the count 0.

    Args:
        facts: ``item_fields``, the first of which is the item itself.

    Raises:
        ValueError: ``facts`` names no field of an item.
    """

    counts: Tensor

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__()
        fields = dict(facts.get("item_fields", {}))
        if not fields:
            raise ValueError("facts names no item_fields; give the facts of ListData")
        self.register_buffer("counts", torch.zeros(next(iter(fields.values())), dtype=torch.int64))
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, batch: Lists, *, history_mask: Tensor | None = None) -> ListScores:
        """Scores by the counts so far; while training, then count this batch."""
        item_BN = batch.candidates[..., 0]
        count_BN = self.counts[item_BN].where(item_BN > 0, 0)
        if self.training:
            taken = item_BN[(batch.label > 0) & batch.candidate_mask]
            self.counts += sum_over_ranks(torch.bincount(taken, minlength=len(self.counts)))
        return ListScores(self.scale.abs() * torch.log1p(count_BN.float()) + self.shift)
