# SPDX-License-Identifier: Apache-2.0
"""HoME's network: equal to a loop written from the equations, and the laws of its mask, gates and experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from moeapps.moe import MoERecorder
from tasks.recommendation.model import home
from tasks.recommendation.nets.fast_gates import StackedGates
from tasks.recommendation.nets.feature_gates import FeatureGates
from tasks.recommendation.nets.gates import HomeGates
from tasks.recommendation.nets.levels import RankingNet, TaskTree

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


@pytest.mark.parametrize("own", [1, 2])
@pytest.mark.parametrize("categories", [CATEGORY, [0, 1, 2, 0, 1], [0] * 5], ids=["two", "three", "one"])
def test_network_is_the_equations_of_the_card_in_values_and_all_gradients(own: int, categories: list[int]) -> None:
    facts = {"tasks": TASKS, "categories": [f"c{c}" for c in categories]}
    net, x = network(facts, task_own=own), inputs()

    fast = net(x)
    slow = naive_home(net, x[0], categories, len(set(categories)), own=own)

    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-11)
    probe = torch.randn_like(fast)
    leaves = [x, *net.parameters()]
    found, wanted = (torch.autograd.grad((y * probe).sum(), leaves) for y in (fast, slow))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert b.any()


def weights_one_by_one(stacked: StackedGates, plain: HomeGates) -> dict[str, Tensor]:
    """Parameters of the equation, made of those of the stacked gates; 0 for pairs that a gate does not see."""
    parts, read, found = {"gates": plain.gates}, GateReader(stacked), {}
    if plain.both is not plain.gates:
        parts = dict(zip(("both.routers.0", "both.routers.1"), plain.both.routers, strict=True))
    for name, part in parts.items():
        for g, score in enumerate(part.scores):
            weight, bias = list(torch.zeros_like(score.weight)), list(torch.zeros_like(score.bias))
            for e in part.allowed[g].nonzero()[:, 0].tolist():
                b = next(read.bias)
                weight[e] = torch.cat([stacked.weight[read.row_of[s, b]] for s in stacked.reads[g]])
                bias[e] = stacked.bias[b]
            found |= {f"{name}.scores.{g}.weight": torch.stack(weight), f"{name}.scores.{g}.bias": torch.stack(bias)}
    return found


@pytest.mark.parametrize("self_gates", [True, False])
@pytest.mark.parametrize("own", [1, 2])
def test_stacked_gates_are_the_equation_in_weights_and_all_gradients(own: int, self_gates: bool) -> None:
    for level in network(task_own=own, self_gates=self_gates).levels:
        stacked, plan = level.moe.router, level.plan
        plain = HomeGates(stacked.width, plan.sees, stacked.reads, owns=plan.owns if self_gates else None).double()
        states = torch.randn(4, 7, stacked.width, dtype=torch.float64, requires_grad=True)

        fast = stacked(states)
        slow = functional_call(plain, weights_one_by_one(stacked, plain), states)

        torch.testing.assert_close(fast.weight, slow.weight, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(fast.probs_NE, slow.probs_NE, rtol=1e-12, atol=1e-14)
        probe, leaves = torch.randn_like(fast.weight), [states, stacked.weight, stacked.bias]
        found, wanted = (torch.autograd.grad((r.weight * probe).sum(), leaves) for r in (fast, slow))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
            assert b.any()


def test_the_network_runs_on_gates_one_by_one_and_refuses_what_these_do_not_know() -> None:
    x = inputs()
    assert network(fast_gates=False)(x).shape == (9, len(TASKS))
    with pytest.raises(ValueError, match="fast_gates=True"):
        network(fast_gates=False, mixing="uniform")


@pytest.mark.parametrize("fast_gates", [True, False])
def test_biases_of_own_pairs_close_the_gates_to_their_own_experts_alone(fast_gates: bool) -> None:
    net, x = network(fast_gates=fast_gates), inputs()
    with torch.no_grad():
        for level in net.levels:
            for bias, own in level.moe.router.biases_of(torch.as_tensor(level.plan.owns)):
                bias[own] -= 200.0

    for routing, level in zip(routings(net, x), net.levels, strict=True):
        owns, sees = torch.as_tensor(level.plan.owns), torch.as_tensor(level.plan.sees)
        closed = (sees & ~owns).any(1)  # a gate that sees its own experts alone has nothing else to mix
        probs = routing.probs_NE.detach().transpose(0, 1)[:, closed]
        assert float(probs[:, owns[closed]].max()) < 1e-30
        assert float(probs[:, (sees & ~owns)[closed]].max()) > 0.1


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


def routings(net: nn.Module, x: Tensor) -> list[Any]:
    with MoERecorder(net) as recorder:
        net(x)
    return [record.routing for record in recorder.records]


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
