# SPDX-License-Identifier: Apache-2.0
"""Mixture layers of diffusion transformers as ali-vilab/ProMoE ``models/`` and facebookresearch/DiT define them.

Written as loops over images, tokens and experts. An expert is Linear, GELU (tanh), Linear.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from official_common import furthest, part, scatter
from torch import Tensor

from moeapps.moe import AuxLoss, MoELayer, MoERecorder, SwitchBalance
from moeapps.moe.presets import promoe
from tasks.image_diffusion.losses import CapacityLoss, RoutingContrast
from tasks.image_diffusion.nets.blocks import position_table
from tasks.image_diffusion.nets.flow import RectifiedFlow, shifted
from tasks.image_diffusion.nets.samplers import euler, guided, time_grid
from tasks.image_diffusion.rivals import routers

B, L, D, E, TAU = 5, 12, 8, 4, 0.07
UNCONDITIONAL = (1, 4)
"""Images whose class was dropped."""
Mode = Literal["identity", "softmax", "sigmoid"]


def mlp(layer: MoELayer, e: int, x: Tensor) -> Tensor:
    bank: Any = layer.experts
    return F.gelu(x @ bank.w_in[e] + bank.b_in[e], approximate="tanh") @ bank.w_out[e] + bank.b_out[e]


def drawn(layer: MoELayer) -> tuple[MoELayer, Tensor]:
    layer = layer.double()
    scatter(layer.parameters())
    return layer, torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)


def groups(unconditional: tuple[int, ...] = UNCONDITIONAL) -> Tensor:
    """One id per token: the image's number, below 0 without a class."""
    return torch.tensor([-(b + 1) if b in unconditional else b for b in range(B)]).repeat_interleave(L)


def called(layer: MoELayer, x: Tensor, **options: Any) -> tuple[Tensor, MoERecorder]:
    with MoERecorder() as recorder:
        y = layer(x.flatten(0, 1), **options)
    return y.view(B, L, D), recorder


def cosines(layer: MoELayer, x: Tensor) -> Tensor:
    """Of every token with every prototype."""
    prototypes: Tensor = layer.router.conditional.score.prototypes  # type: ignore[union-attr, assignment]
    return torch.stack([(x * p).sum(-1) / (x.norm(dim=-1) * p.norm()) for p in prototypes], -1)


def contrast(prototypes: Tensor, means: dict[int, Tensor]) -> Tensor:
    """Mean cross-entropy of each used prototype against the mean tokens of all used experts."""
    losses = []
    for i in means:
        logits = torch.stack([F.cosine_similarity(prototypes[i], means[j], dim=0) / TAU for j in means])
        losses.append(logits.logsumexp(0) - F.cosine_similarity(prototypes[i], means[i], dim=0) / TAU)
    return torch.stack(losses).mean()


