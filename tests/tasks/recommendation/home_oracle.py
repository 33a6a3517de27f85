# SPDX-License-Identifier: Apache-2.0
"""HoME as a loop written from its equations, and a small network to compare with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeapps.moe import MoERecorder
from tasks.recommendation.model import home
from tasks.recommendation.nets.fast_gates import StackedGates
from tasks.recommendation.nets.feature_gates import FeatureGates
from tasks.recommendation.nets.levels import RankingNet

TASKS = ["click", "like", "view", "share", "stay"]
FACTS: dict[str, Any] = {"tasks": TASKS, "categories": ["act", "act", "watch", "act", "watch"]}
CATEGORY = [0, 0, 1, 0, 1]
DIM, WIDTH = 6, 4


def network(facts: dict[str, Any] = FACTS, **options: Any) -> RankingNet:
    """HoME in float64 with parameters far from their start."""
    sizes = {"meta_shared": 2, "meta_category": 2, "width": WIDTH, "tower_dim": 3, "feature_rank": 3}
    net = home(**{**sizes, **options})(DIM, facts).double()
    assert isinstance(net, RankingNet)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return net


def inputs(rows: int = 9) -> Tensor:
    return torch.randn(1, rows, DIM, dtype=torch.float64, requires_grad=True)


def routings(net: nn.Module, x: Tensor) -> list[Any]:
    with MoERecorder(net) as recorder:
        net(x)
    return [record.routing for record in recorder.records]


# --- docs/papers/home.md, equations 1 to 7, one row of the tables at a time ---


def feature_gate(gates: FeatureGates, v: int, x: Tensor) -> Tensor:
    share = torch.softmax(x @ gates.mix[v] + gates.mix_bias[v], -1)
    total = torch.zeros_like(x)
    for low in range(gates.num_gates):
        b = gates.down[v][:, low * gates.rank : (low + 1) * gates.rank]
        total = total + share[:, low : low + 1] * 2 * torch.sigmoid(x @ b @ gates.up[v, low])
    return x * total


def expert(bank: Any, e: int, x: Tensor) -> Tensor:
    z = x @ bank.weight[e]
    z = bank.gamma[e] * (z - z.mean(0)) / torch.sqrt(z.var(0, unbiased=False) + bank.eps) + bank.beta[e]
    return z * torch.sigmoid(z)


class GateReader:
    """Hands out rows of the stacked gates in the order of their columns: gate by gate, then self-gates."""

    def __init__(self, router: StackedGates) -> None:
        self.router, self.bias = router, iter(range(len(router.bias)))
        places = {}
        for s in range(router.index.shape[0]):
            for x, row in enumerate(router.index[s].tolist()):
                if row < len(router.weight):
                    places[s, x] = row
        slots = router.bias_index.view(router.num_slots, router.num_columns)
        self.row_of = {(s, int(router.bias_index[x])): row for (s, x), row in places.items()}
        assert slots.shape[1] >= router.num_gates

    def logits(self, states: list[tuple[int, Tensor]], experts: list[int]) -> Tensor:
        found = []
        for _ in experts:
            b = next(self.bias)
            found.append(sum(z @ self.router.weight[self.row_of[s, b]] for s, z in states) + self.router.bias[b])
        return torch.stack(found, -1)


def mix(weights: Tensor, outputs: list[Tensor]) -> Tensor:
    return sum(weights[:, i : i + 1] * h for i, h in enumerate(outputs))  # type: ignore[return-value]


def naive_home(net: RankingNet, x: Tensor, c_of: list[int], num_c: int, *, own: int = 1) -> Tensor:
    """HoME with 2 and 2 experts on level 1, 1, 1 and ``own`` on level 2."""
    meta, task = net.levels
    # Level 1: experts by category, then the shared ones.
    views = [feature_gate(meta.feature_gates, c, x) for c in range(num_c + 1)]
    h = {(g, i): expert(meta.moe.experts, 2 * g + i, views[g]) for g in range(num_c + 1) for i in range(2)}
    gates = GateReader(meta.moe.router)
    pairs = {g: [(g, 0), (g, 1), (num_c, 0), (num_c, 1)] for g in range(num_c)} | {num_c: list(h)}
    z = []
    for g in range(num_c + 1):
        z.append(mix(torch.softmax(gates.logits([(g, views[g])], pairs[g]), -1), [h[p] for p in pairs[g]]))  # type: ignore[arg-type]
    for g in range(num_c + 1):
        z[g] = z[g] + mix(torch.softmax(gates.logits([(g, views[g])], [0, 1]), -1), [h[g, 0], h[g, 1]])
    # Level 2: for each category its own expert and those of its tasks; last the shared one.
    order = [(c, t) for c in range(num_c) for t in (-1, *(t for t in range(len(c_of)) if c_of[t] == c))] + [(num_c, -1)]
    h2, e = {}, 0
    for v, (s, t) in enumerate(order):
        view = feature_gate(task.feature_gates, v, z[s])
        for i in range(own if t >= 0 else 1):
            h2[s, t, i] = expert(task.moe.experts, e, view)
            e += 1
    gates = GateReader(task.moe.router)
    seen = [[k for k in h2 if k[1] == t or (k[1] < 0 and k[0] in (c, num_c))] for t, c in enumerate(c_of)]
    states = [[(c, z[c]), (num_c, z[num_c])] for c in c_of]
    y = [mix(torch.softmax(gates.logits(s, k), -1), [h2[i] for i in k]) for s, k in zip(states, seen, strict=True)]  # type: ignore[arg-type]
    logits = []
    for t, c in enumerate(c_of):
        a = gates.logits(states[t], [0] * own)
        y[t] = y[t] + mix(torch.sigmoid(a) if own == 1 else torch.softmax(a, -1), [h2[c, t, i] for i in range(own)])
        tower = net.towers
        hidden = torch.relu(y[t] @ tower.w_in[t] + tower.b_in[t])
        logits.append((hidden @ tower.w_out[t])[:, 0] + tower.b_out[t])
    return torch.stack(logits, -1)
