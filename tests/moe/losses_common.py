# SPDX-License-Identifier: Apache-2.0
"""Records of layers written out by hand, and logits for them, for the tests of the auxiliary losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeapps.moe.record import Record
from moeapps.moe.routers.chooser import Chooser
from moeapps.moe.routing import Routing

E, K, N = 4, 2, 48


class Holder(nn.Module):
    """What a loss needs of a layer: a router with a chooser."""

    def __init__(self, choose: nn.Module) -> None:
        super().__init__()
        self.router = nn.Module()
        self.router.choose = choose


def record_of(choose: Chooser, logits_NX: Tensor, *, mask: Tensor | None = None, group: Tensor | None = None) -> Record:
    """The record of a chooser applied to logits."""
    choose.bind(logits_NX.shape[1])
    return Record("moe", choose(logits_NX, token_mask=mask), Holder(choose), mask, group)


def topk_record(
    logits_NE: Tensor, k: int, *, mask: Tensor | None = None, group: Tensor | None = None, name: str = "moe"
) -> Record:
    """The record of a softmax top-k router written out here, so that most of these tests need no router."""
    rows, experts = logits_NE.shape
    probs_NE = logits_NE.softmax(-1)
    weight_NK, expert_NK = probs_NE.topk(k, -1)
    if mask is not None:
        expert_NK = torch.where(mask[:, None], expert_NK, experts)
        weight_NK = weight_NK * mask[:, None]
    row_M = torch.arange(rows).repeat_interleave(k)
    ids_M, weight_M = expert_NK.flatten(), weight_NK.flatten()
    routing = Routing(row_M, ids_M, weight_M, rows, experts, top_k=k, logits_NE=logits_NE, probs_NE=probs_NE)
    return Record(name, routing, nn.Identity(), mask, group)


def logits(n: int = N, e: int = E, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, e, generator=generator, dtype=torch.float64)).requires_grad_()


def cyclic_record(k: int, sharp: float, dtype: torch.dtype = torch.float64) -> Record:
    """Row n prefers experts n, n+1, ... n+k-1 (mod E): load and mean probability are both uniform."""
    base = torch.zeros(E, dtype=dtype)
    base[:k] = torch.arange(k, 0, -1, dtype=dtype) * sharp
    return topk_record(torch.stack([base.roll(n) for n in range(N)]), k)
