# SPDX-License-Identifier: Apache-2.0
"""The mixture layer of UVA-Computer-Vision-Lab/point_moe ``moe_layer.py``, point by point."""

from __future__ import annotations

from typing import Any

import torch
from official_common import furthest, part, scatter
from torch import Tensor

from moeapps.moe import MoERecorder
from moeapps.moe.objectives import switch_balance
from moeapps.moe.presets import point_moe

N, D, E, K = 40, 6, 5, 2


@part("Point-MoE layer and its optional balance loss")
def layer() -> float:
    """Softmax, the two largest divided by their sum, gated ReLU experts without biases; no capacity, no noise."""
    made = point_moe(num_experts=E, top_k=K, expansion=2.0)(D).double()
    scatter(made.parameters())
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    bank: Any = made.experts
    weight: Tensor = made.router.score.weight  # type: ignore[union-attr, assignment]
    rows, probs, share = [], [], torch.zeros(E, dtype=torch.float64)
    for n in range(N):
        p = torch.softmax(weight @ x[n], 0)
        best = p.topk(K).indices.tolist()
        total = sum(p[e] for e in best) + 1e-20
        y = torch.zeros(D, dtype=torch.float64)
        for e in best:
            gate, up = (x[n] @ bank.w_in[e]).chunk(2)
            y = y + p[e] / total * ((torch.relu(gate) * up) @ bank.w_out[e])
            share[e] += 1 / (N * K)
        rows.append(y)
        probs.append(p)
    with MoERecorder() as recorder:
        found = made(x)
    balance = E * (torch.stack(probs).mean(0) * share).sum()
    error = furthest(found, torch.stack(rows), [x, *made.parameters()])
    return max(error, furthest(switch_balance(recorder.records[0]), balance, [x, weight]))
