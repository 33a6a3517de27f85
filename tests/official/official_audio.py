# SPDX-License-Identifier: Apache-2.0
"""The mixture block of HITsz-TMG/Uni-MoE ``UniMoE-Audio/utils/UniMoE_Audio_core.py``, token by token in plain numbers.

Noise is an argument here: the fresh Gumbel numbers and uniform ones of every draw, so that both sides use the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from official_common import furthest, part, scatter
from torch import Tensor

from moeapps.moe import MoELayer, MoERecorder
from moeapps.moe.objectives import chosen_balance
from moeapps.moe.presets import unimoe_audio

REAL, NULL, SHARED, P, EPS = 5, 2, 2, 0.7, 0.01
COLUMNS = REAL + NULL
N, D = 40, 6


def block(**options: Any) -> tuple[MoELayer, Tensor]:
    made = unimoe_audio(
        num_experts=REAL, num_null=NULL, num_shared=SHARED, top_p=P, weighing="sparse_mixer", jitter=0.0, **options
    )(D).double()
    scatter(made.parameters())
    x = torch.randn(N, D, dtype=torch.float64)
    with torch.no_grad():  # pairs of columns lie close, so that draws have something to draw between
        made.router.score.weight[1] = made.router.score.weight[0] * 1.01  # type: ignore[union-attr, index, operator]
        made.router.score.weight[COLUMNS - 1] = made.router.score.weight[2] * 0.995  # type: ignore[union-attr, index, operator]
    return made, x.requires_grad_()


def swiglu(layer: MoELayer, e: int, x: Tensor) -> Tensor:
    """Down (SiLU(gate x) * up x), of a routed expert or (from REAL on) a shared one; no biases."""
    banks: Any = layer.experts.banks
    bank, at = (banks[0], e) if e < REAL else (banks[1], e - REAL)
    gate, up = (x @ bank.w_in[at]).chunk(2, -1)
    return (F.silu(gate) * up) @ bank.w_out[at]


def mix(z: Tensor, k: int, noise: Tensor | None, chance: Tensor | None) -> tuple[list[int], list[Tensor], Tensor]:
    """K draws from one row of logits.

    Returns:
        the columns, their multipliers without gradient, and a scalar whose gradient for z is that of the multipliers
        weighted by what ``backward`` gives; here as the list of unscaled shares, which carry it.
    """
    left, columns, values, shares = list(range(COLUMNS)), [], [], []
    for i in range(k):
        best = max(left, key=lambda e: float(z[e].detach()))
        top = float(z[best].detach())
        near = [e for e in left if (top - float(z[e].detach())) / max(abs(float(z[e].detach())), abs(top)) <= 2 * EPS]
        q = torch.stack([z[e] for e in near]).softmax(0)
        drawn = best if noise is None else max(near, key=lambda e: float(z[e].detach() + noise[i, e]))
        share = q[near.index(drawn)]
        counts_fully = chance is None or drawn == best or float(chance[i]) > 0.75
        columns.append(drawn)
        values.append(share.detach() * (1.0 if counts_fully else 0.3333))
        shares.append(share)
        left.remove(drawn)
    return columns, values, torch.stack(shares)


def expected(layer: MoELayer, x: Tensor, noise: Tensor | None, chance: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Outputs, balance loss, and how many draws were not the best."""
    weight: Tensor = layer.router.score.weight  # type: ignore[union-attr, assignment]
    outputs, counts, shares, scaled = [], torch.zeros(COLUMNS).double(), torch.zeros(COLUMNS).double(), 0
    for n in range(N):
        z = weight @ x[n]
        routable = z[:COLUMNS]
        order = routable.detach().softmax(0).sort(descending=True).values.cumsum(0)
        k = min(COLUMNS, 1 + int((order < P).sum()))
        row = None if noise is None else noise[:, n]
        columns, values, soft = mix(routable, k, row, None if chance is None else chance[:, n])
        scaled += sum(float(v) < 0.3334 for v in values)
        # The value of a draw, and the gradient of its whole share.
        m = torch.stack([v + s - s.detach() for v, s in zip(values, soft, strict=True)])
        r = m / (m.sum() + 1e-6)
        alive = columns + list(range(COLUMNS, COLUMNS + SHARED))
        a = dict(zip(alive, torch.stack([z[e] for e in alive]).softmax(0), strict=True))
        mass = sum(a[e] for e in columns)
        y = sum(a[COLUMNS + s] * swiglu(layer, REAL + s, x[n]) for s in range(SHARED))
        for e, share in zip(columns, r, strict=True):
            if e < REAL:  # a null expert gives nothing, and its share is lost
                y = y + mass * share * swiglu(layer, e, x[n])
        outputs.append(y)
        q = torch.stack([routable[e] for e in columns]).softmax(0)
        for e, share in zip(columns, q, strict=True):
            counts[e] += 1 / N
            shares[e] = shares[e] + share / N
    return torch.stack(outputs), COLUMNS * (counts * shares).sum(), scaled


