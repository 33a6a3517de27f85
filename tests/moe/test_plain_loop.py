# SPDX-License-Identifier: Apache-2.0
"""The core in a training loop of one's own: outputs with their loss, decay per expert, biases that balance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moeapps.moe import GLUExperts, MLPExperts, MoERecorder, SwitchBalance, ZLoss, update_bias
from moeapps.moe.balance import BiasBalancer
from moeapps.moe.decay import decay_groups
from moeapps.moe.presets import deepseek_v3, dense, expert_choice, mixtral, soft_moe, switch

D, N = 14, 12


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_loss_beside_an_output_is_the_switch_loss_counted_by_hand() -> None:
    layer, x = mixtral(num_experts=4)(D), torch.randn(3, 4, D)
    y, aux = layer.with_aux(x)
    probs_NE = (x.reshape(-1, D) @ layer.router.score.weight.T).softmax(-1)
    chosen = probs_NE.topk(2).indices.flatten()
    share = torch.stack([(chosen == e).float().mean() for e in range(4)])

    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(aux, 0.01 * 4 * (share * probs_NE.mean(0)).sum())
    aux.backward()
    assert layer.router.score.weight.grad.abs().sum() > 0


def test_masked_rows_are_in_neither() -> None:
    layer, x, mask = mixtral(num_experts=4)(D), torch.randn(N, D), torch.arange(N) < 7
    y, aux = layer.with_aux(x, token_mask=mask)
    short, aux_short = layer.with_aux(x[:7])

    torch.testing.assert_close(y[:7], short)
    assert not y[7:].any()
    torch.testing.assert_close(aux, aux_short)


def test_losses_of_ones_own_are_added_up_with_their_weights() -> None:
    layer, x = mixtral(num_experts=4)(D), torch.randn(N, D)
    with MoERecorder(layer) as recorder:
        _, aux = layer.with_aux(x, losses=[SwitchBalance(0.5), ZLoss(0.25)])
    logits_NE = x @ layer.router.score.weight.T
    z = logits_NE.logsumexp(-1).square().mean()

    assert len(recorder.records) == 1  # a recorder around it hears the call, once
    torch.testing.assert_close(aux, SwitchBalance(0.5)(recorder.records) + 0.25 * z)
    assert layer.with_aux(x, losses=[])[1] == 0


@pytest.mark.parametrize("make", [soft_moe(), expert_choice(), dense()], ids=["soft", "expert choice", "dense"])
def test_layers_that_are_even_by_construction_have_no_loss(make: nn.Module) -> None:
    layer, x = make(D), torch.randn(N, D)
    y, aux = layer.with_aux(x)

    torch.testing.assert_close(y, layer(x))
    assert aux == 0


def test_a_plain_loop_learns_and_balances() -> None:
    """Four clusters, each with a map of its own, and a router that starts with all rows at one expert."""
    layer = switch(num_experts=4, capacity_factor=None, jitter=0.0)(D)
    with torch.no_grad():
        layer.router.score.weight[0] += 0.5
    centre, maps = 3 * torch.eye(4, D), 0.3 * torch.randn(4, D, D)
    optimizer = torch.optim.AdamW(decay_groups(layer, 0.01), lr=0.01)
    errors = []
    for _ in range(200):
        kind = torch.randint(4, (64,))
        x = centre[kind] + 0.3 * torch.randn(64, D)
        y, aux = layer.with_aux(x)
        error = (y - torch.einsum("nd,nde->ne", x, maps[kind])).square().mean()
        errors.append(error.detach())
        optimizer.zero_grad()
        (error + aux).backward()
        optimizer.step()

    assert layer.route(centre).counts().max() < 4  # the clusters have left the one expert
    assert torch.stack(errors[-10:]).mean() < 0.3 * errors[0]


def test_decay_is_for_what_is_a_matrix_to_one_expert() -> None:
    net = nn.ModuleDict({
        "norm": nn.LayerNorm(D), "moe": mixtral()(D), "mlp": nn.Linear(D, 3), "bank": MLPExperts(5, D, 9),
        "narrow": GLUExperts(3, D, 7, bias=True), "frozen": nn.Linear(D, 2).requires_grad_(False),
    })  # fmt: skip
    decayed, rest = decay_groups(net, 0.2)
    names = {id(p): name for name, p in net.named_parameters()}

    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.2, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        "moe.router.score.weight", "moe.experts.w_in", "moe.experts.w_out", "mlp.weight", "bank.w_in", "bank.w_out",
        "narrow.w_in", "narrow.w_out",
    }  # fmt: skip
    assert {names[id(p)] for p in rest["params"]} == {
        "norm.weight", "norm.bias", "mlp.bias", "bank.b_in", "bank.b_out", "narrow.b_in", "narrow.b_out",
    }  # fmt: skip


def test_a_step_decays_the_matrices_of_a_bank_alone() -> None:
    bank = MLPExperts(3, D, 5)
    before = {name: p.detach().clone() for name, p in bank.named_parameters()}
    optimizer = torch.optim.AdamW(decay_groups(bank, 0.5), lr=0.1)
    for p in bank.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()

    for name, p in bank.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name.startswith("w") else 1.0))


def test_decay_without_anything_to_decay() -> None:
    (group,) = decay_groups(nn.LayerNorm(4))
    assert group["weight_decay"] == 0
    with pytest.raises(ValueError, match="no parameter is trainable"):
        decay_groups(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="0 or more"):
        decay_groups(nn.Linear(2, 2), -1.0)


def test_biases_follow_the_counts_of_all_micro_batches_of_a_step() -> None:
    net = nn.Sequential(deepseek_v3(num_experts=6, top_k=2, num_groups=1, keep_groups=1)(D), nn.Linear(D, D))
    balancer, bias_E = BiasBalancer(net, rate=0.01), net[0].router.choose.bias
    counts_E = torch.zeros(6, dtype=torch.int64)
    for _ in range(3):
        x = torch.randn(N, D)
        with MoERecorder(net) as recorder:
            net(x)
        best = (x @ net[0].router.score.weight.T).topk(2).indices  # a sigmoid keeps the order; the bias is 0 so far
        counts_E += torch.bincount(best.flatten(), minlength=6)
        balancer.add(recorder.records)
    balancer.step()

    torch.testing.assert_close(bias_E, update_bias(torch.zeros(6), counts_E, 0.01))
    moved = bias_E.clone()
    balancer.step()  # nothing was counted since
    assert torch.equal(bias_E, moved)


def test_balancing_needs_a_bias_and_survives_a_move_of_the_network() -> None:
    with pytest.raises(ValueError, match="balance_bias: true"):
        BiasBalancer(mixtral()(D))
    layer = deepseek_v3(num_experts=4, top_k=2, num_groups=1, keep_groups=1)(D)
    balancer = BiasBalancer(layer)
    layer._apply(lambda t: t.clone())  # as a move to a device: buffers are new tensors
    with MoERecorder(layer) as recorder:
        layer(torch.randn(N, D))
    balancer.add(recorder.records)
    balancer.step()

    assert layer.router.choose.bias.any()