def by_token(mode: Mode, top_k: int) -> tuple[float, float]:
    """ProMoE, tokens choose: errors of the layer and of its contrastive loss."""
    layer, x = drawn(promoe(num_experts=E, top_k=top_k, weighing=mode)(D))
    weight = {"identity": lambda z: z, "softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid}[mode]
    images, taken = [], {e: [] for e in range(E)}
    gate = weight(cosines(layer, x))
    for b in range(B):
        tokens = []
        for t in range(L):
            y = mlp(layer, E + 1, x[b, t])  # the shared expert
            if b in UNCONDITIONAL:
                y = y + mlp(layer, E, x[b, t])
            else:
                for e in gate[b, t].topk(top_k).indices.tolist():
                    y = y + gate[b, t, e] * mlp(layer, e, x[b, t])
                    taken[e].append(x[b, t])
            tokens.append(y)
        images.append(torch.stack(tokens))
    found, recorder = called(layer, x, group=groups())
    prototypes = layer.router.conditional.score.prototypes  # type: ignore[union-attr]
    loss = contrast(prototypes, {e: torch.stack(rows).mean(0) for e, rows in taken.items() if rows})
    ours = value(RoutingContrast(1.0, tau=TAU), recorder)
    variables = [x, *layer.parameters()]
    return furthest(found, torch.stack(images), variables), furthest(ours.double(), loss, [x, prototypes])


def by_expert(mode: Mode, top_k: int) -> tuple[float, float]:
    """ProMoE-EC: in every image with a class each expert takes its best tokens; softmax is over the image's tokens."""
    layer, x = drawn(promoe(num_experts=E, top_k=top_k, weighing=mode, by_expert=True)(D))
    k = max(1, min(int(L / E * top_k), L))
    images, losses = [], []
    prototypes: Tensor = layer.router.conditional.score.prototypes  # type: ignore[union-attr, assignment]
    for b in range(B):
        y = [mlp(layer, E + 1, x[b, t]) for t in range(L)]
        if b in UNCONDITIONAL:
            images.append(torch.stack([y[t] + mlp(layer, E, x[b, t]) for t in range(L)]))
            continue
        score = cosines(layer, x[b])
        gate = {"identity": score, "softmax": score.softmax(0), "sigmoid": score.sigmoid()}[mode]
        means = {}
        for e in range(E):
            rows = gate[:, e].topk(k).indices.tolist()
            for t in rows:
                y[t] = y[t] + gate[t, e] * mlp(layer, e, x[b, t])
            means[e] = x[b, rows].mean(0)
        images.append(torch.stack(y))
        losses.append(contrast(prototypes, means))
    found, recorder = called(layer, x, group=groups())
    ours = value(RoutingContrast(1.0, tau=TAU, per_image=True), recorder)
    variables = [x, *layer.parameters()]
    return (
        furthest(found, torch.stack(images), variables),
        furthest(ours.double(), torch.stack(losses).mean(), [x, prototypes]),
    )


def value(loss: AuxLoss, recorder: MoERecorder) -> Tensor:
    """A loss of one layer with weight 1."""
    (record,) = recorder.records
    return loss.compute(record)


@part("ProMoE layer, tokens choose")
def promoe_tokens() -> float:
    return max(by_token(mode, k)[0] for mode in get_args(Mode) for k in (1, 2))


@part("ProMoE layer, experts choose (EC)")
def promoe_experts() -> float:
    return max(by_expert(mode, k)[0] for mode in get_args(Mode) for k in (1, 2))


@part("routing contrastive loss, tokens choose")
def promoe_contrast() -> float:
    return max(by_token("identity", k)[1] for k in (1, 2))


@part("routing contrastive loss, experts choose (EC)")
def promoe_contrast_experts() -> float:
    return max(by_expert("identity", k)[1] for k in (1, 2))


@part("position table of DiT")
def positions() -> float:
    """Channels in four runs: sines, cosines of the column; sines, cosines of the row."""
    errors = []
    for grid, dim in ((16, 384), (7, 128), (32, 1152)):
        rows = []
        for place in range(grid * grid):
            row, column = divmod(place, grid)
            rates = [10_000.0 ** (-i / (dim // 4)) for i in range(dim // 4)]
            rows.append(
                [wave(axis * rate) for axis in (column, row) for wave in (math.sin, math.cos) for rate in rates]
            )
        errors.append(furthest(position_table(grid, dim).double(), torch.tensor(rows, dtype=torch.float64)))
    return max(errors)


def plain(layer: MoELayer, gates: Tensor, taken: Tensor, x_ND: Tensor) -> Tensor:
    """Sum of the gated experts of the pairs that were taken."""
    rows = []
    for t, row in enumerate(x_ND):
        rows.append(sum((gates[t, e] * mlp(layer, e, row) for e in range(E) if taken[t, e]), torch.zeros_like(row)))
    return torch.stack(rows)


def rival(router: Any) -> MoELayer:
    return promoe(num_experts=E, conditional_split=False, num_shared=0, router=router)(D)


@part("DiT-MoE gate and balance loss")
def token_choice() -> float:
    layer, x = drawn(rival(routers.token_choice(num_experts=E, top_k=2)))
    weight = layer.router.score.weight  # type: ignore[union-attr]
    gates = (x.flatten(0, 1) @ weight.T).softmax(-1)  # type: ignore[operator]
    chosen = gates.topk(2).indices
    taken = torch.zeros_like(gates, dtype=torch.bool).scatter(1, chosen, True)
    share = F.one_hot(chosen.flatten(), E).double().mean(0) * E
    loss = (gates.mean(0) * share).sum()
    y, recorder = called(layer, x)
    wanted = plain(layer, gates, taken, x.flatten(0, 1)).view(B, L, D)
    error = furthest(y, wanted, [x, *layer.parameters()])
    return max(error, furthest(value(SwitchBalance(1.0), recorder), loss, [x, weight]))  # type: ignore[list-item]


@part("EC-DiT layer")
def expert_choice() -> float:
    layer, x = drawn(rival(routers.expert_choice(num_experts=E, capacity=2.0)))
    weight: Tensor = layer.router.score.weight  # type: ignore[union-attr, assignment]
    gates = (x @ weight.T).softmax(-1)
    k = int(L / E * 2.0)
    taken = torch.zeros_like(gates, dtype=torch.bool).scatter(1, gates.topk(k, dim=1).indices, True)
    y, _ = called(layer, x, group=groups(()))
    wanted = plain(layer, gates.flatten(0, 1), taken.flatten(0, 1), x.flatten(0, 1)).view(B, L, D)
    return furthest(y, wanted, [x, *layer.parameters()])


@part("DiffMoE layer, thresholds and predictor loss")
def diffmoe() -> float:
    """Two steps of training, then evaluation by as many tokens of the batch as pass an expert's threshold."""
    layer, x = drawn(rival(routers.diffmoe(num_experts=E, capacity=1.0, evaluation="batch")))
    router: Any = layer.router
    threshold, errors = torch.zeros(E, dtype=torch.float64), []
    k = int(B * L / E * 1.0)
    for _ in range(2):
        rows = x.flatten(0, 1)
        gates, guess = (rows @ router.score.weight.T).softmax(-1), router.predictor(rows.detach())
        taken = torch.zeros_like(gates, dtype=torch.bool).scatter(0, gates.topk(k, dim=0).indices, True)
        y, recorder = called(layer, x)
        errors.append(furthest(y, plain(layer, gates, taken, rows).view(B, L, D), [x, *layer.parameters()]))
        loss = F.binary_cross_entropy_with_logits(guess, taken.double())
        errors.append(furthest(value(CapacityLoss(1.0), recorder), loss, list(router.predictor.parameters())))
        for e in range(E):
            threshold[e] = 0.95 * threshold[e] + 0.05 * guess[:, e].sigmoid().topk(k).values[-1].detach()
        errors.append(furthest(router.threshold, threshold))
        x = torch.randn_like(x).requires_grad_()
    with torch.no_grad():
        router.threshold.copy_(threshold.fill_(0.5))  # so that some tokens pass and some do not
    layer.eval()
    rows = x.flatten(0, 1)
    gates, guess = (rows @ router.score.weight.T).softmax(-1), router.predictor(rows.detach()).sigmoid()
    taken = torch.zeros_like(gates, dtype=torch.bool)
    for e in range(E):
        taken[gates[:, e].topk(int((guess[:, e] > threshold[e]).sum())).indices, e] = True
    assert 0 < int(taken.sum()) < taken.numel()
    y, _ = called(layer, x)
    return max(*errors, furthest(y, plain(layer, gates, taken, rows).view(B, L, D), [x, *layer.parameters()]))


@part("rectified flow: corruption, loss, Euler steps, guidance")
def flow() -> float:
    """Sigma is what shift makes of u; the network is told 1000 sigma; the target is noise minus data."""
    process, errors = RectifiedFlow(shift=3.0), []
    x0, eps = torch.randn(2, B, 4, 6, 6, dtype=torch.float64)
    u = torch.rand(B, dtype=torch.float64)
    sigma = 3.0 * u / (1 + 2.0 * u)
    told = []

    def network(x: Tensor, time_B: Tensor, label_B: Tensor) -> Tensor:
        """Some function of all it is told, with a second half that nobody reads."""
        told.append(time_B)
        y = (x * (1 + label_B.view(-1, 1, 1, 1))).sin() + 1e-3 * time_B.view(-1, 1, 1, 1)
        return torch.cat([y, y], 1)

    network.num_classes, network.channels = 7, 4  # type: ignore[attr-defined]
    t = shifted(u, process.shift)
    x_t = process.corrupt(x0, eps, t)
    errors.append(furthest(t, sigma))
    errors.append(furthest(x_t, torch.stack([(1 - sigma[b]) * x0[b] + sigma[b] * eps[b] for b in range(B)])))
    errors.append(furthest(process.network_time(t), 1000 * sigma))
    output = torch.randn(B, 8, 6, 6).double()
    loss = torch.stack([((output[b, :4] - (eps[b] - x0[b])) ** 2).mean() for b in range(B)])
    errors.append(furthest(process.losses(output.float(), x0.float(), eps.float(), t).double(), loss))
    labels, scale, steps = torch.tensor([0, 1, 2, 3, 4]), 1.5, 10
    # Sigmas as released: 1 down to just above 0, then 0 itself as the last target.
    grid = [3.0 * s / (1 + 2.0 * s) for s in (1 - i / steps for i in range(steps))] + [0.0]
    x = y = eps
    for now, then in pairwise(grid):
        given, without = (
            network(x, x.new_full((B,), 1000 * now), label)[:, :4] for label in (labels, torch.full_like(labels, 7))
        )
        x = x + (then - now) * (without + scale * (given - without))
    y = euler(lambda z, t_B: guided(network, z, 1000 * t_B, labels, scale)[:, :4], eps, time_grid(steps, 3.0))  # type: ignore[arg-type]
    errors.append(furthest(y, x))
    return max(errors)
