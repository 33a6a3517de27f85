# SPDX-License-Identifier: Apache-2.0
"""The toy with a head of its own for each domain, of which a batch uses those of its domains alone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.toy import ToyNet, ToyTask


class HeadsNet(ToyNet):
    """A matrix and a factor per domain: what ``fully_shard`` cuts, and what stays whole.

    Args:
        num_domains: domains that have a head; later ones borrow.
        options: those of `ToyNet`.
    """

    in_parts: ClassVar[bool] = True

    def __init__(self, num_domains: int = 3, **options: Any) -> None:
        super().__init__(**options)
        last = self.last
        self.last = None  # type: ignore[assignment]
        self.heads = nn.ModuleList(nn.Linear(last.in_features, last.out_features) for _ in range(num_domains))
        self.factors = nn.ParameterList(torch.ones(()) for _ in range(num_domains))

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        assert group is not None
        h = F.gelu(self.first(x))
        h = h + self.moe(h)
        own = group % len(self.heads)
        out = h.new_zeros(len(h), self.heads[0].out_features)
        for head in own.unique().tolist():
            rows = (own == head).nonzero().squeeze(1)
            out = out.index_add(0, rows, self.factors[head] * self.heads[head](h[rows]))
        return out


class WholeTask(ToyTask):
    """The toy, used between steps."""

    stays_whole: ClassVar[bool] = True
