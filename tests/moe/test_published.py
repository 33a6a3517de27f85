# SPDX-License-Identifier: Apache-2.0
"""The layers published outside the seven systems, each against its equation written out row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeapps.moe import MoELayer
from moeapps.moe.presets import deepseek_v3, expert_choice, mixtral, soft_moe, switch

D, N = 14, 11


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gated(layer: MoELayer, e: int, x_D: Tensor) -> Tensor:
    """A SwiGLU expert by hand."""
    gate, up = (x_D @ layer.experts.w_in[e]).chunk(2, -1)
    return (F.silu(gate) * up) @ layer.experts.w_out[e]


def logits(layer: MoELayer, x_ND: Tensor) -> Tensor:
    return x_ND @ layer.router.score.weight.T


@pytest.mark.parametrize("training", [True, False])
def test_switch_sends_a_row_to_its_best_expert_until_that_is_full(training: bool) -> None:
    layer = switch(num_experts=2, jitter=0.0, capacity_factor=1.0, eval_capacity_factor=1.5)(D).train(training)
    x_ND = torch.randn(20, D)
    with torch.no_grad():
        layer.router.score.weight[0] += 0.5 * x_ND.mean(0) + 0.3  # expert 0 overflows
    probs_NE = logits(layer, x_ND).softmax(-1)
    room, wanted = [10 if training else 15] * 2, torch.zeros(20, D)
    for n, p_E in enumerate(probs_NE):
        e = int(p_E.argmax())
        if room[e] > 0:
            room[e] -= 1
            wanted[n] = p_E[e] * (F.relu(x_ND[n] @ layer.experts.w_in[e]) @ layer.experts.w_out[e])

    assert layer.experts.b_in is None
    torch.testing.assert_close(layer(x_ND), wanted, rtol=1e-5, atol=1e-6)


def test_the_rows_of_the_switch_law_do_overflow() -> None:
    layer = switch(num_experts=2, jitter=0.0, capacity_factor=1.0)(D)
    x_ND = torch.randn(1, D).expand(20, D)  # all choose alike

    assert int((layer(x_ND).abs().sum(-1) > 0).sum()) == 10


def test_mixtral_is_a_softmax_over_the_best_logits() -> None:
    layer, x_ND = mixtral(num_experts=5, top_k=3)(D), torch.randn(N, D)
    wanted = torch.zeros(N, D)
    for n, s_E in enumerate(logits(layer, x_ND)):
        best = s_E.argsort(descending=True)[:3]
        for w, e in zip(s_E[best].softmax(-1), best.tolist(), strict=True):
            wanted[n] += w * gated(layer, e, x_ND[n])

    assert layer.experts.hidden_dim == 49  # 3.5 x 14
    torch.testing.assert_close(layer(x_ND), wanted, rtol=1e-5, atol=1e-6)


def test_deepseek_v3_selects_by_biased_sigmoids_in_the_best_groups_and_weighs_without_the_bias() -> None:
    layer = deepseek_v3(num_experts=8, top_k=3, num_groups=4, keep_groups=2)(D)
    x_ND, bias_E = torch.randn(N, D), torch.linspace(-0.3, 0.3, 8)
    layer.router.choose.bias.copy_(bias_E)
    wanted = torch.zeros(N, D)
    for n, s_E in enumerate(logits(layer, x_ND)):
        a_E = s_E.sigmoid()
        score = (a_E + bias_E).tolist()
        groups = sorted(range(4), key=lambda g: -(score[2 * g] + score[2 * g + 1]))[:2]
        inside = [e for e in range(8) if e // 2 in groups]
        best = sorted(inside, key=lambda e: -score[e])[:3]
        for e in best:
            wanted[n] += 2.5 * a_E[e] / a_E[best].sum() * gated(layer, e, x_ND[n])
        wanted[n] += gated(layer, 8, x_ND[n])  # the shared expert

    torch.testing.assert_close(layer(x_ND), wanted, rtol=1e-5, atol=1e-6)


def test_deepseek_v3_has_the_published_widths() -> None:
    with torch.device("meta"):
        layer = deepseek_v3()(7168)

    assert (layer.num_experts, layer.num_shared, layer.experts.hidden_dim) == (256, 1, 2048)


def test_soft_moe_is_two_softmaxes_of_cosines() -> None:
    layer, x_ND = soft_moe(num_experts=3, num_slots=2)(D), torch.randn(N, D)
    keys = layer.router.score.keys
    cosine_NX = (x_ND / x_ND.norm(dim=-1, keepdim=True)) @ (keys / keys.norm(dim=-1, keepdim=True)).T
    dispatch, combine = cosine_NX.softmax(0), cosine_NX.softmax(1)
    bank, wanted = layer.experts, torch.zeros(N, D)
    for slot in range(6):
        e, mixed_D = slot // 2, dispatch[:, slot] @ x_ND
        out_D = F.gelu(mixed_D @ bank.w_in[e] + bank.b_in[e]) @ bank.w_out[e] + bank.b_out[e]
        wanted += combine[:, slot, None] * out_D

    torch.testing.assert_close(layer(x_ND), wanted, rtol=1e-5, atol=1e-6)


def test_soft_moe_keeps_sequences_apart_where_it_is_told_to() -> None:
    layer, x_BTD = soft_moe(num_experts=3, num_groups=2)(D), torch.randn(2, 5, D)
    group = torch.arange(2)[:, None].expand(2, 5)
    other = x_BTD.clone()
    other[1] += 1.0

    torch.testing.assert_close(layer(x_BTD, group=group)[0], layer(other, group=group)[0])


def test_expert_choice_gives_every_expert_its_best_rows() -> None:
    layer, x_ND = expert_choice(num_experts=3, capacity_factor=1.5)(D), torch.randn(N, D)
    probs_NE = logits(layer, x_ND).softmax(-1)
    bank, wanted = layer.experts, torch.zeros(N, D)
    for e in range(3):
        for n in probs_NE[:, e].argsort(descending=True)[: int(N * 1.5 / 3)].tolist():
            out_D = F.relu(x_ND[n] @ bank.w_in[e] + bank.b_in[e]) @ bank.w_out[e] + bank.b_out[e]
            wanted[n] += probs_NE[n, e] * out_D

    torch.testing.assert_close(layer(x_ND), wanted, rtol=1e-5, atol=1e-6)
