# SPDX-License-Identifier: Apache-2.0
"""HoME, AW-MoE and Meta-DMoE on the core equal naive loops written from their equations; every system is short.

The naive functions are plain loops over rows and experts that know nothing of the core. Outputs and all gradients agree
in float64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeapps.moe import DenseRouting, MoELayer, NormalisedExperts
from tests.moe.shapes_common import SYSTEMS, assert_same, aw_moe, home, home_level, meta_dmoe, mlp, randomised, rows

# --- 4. HoME ---------------------------------------------------------------------------------------------------------


def normalised(bank: NormalisedExperts, e: int, x_ND: Tensor) -> Tensor:
    z = x_ND @ bank.weight[e]
    z = (z - z.mean(0)) / torch.sqrt(z.var(0, unbiased=False) + bank.eps)
    z = bank.gamma[e] * z + bank.beta[e]
    return z * torch.sigmoid(z)


def naive_gates(layer: MoELayer, router: int, g: int, x_Nd: Tensor, experts: list[int], kind: str) -> list[Tensor]:
    score = layer.router.routers[router].scores[g]
    logits = torch.stack([x_Nd @ score.weight[e] + score.bias[e] for e in experts], -1)
    weights = torch.sigmoid(logits) if kind == "sigmoid" else torch.softmax(logits, -1)
    return list(weights.unbind(-1))


def naive_home_level(
    layer: MoELayer, views: list[Tensor], gates: list[Tensor], sees: Tensor, owns: Tensor
) -> list[Tensor]:
    h = [normalised(layer.experts, e, view) for e, view in enumerate(views)]
    states = []
    for g, gate in enumerate(gates):
        seen, owned = sees[g].nonzero()[:, 0].tolist(), owns[g].nonzero()[:, 0].tolist()
        weights = naive_gates(layer, 0, g, gate, seen, "softmax")
        self_weights = naive_gates(layer, 1, g, gate, owned, "sigmoid" if len(owned) == 1 else "softmax")
        state = sum(w[:, None] * h[e] for w, e in zip(weights, seen, strict=True))
        states.append(state + sum(w[:, None] * h[e] for w, e in zip(self_weights, owned, strict=True)))
    return states


def test_home() -> None:
    # Two categories (inter, watch) and a shared group; tasks 0 and 1 are inter, task 2 is watch.
    category, expert_of = [0, 0, 1], [2, 2, 0, 1, 1]  # level-1 experts: 2 shared, 1 inter, 2 watch
    sees1 = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    owns1 = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    # Level-2 experts: shared, inter, watch, then one per task.
    sees2 = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1]], dtype=torch.bool)
    owns2 = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    meta = randomised(home_level(5, [5, 5, 5], 4, sees1, owns1))
    task = randomised(home_level(4, [8, 8, 8], 3, sees2, owns2))
    v = [rows(9, 5) for _ in range(3)]

    def naive() -> Tensor:
        z = naive_home_level(meta, [v[g] for g in expert_of], v, sees1, owns1)
        gates = [torch.cat([z[c], z[-1]], -1) for c in category]
        views = [z[-1], z[0], z[1], *(z[c] for c in category)]
        return torch.stack(naive_home_level(task, views, gates, sees2, owns2))

    leaves = [*v, *meta.parameters(), *task.parameters()]
    assert_same(lambda: home(v, meta, task, category, expert_of), naive, leaves)


# --- 5. AW-MoE -------------------------------------------------------------------------------------------------------


def naive_aw_moe(layer: MoELayer, x_ND: Tensor, history_NHd: Tensor, key_Nd: Tensor, mask_NH: Tensor) -> Tensor:
    score = layer.router.score
    outputs = []
    for n, x in enumerate(x_ND):
        g = score.prior
        for j in range(history_NHd.shape[1]):
            if mask_NH[n, j]:
                h, key = history_NHd[n, j], key_Nd[n]
                g = g + score.attention_unit(torch.cat([h, h * key, key])) * score.gate_unit(torch.cat([h, key]))
        outputs.append(sum(g[k] * mlp(layer.experts, k, x, F.relu) for k in range(len(g))))
    return torch.stack(outputs)


def test_aw_moe() -> None:
    layer = randomised(aw_moe(7, 4, 5))
    x, history, key = rows(6, 7), rows(6, 8, 5), rows(6, 5)
    mask = torch.rand(6, 8) < 0.6
    mask[2] = False  # a user without history is scored by the learned prior alone
    assert_same(
        lambda: layer(x, (history, key, mask)),
        lambda: naive_aw_moe(layer, x, history, key, mask),
        [x, history, key, *layer.parameters()],
    )


# --- 7. Meta-DMoE ----------------------------------------------------------------------------------------------------


class Aggregator(nn.Module):
    """Pre-norm attention over expert tokens and the mean of what is present."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, z_BED: Tensor, mask_BE: Tensor) -> Tensor:
        h = self.norm(z_BED)
        z = z_BED + self.attention(h, h, h, key_padding_mask=~mask_BE, need_weights=False)[0]
        return (z * mask_BE[..., None]).sum(1) / mask_BE.sum(1, keepdim=True)


def naive_meta_dmoe(specialists: list[nn.Module], aggregator: Aggregator, x_B: Tensor, group_B: Tensor) -> Tensor:
    outputs = []
    for x, group in zip(x_B, group_B.tolist(), strict=True):
        z = torch.stack([m(x[None])[0] for e, m in enumerate(specialists) if e != group])
        outputs.append(aggregator(z[None], torch.ones(1, len(z), dtype=torch.bool))[0])
    return torch.stack(outputs)


def test_meta_dmoe() -> None:
    specialists = [nn.Sequential(nn.Flatten(), nn.Linear(12, 4 + e), nn.Tanh(), nn.Linear(4 + e, 6)) for e in range(4)]
    layer, aggregator = randomised(meta_dmoe(specialists, 6)), randomised(Aggregator(6))
    x, group = rows(9, 3, 2, 2), torch.arange(9) % 5

    def fast() -> Tensor:
        z_BED, mask_BE = layer(x, group=group)
        return aggregator(z_BED, mask_BE)

    assert isinstance(layer.route(x, group=group), DenseRouting)
    assert not any(p.requires_grad for p in layer.parameters())
    leaves = [x, *aggregator.parameters()]
    assert_same(fast, lambda: naive_meta_dmoe(specialists, aggregator, x, group), leaves)


# --- all seven -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", SYSTEMS, ids=lambda f: f.__name__)
def test_every_system_is_short(function: Callable[..., object]) -> None:
    source = [line for line in inspect.getsource(function).splitlines() if line.strip()]
    assert len(source) <= 40
