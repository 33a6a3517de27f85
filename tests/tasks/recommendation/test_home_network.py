# SPDX-License-Identifier: Apache-2.0
"""HoME's network: the laws of its mask, gates and experts; ablations and controls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.recommendation.model import home
from tasks.recommendation.nets import feature_views
from tasks.recommendation.nets.fast_gates import StackedGates
from tasks.recommendation.nets.feature_gates import FeatureGates
from tasks.recommendation.nets.levels import RankingNet, TaskTree
from tests.tasks.recommendation.home_oracle import DIM, FACTS, TASKS, feature_gate, inputs, network, routings

# --- laws of the network ---


@pytest.mark.parametrize("low", [1, 2, 3, 5])
def test_fresh_feature_gates_are_exactly_the_identity(low: int) -> None:
    gates, states = FeatureGates(16, (0, 0, 1), num_gates=low, rank=3), torch.randn(2, 50, 16)

    assert torch.equal(gates(states), states[[0, 0, 1]])


@pytest.mark.parametrize("low", [1, 2, 3])
def test_feature_gates_are_differentiated_right(low: int) -> None:
    gates = FeatureGates(3, (0, 1, 1), num_gates=low, rank=2).double()
    nn.init.normal_(gates.up)
    states = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x, *_: gates(x), (states, *gates.parameters()))
    assert torch.autograd.gradgradcheck(lambda x, *_: gates(x), (states, *gates.parameters()))


@pytest.mark.parametrize("views", [(0, 0, 0), (0, 1, 0), (1, 1)])
def test_feature_gates_are_the_equation_whatever_the_chunks(
    views: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_views, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(feature_views, "_MIN_CHUNK_ROWS", 3)  # ten rows are four chunks
    gates = FeatureGates(3, views, num_gates=2, rank=2).double()
    nn.init.normal_(gates.up)
    states = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    wanted = torch.stack([feature_gate(gates, v, states[s]) for v, s in enumerate(views)])

    found = gates(states)
    with torch.no_grad():
        alone = gates(states)

    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(alone, wanted)
    some, others = (
        torch.autograd.grad(y.square().sum(), [states, *gates.parameters()], retain_graph=True) for y in (found, wanted)
    )
    torch.testing.assert_close(some, others)


def test_gate_rows_sum_to_one_over_allowed_experts_and_are_exactly_zero_elsewhere() -> None:
    net = network()

    for routing in routings(net, inputs()):
        allowed = routing.allowed.expand_as(routing.probs_NE)
        torch.testing.assert_close(routing.probs_NE.sum(-1), torch.ones_like(routing.probs_NE[..., 0]))
        assert not routing.probs_NE[~allowed].any()
        assert not routing.weight[~allowed].any()
        assert (routing.probs_NE[allowed] > 0).all()
        assert not allowed.all()


@pytest.mark.parametrize(("own", "low", "high"), [(1, 0.0, 1.0), (2, 1.0, 1.0)])
def test_a_self_gate_adds_less_than_one_for_one_expert_and_one_for_several(own: int, low: float, high: float) -> None:
    routing = routings(network(task_own=own), inputs())[1]

    added = (routing.weight - routing.probs_NE).sum(-1)
    assert (added >= low - 1e-12).all()
    assert (added <= high + 1e-12).all()
    assert own == 2 or ((added > 0) & (added < 1)).all()


def test_a_gate_that_sees_nothing_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="an expert in every row"):
        StackedGates(4, [[True, False], [False, False]], [(0,), (0,)])
    with pytest.raises(ValueError, match="at least one state to read"):
        StackedGates(4, [[True, False], [False, True]], [(0,), ()])
    with pytest.raises(ValueError, match="an expert in every row"):
        home(meta_shared=0, meta_category=0)(DIM, FACTS)


@pytest.mark.parametrize("mixing", ["softmax", "uniform", "shuffled"])
def test_gates_say_whether_their_weights_depend_on_the_mates_of_a_row(mixing: str) -> None:
    gates = StackedGates(4, [[True, True], [True, True]], [(0,), (0,)], mixing=mixing).eval()
    states = torch.randn(1, 6, 4)
    together, alone = gates(states).weight[:, :3], gates(states[:, :3]).weight

    assert gates.pool == ("batch" if mixing == "shuffled" else "row")
    assert torch.allclose(together, alone) == (gates.pool == "row")


@pytest.mark.parametrize("residual", ["none", "self_gate", "constant", "ones"])
@pytest.mark.parametrize("mixing", ["softmax", "uniform", "constant"])
def test_gates_in_bfloat16_are_those_of_their_rounded_parameters(mixing: str, residual: str) -> None:
    tables = {"sees": [[True, False, True], [True, True, False]], "owns": [[True, False, False], [False, True, False]]}
    low = StackedGates(4, reads=[(0,), (0, 1)], mixing=mixing, residual=residual, **tables).bfloat16()
    rounded, states = copy.deepcopy(low).float(), torch.randn(2, 6, 4).bfloat16()
    found, wanted = low(states), rounded(states.float())

    assert found.weight.dtype == torch.float32
    torch.testing.assert_close(found.weight, wanted.weight)
    torch.testing.assert_close(found.probs_NE, wanted.probs_NE)


def gradients(net: RankingNet, loss: Tensor, level: int) -> Tensor:
    return torch.autograd.grad(loss, net.levels[level].moe.experts.weight, retain_graph=True)[0].flatten(1).norm(dim=1)


def test_no_loss_reaches_the_experts_of_a_foreign_category() -> None:
    net = network()
    logits = net(inputs())
    names = net.levels[1].plan.experts
    for t, task in enumerate(TASKS):
        category = FACTS["categories"][t]
        norms = dict(zip(names, gradients(net, logits[:, t].sum(), 1).tolist(), strict=True))
        reached = {name for name, norm in norms.items() if norm > 0}
        assert reached == {"shared", category, task}

    one = network(levels=1)  # with two levels the shared state leads to all experts of the first
    logits = one(inputs())
    for t, category in enumerate(FACTS["categories"]):
        norms = gradients(one, logits[:, t].sum(), 0)
        foreign = torch.tensor([name.split(".")[0] not in (category, "shared") for name in one.levels[0].plan.experts])
        assert not norms[foreign].any()
        assert (norms[~foreign] > 0).all()


@pytest.mark.parametrize("self_gates", [True, False])
def test_self_gates_keep_the_gradient_of_a_tasks_own_expert_when_its_gate_ignores_it(self_gates: bool) -> None:
    net, x = network(self_gates=self_gates), inputs()
    level = net.levels[1]
    own = [level.plan.experts.index(task) for task in TASKS]

    def norms() -> list[float]:
        logits = net(x)
        return [float(gradients(net, logits[:, t].sum(), 1)[own[t]]) for t in range(len(TASKS))]

    before = norms()
    router = level.moe.router
    place = router.place_mixing.view(-1, len(TASKS), len(level.plan.experts))
    with torch.no_grad():
        for t, e in enumerate(own):
            slot = int(place[:, t, e].nonzero())
            router.bias[router.bias_index[slot]] -= 60.0
    after = norms()

    for old, new in zip(before, after, strict=True):
        assert (new > 0.01 * old) == self_gates
        assert self_gates or new < 1e-8 * old


def test_permuting_tasks_permutes_outputs() -> None:
    order = [3, 0, 4, 1, 2]
    facts = {"tasks": [TASKS[t] for t in order], "categories": [FACTS["categories"][t] for t in order]}
    net, x = network(), inputs()
    other = network(facts, category_order=["act", "watch"])
    first, second = net.levels[1], other.levels[1]
    other.levels[0].load_state_dict(net.levels[0].state_dict())
    moved = [first.plan.experts.index(name) for name in second.plan.experts]
    with torch.no_grad():
        for name, value in second.moe.experts.state_dict().items():
            value.copy_(first.moe.experts.state_dict()[name][moved])
        for name, value in second.feature_gates.state_dict().items():
            value.copy_(first.feature_gates.state_dict()[name][moved])  # one view per expert here
        for name, value in other.towers.state_dict().items():
            value.copy_(net.towers.state_dict()[name][order])
        copy_gates(first, second, order)

    torch.testing.assert_close(other(x), net(x)[:, order])


def copy_gates(first: Any, second: Any, order: list[int]) -> None:
    """Copy weights of gates between two levels whose tasks are ordered differently: by task, expert and state."""

    def rows(level: Any) -> dict[tuple[str, int, str], tuple[list[int], int]]:
        router, plan = level.moe.router, level.plan
        place = router.place.view(router.num_slots, router.num_columns, router.num_gates, router.num_experts)
        found = {}
        for k, q, g, e in place.nonzero().tolist():
            x = k * router.num_columns + q
            weights = [i for i in router.index[:, x].tolist() if i < len(router.weight)]
            found[plan.gates[g], int(q >= router.num_gates), plan.experts[e]] = weights, int(router.bias_index[x])
        return found

    source, target = rows(first), rows(second)
    assert source.keys() == target.keys()
    for key, (weights, bias) in target.items():
        old_weights, old_bias = source[key]
        second.moe.router.weight[weights] = first.moe.router.weight[old_weights]
        second.moe.router.bias[bias] = first.moe.router.bias[old_bias]


def test_evaluation_answers_each_row_alone() -> None:
    net, x = network(), inputs(12)
    for _ in range(3):
        net(x)
    net.eval()

    together = net(x)

    torch.testing.assert_close(torch.cat([net(x[:, i : i + 1]) for i in range(12)]), together)


def test_one_row_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match=r"got 1 row\(s\) in training mode"):
        network()(inputs(1))


def test_batch_norm_gives_every_expert_the_mean_beta_and_the_deviation_gamma() -> None:
    net, x = network(activation="identity"), inputs(400)
    bank = net.levels[0].moe.experts

    h = bank.every(net.levels[0].feature_gates(x))

    torch.testing.assert_close(h.mean(0), bank.beta, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h.std(0, correction=0), bank.gamma.abs(), rtol=1e-3, atol=1e-3)


def test_experts_differ_at_the_start() -> None:
    net = home(width=8)(DIM, FACTS)
    for level in net.levels:
        weight = level.moe.experts.weight.flatten(1)
        assert (torch.cdist(weight, weight) + torch.eye(len(weight)) > 0.1).all()


# --- ablations, controls, categories ---


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "none", "activation": "relu"},
        {"norm": "layer"},
        {"mask": False},
        {"feature_gates": 0},
        {"self_gates": False},
        {"levels": 1},
        {"category_choice": "one"},
        {"category_choice": "random"},
        {"mixing": "uniform"},
        {"mixing": "shuffled"},
        {"task_own": 0},
        {"hidden": 5},
    ],
    ids=str,
)
def test_every_switch_gives_a_network_that_learns_in_all_its_parameters(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    net = network(**options)

    logits = net(inputs(30))

    assert logits.shape == (30, 5)
    found = torch.autograd.grad((logits * torch.randn_like(logits)).sum(), list(net.parameters()))
    assert all(g.any() for g in found)


def test_without_the_mask_every_gate_sees_every_expert() -> None:
    for routing in routings(network(mask=False), inputs()):
        assert routing.allowed.all()


def test_uniform_gates_weigh_alike_and_shuffled_gates_are_told_nothing_of_the_row() -> None:
    uniform = routings(network(mixing="uniform"), inputs())[0].probs_NE
    assert {round(w, 6) for w in uniform.flatten().tolist()} == {0.0, 0.25, round(1 / 6, 6)}

    plain, shuffled = network(), network(mixing="shuffled")
    shuffled.load_state_dict(plain.state_dict())
    x = inputs(8)
    a, b = (routings(net, x)[0] for net in (plain, shuffled))
    torch.testing.assert_close(b.weight, a.weight.roll(4, 1))
    torch.testing.assert_close(b.probs_NE, a.probs_NE.roll(4, 1))


def test_random_categories_keep_the_sizes_and_are_never_the_given_ones() -> None:
    tree = TaskTree.from_facts(FACTS)
    for seed in range(20):
        dealt = tree.shuffled(seed)
        assert sorted(dealt.category) == sorted(tree.category)
        assert dealt.category not in (tree.category, tuple(1 - c for c in tree.category))
        assert dealt == tree.shuffled(seed)
    with pytest.raises(ValueError, match="assigned in another way"):
        TaskTree(("a", "b"), (0, 1), ("x", "y")).shuffled(0)


def test_categories_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expects categories .*shop.*have .*watch"):
        home(category_order=["act", "shop"])(DIM, FACTS)
    with pytest.raises(ValueError, match="expects categories"):
        home(category_order=["act"])(DIM, FACTS)
    with pytest.raises(ValueError, match="4 categories for 5 tasks"):
        TaskTree(tuple(TASKS), (0, 0, 1, 0), ("act", "watch"))
    with pytest.raises(ValueError, match=r"each of .* needs a task"):
        TaskTree(("a", "b"), (0, 0), ("x", "y"))
    with pytest.raises(ValueError, match="levels=3"):
        home(levels=3)
