# SPDX-License-Identifier: Apache-2.0
"""Multi-task networks are one bank: each is another one with a wall taken down, weight by weight the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.recommendation import rivals
from tasks.recommendation.model import home
from tasks.recommendation.nets.levels import NetFactory, RankingNet
from tasks.recommendation.rivals import (
    adatt,
    cgc,
    cross_stitch,
    ml_mmoe,
    mmoe,
    omoe,
    ple,
    shared_bottom,
    single_task,
    stem,
)

PLANS = {**vars(rivals), "home": home}
FACTS: dict[str, Any] = {"tasks": ["a", "b", "c"], "categories": ["x", "x", "y"]}
DIM, WIDTH, T = 6, 5, 3
SIZES: dict[str, Any] = {"width": WIDTH, "tower_dim": 4}


def build(factory: NetFactory, facts: dict[str, Any] = FACTS) -> RankingNet:
    net = factory(DIM, facts).double()
    assert isinstance(net, RankingNet)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return net


def rows(inputs: int = 1) -> Tensor:
    return torch.randn(inputs, 8, DIM, dtype=torch.float64)


def assert_twins(left: RankingNet, right: RankingNet, x: Tensor) -> None:
    """Same parameters, same outputs and same gradients."""
    right.load_state_dict(left.state_dict())
    torch.testing.assert_close(left(x), right(x), rtol=0, atol=1e-12)
    probe = torch.randn(8, T, dtype=torch.float64)
    found, wanted = (torch.autograd.grad((net(x) * probe).sum(), list(net.parameters())) for net in (left, right))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("norm", "activation"), [("none", "relu"), ("batch", "silu")])
def test_home_without_its_parts_is_mmoe(norm: Any, activation: Any) -> None:
    stripped = home(
        levels=1,
        meta_shared=4,
        meta_category=0,
        feature_gates=0,
        self_gates=False,
        category_choice="one",
        norm=norm,
        activation=activation,
        **SIZES,
    )

    assert_twins(build(stripped), build(mmoe(num_experts=4, norm=norm, activation=activation, **SIZES)), rows())


def test_cgc_without_its_mask_is_mmoe_and_ple_of_one_level_is_cgc() -> None:
    open_cgc = cgc(shared_experts=2, task_experts=1, mask=False, **SIZES)
    assert_twins(build(open_cgc), build(mmoe(num_experts=5, **SIZES)), rows())
    assert_twins(
        build(ple(levels=1, shared_experts=2, **SIZES)), build(cgc(shared_experts=2, task_experts=1, **SIZES)), rows()
    )


def test_multi_level_mmoe_of_one_level_is_mmoe() -> None:
    assert_twins(build(ml_mmoe(levels=1, num_experts=4, **SIZES)), build(mmoe(num_experts=4, **SIZES)), rows())


def test_adatt_without_its_residual_is_ple_without_its_mask() -> None:
    bare = adatt(task_experts=2, shared_experts=1, residual=False, **SIZES)
    unmasked = ple(task_experts=2, shared_experts=1, mask=False, **SIZES)
    assert_twins(build(bare), build(unmasked), rows())


def test_stem_on_equal_tables_without_stopped_gradients_is_mmoe() -> None:
    net, twin = build(stem(shared_experts=2, stop_gradient=False, **SIZES)), build(mmoe(num_experts=5, **SIZES))
    x = rows()
    router, other = net.levels[0].moe.router, twin.levels[0].moe.router
    twin.levels[0].moe.experts.load_state_dict(net.levels[0].moe.experts.state_dict())
    twin.towers.load_state_dict(net.towers.state_dict())
    with torch.no_grad():  # gate t reads state t there, the one state here
        rows_of = router.index.where(router.index < len(router.weight), -1).max(0).values
        other.weight[other.index[0]] = router.weight[rows_of]
        other.bias[other.bias_index] = router.bias[router.bias_index]

    torch.testing.assert_close(net(x.expand(T + 1, -1, -1)), twin(x))


def test_stem_stops_the_gradient_of_other_tasks_but_not_the_values() -> None:
    net, free = build(stem(shared_experts=1, **SIZES)), build(stem(shared_experts=1, stop_gradient=False, **SIZES))
    free.load_state_dict(net.state_dict())
    x = rows(T + 1).requires_grad_()

    torch.testing.assert_close(net(x), free(x))
    for t in range(T):
        reached = torch.autograd.grad(net(x)[:, t].sum(), x)[0].flatten(1).any(1).tolist()
        assert reached == [unit in (t, T) for unit in range(T + 1)]
        assert torch.autograd.grad(free(x)[:, t].sum(), x)[0].flatten(1).any(1).all()


def test_cross_stitch_that_stitches_nothing_is_single_task() -> None:
    net, twin = build(cross_stitch(levels=1, **SIZES)), build(single_task(**SIZES))
    twin.load_state_dict({k: v for k, v in net.state_dict().items() if not k.endswith("constant")})
    with torch.no_grad():
        net.levels[0].moe.router.constant.copy_(torch.eye(T).flatten())
    x = rows()

    torch.testing.assert_close(net(x), twin(x))


def test_one_gate_for_all_is_a_gate_per_task_with_equal_weights_and_one_expert_is_a_shared_bottom() -> None:
    net, twin = build(omoe(num_experts=4, **SIZES)), build(mmoe(num_experts=4, **SIZES))
    router, other = net.levels[0].moe.router, twin.levels[0].moe.router
    twin.levels[0].moe.experts.load_state_dict(net.levels[0].moe.experts.state_dict())
    twin.towers.load_state_dict(net.towers.state_dict())
    with torch.no_grad():
        weight, bias = router.weight[router.index[0]], router.bias[router.bias_index]  # [experts, d]
        other.weight[other.index[0]] = weight.repeat_interleave(T, 0)
        other.bias[other.bias_index] = bias.repeat_interleave(T, 0)
    x = rows()
    torch.testing.assert_close(net(x), twin(x))

    single, bottom = build(omoe(num_experts=1, **SIZES)), build(shared_bottom(**SIZES))
    bottom.load_state_dict({k: v for k, v in single.state_dict().items() if "router" not in k})
    torch.testing.assert_close(single(x), bottom(x))


@pytest.mark.parametrize("own", [1, 2])
def test_adatt_adds_the_tasks_own_experts_once_more(own: int) -> None:
    net = build(adatt(levels=1, task_experts=own, **SIZES))
    bare = build(adatt(levels=1, task_experts=own, residual=False, **SIZES))
    bare.load_state_dict({k: v for k, v in net.state_dict().items() if not k.endswith("constant")})
    level, x = net.levels[0], rows()
    h = level.moe.experts.every(x)  # [N, E, o]
    mix = torch.ones(T, 1) if own == 1 else level.moe.router.constant.view(T, own)

    more = torch.stack([(h[:, own * t : own * (t + 1)] * mix[t, :, None]).sum(1) for t in range(T)])

    torch.testing.assert_close(level(x), bare.levels[0](x) + more)


def test_mmoe_is_what_its_paper_says() -> None:
    net, x = build(mmoe(num_experts=3, **SIZES)), rows()
    bank, router, tower = net.levels[0].moe.experts, net.levels[0].moe.router, net.towers
    weight, bias = router.weight[router.index[0]].view(3, T, DIM), router.bias[router.bias_index].view(3, T)
    for t in range(T):
        gate = torch.softmax(x[0] @ weight[:, t].T + bias[:, t], -1)
        z = sum(gate[:, e : e + 1] * torch.relu(x[0] @ bank.weight[e] + bank.beta[e]) for e in range(3))
        logit = torch.relu(z @ tower.w_in[t] + tower.b_in[t]) @ tower.w_out[t] + tower.b_out[t]
        torch.testing.assert_close(net(x)[:, t], logit[:, 0])


def test_ple_is_what_its_paper_says() -> None:
    net, x = build(ple(shared_experts=2, **SIZES)), rows()[0]

    def read(level: Any, gate: int, state: Tensor, experts: list[int], h: list[Tensor]) -> Tensor:
        router = level.moe.router
        place = router.place_mixing.view(-1, router.num_gates, router.num_experts)
        logits = []
        for e in experts:
            slot = int(place[:, gate, e].nonzero())
            row = next(int(i) for i in router.index[:, slot] if i < len(router.weight))
            logits.append(state @ router.weight[row] + router.bias[router.bias_index[slot]])
        share = torch.softmax(torch.stack(logits, -1), -1)
        return sum(share[:, i : i + 1] * h[e] for i, e in enumerate(experts))  # type: ignore[return-value]

    units = [x] * (T + 1)
    for depth, level in enumerate(net.levels):
        bank = level.moe.experts
        h = [torch.relu(units[min(e, T)] @ bank.weight[e] + bank.beta[e]) for e in range(T + 2)]
        shared = [T, T + 1]
        sees = [[t, *shared] for t in range(T)] + [list(range(T + 2))] * (depth == 0)
        units = [read(level, g, units[g], experts, h) for g, experts in enumerate(sees)]
    tower = net.towers
    logits = [
        (torch.relu(units[t] @ tower.w_in[t] + tower.b_in[t]) @ tower.w_out[t])[:, 0] + tower.b_out[t] for t in range(T)
    ]
    torch.testing.assert_close(net(x.unsqueeze(0)), torch.stack(logits, -1))


@pytest.mark.parametrize("name", ["ple", "ml_mmoe", "adatt", "cross_stitch"])
def test_sizes_that_make_no_network_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="levels=0"):
        PLANS[name](levels=0)


@pytest.mark.parametrize("factory", [ple(levels=3), ml_mmoe(levels=3), adatt(levels=3), cross_stitch(levels=3)])
def test_three_levels_learn_in_all_parameters(factory: NetFactory) -> None:
    net = build(factory)
    found = torch.autograd.grad(net(rows()).square().sum(), list(net.parameters()))
    assert sum(bool(g.any()) for g in found) == len(found)


@pytest.mark.parametrize(("own", "shared", "numbers"), [(1, 0, 0), (1, 1, 0), (2, 0, 6), (1, 2, 5), (2, 1, 7)])
def test_adatt_learns_a_number_per_own_expert_unless_every_unit_has_one(own: int, shared: int, numbers: int) -> None:
    """Counted by hand for 3 tasks: one number per expert below the last level, where the shared unit has none."""
    net = adatt(levels=2, task_experts=own, shared_experts=shared, width=5, tower_dim=4)(DIM, FACTS)
    assert isinstance(net, RankingNet)
    first, last = (level.moe.router.constant for level in net.levels)

    assert (0 if first is None else first.numel()) == numbers
    assert (0 if last is None else last.numel()) == (T * own if numbers else 0)


def test_adatts_learned_numbers_start_from_a_draw_by_the_size_of_the_unit() -> None:
    router = adatt(levels=2, task_experts=1, shared_experts=16, **SIZES)(DIM, FACTS).levels[0].moe.router  # type: ignore[union-attr, index]
    draws = []
    for _ in range(200):
        router.reset_parameters()  # type: ignore[operator, union-attr]
        draws.append(router.constant.detach().clone())  # type: ignore[operator, union-attr]
    own, shared = torch.stack(draws).split([T, 16], 1)

    assert 0.95 < float(own.abs().max()) <= 1
    assert 0.24 < float(shared.abs().max()) <= 0.25
    assert float(own.min()) < 0 < float(own.max())
