# SPDX-License-Identifier: Apache-2.0
"""Small lists, and AW-MoE once more: in float64, pair by pair, as its equations read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tasks.recommendation.data.lists import Lists
from tasks.recommendation.model import ListRanker

ITEMS, CATEGORIES, GROUPS = 40, 5, 4
FACTS: dict[str, Any] = {
    "domains": {"seen": ["s"], "validation": [], "unseen": []},
    "item_fields": {"item": ITEMS, "category": CATEGORIES},
    "query_fields": {"category": CATEGORIES},
    "profile_fields": {"group": GROUPS},
    "history": 6,
    "candidates": 4,
    "factors": ["sweet", "salty"],
}


def make_lists(lists: int = 8, places: int = 6, candidates: int = 4, seed: int = 0) -> Lists:
    """Random ragged lists, one positive each: the first without a history, the second with one past item."""
    g = torch.Generator().manual_seed(seed)

    def ids(size: int, *shape: int) -> Tensor:
        return torch.randint(1, size, shape, generator=g)

    length = torch.randint(2, places + 1, (lists,), generator=g)
    length[:2] = torch.tensor([0, 1])[:lists]
    mask = torch.arange(places) < length[:, None]
    history = torch.stack([ids(ITEMS, lists, places), ids(CATEGORIES, lists, places)], -1).where(mask[..., None], 0)
    shown = torch.stack([ids(ITEMS, lists, candidates), ids(CATEGORIES, lists, candidates)], -1)
    label = torch.zeros(lists, candidates)
    label[torch.arange(lists), torch.randint(0, candidates, (lists,), generator=g)] = 1
    return Lists(
        history=history,
        history_mask=mask,
        history_item=history[..., 0].where(mask, -1),
        candidates=shown,
        candidate_mask=torch.ones(lists, candidates, dtype=torch.bool),
        candidate_item=shown[..., 0],
        label=label,
        query=ids(CATEGORIES, lists, 1),
        profile=ids(GROUPS, lists, 1),
        user=torch.arange(lists) // 2,
        row=torch.arange(lists),
        factor=torch.arange(lists) % 2,
    )


def randomised(net: nn.Module, seed: int = 1) -> nn.Module:
    """Give every parameter a value of its own, priors and biases included."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=g))
    return net


def _mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Linear layers with ReLU between them."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for k, layer in enumerate(linear):
        x = layer.weight.double() @ x + layer.bias.double()
        x = x.clamp(min=0) if k + 1 < len(linear) else x
    return x


def _embedded(table: Any, sizes: dict[str, int], ids: Tensor) -> Tensor:
    starts = [sum(list(sizes.values())[:k]) for k in range(len(sizes))]
    return torch.cat([table.table.weight.double()[start + int(i)] for start, i in zip(starts, ids, strict=True)])


def naive_gate(score: Any, past: list[Tensor], key: Tensor, root: bool) -> Tensor:
    """g = g_0 + sum over past items of attention times gate vector, divided by the root of their number."""
    g = score.prior.double()
    for h in past:
        a = _mlp(score.attention_unit, torch.cat([h, h * key, key]))
        g = g + a * _mlp(score.gate_unit, torch.cat([h, key])) / (len(past) ** 0.5 if root else 1)
    return g


def naive_logits(net: ListRanker, batch: Lists, key: str, *, root: bool = True) -> tuple[Tensor, Tensor]:
    """Logits [B, N] and gates [B, N, K] of a `ListRanker` with an AW-MoE bank of scores."""
    encoder, experts = net.encoder, net.moe.experts
    logits, gates = torch.zeros(batch.label.shape).double(), []
    for b in range(len(batch)):

        def item(ids: Tensor) -> Tensor:
            return _mlp(encoder.item_net, _embedded(encoder.item_table, encoder.items, ids))

        past = [item(batch.history[b, j]) for j in range(batch.history.shape[1]) if batch.history_mask[b, j]]
        query = _mlp(encoder.query_net, _embedded(encoder.query_table, encoder.queries, batch.query[b]))
        profile = _embedded(encoder.profile_table, encoder.profiles, batch.profile[b])
        for n in range(batch.label.shape[1]):
            target = item(batch.candidates[b, n])
            v = torch.zeros_like(target)
            for h in past:
                v = v + _mlp(net.interest.unit, torch.cat([h, h * target, target])) * h / len(past) ** 0.5
            x = torch.cat([v, target, query, profile])
            g = naive_gate(net.moe.router.score, past, {"target": target, "query": query}.get(key, 0 * target), root)
            for k in range(experts.num_experts):
                hidden = (x @ experts.w_in[k].double() + experts.b_in[k].double()).clamp(min=0)
                logits[b, n] += g[k] * (hidden @ experts.w_out[k].double() + experts.b_out[k].double())[0]
            gates.append(g)
    return logits, torch.stack(gates).unflatten(0, batch.label.shape)
