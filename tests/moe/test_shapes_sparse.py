# SPDX-License-Identifier: Apache-2.0
"""Point-MoE, UniMoE-Audio, ProMoE and MixER on the core equal naive loops written from their equations.

The naive functions are plain loops over rows and experts that know nothing of the core. Outputs and all gradients agree
in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeapps.moe import MoELayer, Routing
from tests.moe.shapes_common import (
    assert_same,
    glu,
    mixer,
    mixer_rollout,
    mlp,
    point_moe,
    promoe,
    randomised,
    rows,
    unimoe_audio,
)

# --- 1. Point-MoE ----------------------------------------------------------------------------------------------------


def naive_point_moe(layer: MoELayer, x_ND: Tensor, top_k: int) -> Tensor:
    outputs = []
    for x in x_ND:
        p = torch.softmax(layer.router.score.weight @ x, -1)
        value = p.tolist()
        chosen = sorted(range(len(p)), key=lambda e: -value[e])[:top_k]
        total = sum(p[e] for e in chosen)
        outputs.append(sum(p[e] / total * glu(layer.experts, e, x, F.relu) for e in chosen))
    return torch.stack(outputs)


def test_point_moe() -> None:
    layer, x = randomised(point_moe(6, 5, 2)), rows(11, 6)
    assert_same(lambda: layer(x), lambda: naive_point_moe(layer, x, 2), [x, *layer.parameters()])


# --- 2. UniMoE-Audio -------------------------------------------------------------------------------------------------


def naive_unimoe_audio(layer: MoELayer, x_ND: Tensor, num_routed: int, num_null: int, p: float) -> Tensor:
    outputs = []
    for x in x_ND:
        z = layer.router.score.weight @ x
        routable = num_routed + num_null
        probs = torch.softmax(z[:routable], -1)
        value = probs.tolist()
        chosen: list[int] = []
        while sum(value[e] for e in chosen) < p and len(chosen) < routable:
            chosen.append(max((e for e in range(routable) if e not in chosen), key=lambda e: value[e]))
        kept = [*chosen, *range(routable, len(z))]
        a = dict(zip(kept, torch.softmax(z[kept], -1), strict=True))
        mass = sum(a[e] for e in chosen)
        y = torch.zeros_like(x)
        for e in chosen:
            if e < num_routed:
                y = y + mass * probs[e] / sum(probs[j] for j in chosen) * glu(layer.experts, e, x, F.silu)
        for s in range(routable, len(z)):
            y = y + a[s] * glu(layer.experts, s - num_null, x, F.silu)
        outputs.append(y)
    return torch.stack(outputs)


def test_unimoe_audio() -> None:
    layer, x = randomised(unimoe_audio(6, 5, 2, 2, 0.7)), rows(17, 6)
    routing = layer.route(x)
    assert isinstance(routing, Routing)
    assert 1 < float((routing.expert_M < 5).double().sum()) / 17 < 5
    assert_same(lambda: layer(x), lambda: naive_unimoe_audio(layer, x, 5, 2, 0.7), [x, *layer.parameters()])


# --- 3. ProMoE -------------------------------------------------------------------------------------------------------


def naive_promoe(layer: MoELayer, x_ND: Tensor, unconditional_N: Tensor, num_routed: int) -> Tensor:
    def gelu(h: Tensor) -> Tensor:
        return F.gelu(h, approximate="tanh")

    outputs = []
    for x, unconditional in zip(x_ND, unconditional_N, strict=True):
        y = mlp(layer.experts, num_routed + 1, x, gelu)
        if unconditional:
            outputs.append(y + mlp(layer.experts, num_routed, x, gelu))
            continue
        prototypes = layer.router.conditional.score.prototypes
        z = torch.stack([x @ p / (x.norm() * p.norm()) for p in prototypes])
        j = int(z.argmax())
        outputs.append(y + z[j] * mlp(layer.experts, j, x, gelu))
    return torch.stack(outputs)


def test_promoe() -> None:
    layer, x = randomised(promoe(5, 4)), rows(4, 3, 5)
    unconditional = torch.tensor([False, True, False, False])
    group = torch.where(unconditional, -1, torch.arange(4)).repeat_interleave(3)
    flag = unconditional.repeat_interleave(3)
    assert_same(
        lambda: layer(x, group=group),
        lambda: naive_promoe(layer, x.reshape(12, 5), flag, 4).reshape(4, 3, 5),
        [x, *layer.parameters()],
    )


def test_promoe_with_all_rows_unconditional_leaves_prototypes_untouched() -> None:
    layer, x = randomised(promoe(5, 4)), rows(6, 5)
    y = layer(x, group=torch.full((6,), -1))
    expected = naive_promoe(layer, x, torch.ones(6, dtype=torch.bool), 4)
    torch.testing.assert_close(y, expected)
    prototypes, w_in = torch.autograd.grad(y.sum(), [layer.router.conditional.score.prototypes, layer.experts.w_in])
    assert not prototypes.any()
    assert not w_in[:4].any()
    assert w_in[4:].any()


# --- 6. MixER --------------------------------------------------------------------------------------------------------


def naive_mixer(layer: MoELayer, context_EC: Tensor, x_ETD: Tensor, steps: int, dt: float) -> Tensor:
    score, num_experts = layer.router.score, layer.experts.num_experts
    outputs = []
    for xi, trajectories in zip(context_EC, x_ETD, strict=True):
        k = int((score.weight @ xi + score.bias).argmax())
        piece = xi.chunk(num_experts)[k]
        for x in trajectories:
            for _ in range(steps):
                x = x + dt * layer.experts.experts[k](x[None], piece[None])[0]
            outputs.append(x)
    return torch.stack(outputs).view_as(x_ETD)


def test_mixer() -> None:
    layer, context, x = randomised(mixer(3, 3, 2)), rows(12, 6), rows(12, 4, 3)
    assert layer.route(context).counts().min() > 0
    gate = list(layer.router.parameters())  # "ones" gives the gate no gradient: it is fitted by least squares
    assert_same(
        lambda: mixer_rollout(layer, context, x, 3, 0.1),
        lambda: naive_mixer(layer, context, x, 3, 0.1),
        [context, x, *layer.parameters()],
        unused=gate,
    )