def error(layer: MoELayer, x: Tensor, noise: Tensor | None, chance: Tensor | None, seed: int) -> tuple[float, float]:
    wanted, balance, scaled = expected(layer, x, noise, chance)
    assert noise is None or scaled > 0, "no draw was scaled: nothing was tried"
    torch.manual_seed(seed)
    with MoERecorder() as recorder:
        found = layer(x)
    ours = chosen_balance(recorder.records[0])
    gate: Tensor = layer.router.score.weight  # type: ignore[union-attr, assignment]
    return furthest(found, wanted, [x, *layer.parameters()]), furthest(ours, balance, [x, gate])


def noise_of(seed: int, draws: int) -> tuple[Tensor, Tensor]:
    """The numbers that draws after this seed use: Gumbel [draws, N, columns] and uniform [draws, N]."""
    torch.manual_seed(seed)
    gumbel, uniform = [], []
    for _ in range(draws):
        gumbel.append(-torch.empty(N, COLUMNS, dtype=torch.float64).exponential_().log())
        uniform.append(torch.rand(N, 1, dtype=torch.float64)[:, 0])
    return torch.stack(gumbel), torch.stack(uniform)


def both() -> tuple[float, float]:
    results = []
    for training, draws in ((False, True), (True, False), (True, True)):
        layer, x = block(draws=draws)
        layer.train(training)
        given = noise_of(7, int(P * COLUMNS) + 1) if training and draws else (None, None)
        results.append(error(layer, x, *given, seed=7))
    return max(r[0] for r in results), max(r[1] for r in results)


def with_capacity(factor: float) -> float:
    """The block in evaluation, where every column keeps its rows with the highest logits, at least eight."""
    layer, x = block(capacity_factor=factor)
    layer.eval()
    weight: Tensor = layer.router.score.weight  # type: ignore[union-attr, assignment]
    z = x @ weight.T
    capacity = max(8, math.ceil(N / COLUMNS * factor))
    r, asked = torch.zeros(N, COLUMNS).double(), torch.zeros(N, COLUMNS).bool()
    rows = []
    for n in range(N):
        order = z[n, :COLUMNS].detach().softmax(0).sort(descending=True).values.cumsum(0)
        columns, _, soft = mix(z[n, :COLUMNS], min(COLUMNS, 1 + int((order < P).sum())), None, None)
        asked[n, columns] = True
        rows.append(torch.zeros(COLUMNS).double().scatter(0, torch.tensor(columns), soft / (soft.sum() + 1e-6)))
    r = torch.stack(rows)
    kept = torch.zeros_like(asked)
    for e in range(COLUMNS):
        best = sorted((n for n in range(N) if asked[n, e]), key=lambda n: -float(z[n, e].detach()))
        kept[best[:capacity], e] = True
    assert (asked & ~kept)[:, :REAL].any()
    assert (asked & ~kept)[:, REAL:].any()
    r = r.where(kept, 0)
    r = r / (r.sum(-1, keepdim=True) + 1e-6)
    alive = torch.cat([kept, torch.ones(N, SHARED).bool()], -1)
    a = z.masked_fill(~alive, -math.inf).softmax(-1)
    mass = a[:, :COLUMNS].sum(-1, keepdim=True)
    weights = torch.cat([(r * mass)[:, :REAL], a[:, COLUMNS:]], -1)
    wanted = sum(weights[:, e : e + 1] * swiglu(layer, e, x) for e in range(REAL + SHARED))
    assert isinstance(wanted, Tensor)
    return furthest(layer(x), wanted, [x, *layer.parameters()])


@part("capacity of UniMoE-Audio, switched off there")
def audio_capacity() -> float:
    return with_capacity(1.0)


@part("UniMoE-Audio block")
def audio_block() -> float:
    return both()[0]


@part("balance loss of UniMoE-Audio")
def audio_balance() -> float:
    return both()[1]
