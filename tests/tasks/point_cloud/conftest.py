# SPDX-License-Identifier: Apache-2.0
"""Small scans and mixtures for the tests of the point-cloud networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from moeapps.moe import Routing, record_call
from tasks.point_cloud.data.dataset import Scan


class NaiveMoE(nn.Module):
    """Every expert on every row: top-k of a softmax, renormalised, gated ReLU experts.

    Source: docs/papers/point_moe.md, equations 1 and 2.
    """

    def __init__(self, dim: int, num_experts: int = 4, top_k: int = 2, expansion: float = 1.0) -> None:
        super().__init__()
        hidden = int(expansion * dim)
        self.top_k = top_k
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.gate = nn.Parameter(torch.randn(num_experts, dim, hidden) / dim**0.5)
        self.up = nn.Parameter(torch.randn(num_experts, dim, hidden) / dim**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, dim) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        probs = logits.softmax(-1)
        chosen, index = probs.topk(self.top_k)
        rows = torch.arange(len(x)).repeat_interleave(self.top_k)
        record_call(
            self,
            Routing(
                rows, index.flatten(), chosen.flatten(), len(x), probs.shape[1], top_k=self.top_k, logits_NE=logits
            ),
        )
        weight = torch.zeros_like(probs).scatter(1, index, chosen / chosen.sum(-1, keepdim=True))
        hidden = torch.einsum("nd,edh->neh", x, self.gate).relu() * torch.einsum("nd,edh->neh", x, self.up)
        return torch.einsum("neh,ehd,ne->nd", hidden, self.down, weight)


def _scan(num: int, *, side: int = 12, domain: int = 0, num_classes: int = 3, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    cell = torch.randperm(side**3, generator=generator)[:num]
    grid = torch.stack([cell // side**2, cell // side % side, cell % side], dim=1)
    grid = grid - grid.amin(dim=0)
    inverse = torch.randint(num, (3 * num,), generator=generator)
    y = grid[:, 2] % num_classes
    return Scan(
        grid=grid,
        pos=grid.float() * 0.1,
        x=torch.randn(num, 6, generator=generator),
        y=y,
        domain=torch.tensor([domain]),
        raw_y=y[inverse],
        inverse=inverse,
        name=f"scan-{seed}",
        num_nodes=num,
    )


@pytest.fixture
def make_scan() -> Callable[..., Data]:
    """Build one scan: ``make_scan(num, side=12, domain=0, num_classes=3, seed=0)``."""
    return _scan


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Build a batch of scans of the given sizes: ``make_batch([5, 9], ...)``; scan i has seed i."""

    def build(sizes: Sequence[int], **options: int) -> Batch:
        return Batch.from_data_list([_scan(num, seed=i, **options) for i, num in enumerate(sizes)])

    return build


@pytest.fixture
def naive_moe() -> type[NaiveMoE]:
    """Every-expert reference mixture, a layer factory."""
    return NaiveMoE
