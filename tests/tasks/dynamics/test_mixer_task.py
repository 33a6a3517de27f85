# SPDX-License-Identifier: Apache-2.0
"""Training, gates and adaptation of MixER: limits, invariances, what must not change, what is told when it fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from moeapps.moe import Capacity, DenseRouting, LinearScore, RobustKMeans, Router, Routing, TopK
from moeapps.training.optim import Cosine, Steps
from tasks.dynamics import gates
from tasks.dynamics.adaptation import Adaptation, FromZeros, TryExperts
from tasks.dynamics.cavia import CaviaTask
from tasks.dynamics.data.batch import Trajectories
from tasks.dynamics.experts import GEPSExperts, PlainExperts, ShallowPLRNNExperts
from tasks.dynamics.gates import GateFactory
from tasks.dynamics.model import FieldMixER, MixER, SequenceMixER, scaled_errors
from tasks.dynamics.modulation import SelfModulation
from tasks.dynamics.module import Alternation, DynamicsTask

E, N, T, D, K, C = 6, 2, 7, 2, 3, 6
DOMAINS = {"domains": {"seen": ["a"], "validation": ["b"], "unseen": ["c"]}}
FACTS = {**DOMAINS, "num_environments": E, "state_dim": D, "kind": "field"}


def spirals(num: int = E, *, new: bool = False, trajectories: int = N) -> Trajectories:
    """Rotations of three speeds, the hidden family, each with two rates of decay."""
    family = torch.arange(num) % 3
    t = 0.2 * torch.arange(T)
    angle = (1 + family)[:, None, None] * t + torch.rand(num, trajectories, 1)
    radius = torch.exp(-0.1 * (torch.arange(num) // 3)[:, None, None] * t)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    scale = x.diff(dim=2).square().mean((1, 2, 3)).sqrt()
    env = torch.full((num,), -1) if new else torch.arange(num)
    return Trajectories(x, torch.full((num,), 0.2), env, family, None, scale, num_support=1 if new else 0)


def network(gate: GateFactory | None = None, *, num_experts: int = K, **options: Any) -> FieldMixER:
    """A small network whose contexts and experts have left their starts."""
    experts = options.pop("experts", partial(GEPSExperts, width=8, same_init=False))
    chosen = gates.robust() if gate is None else gate
    net = FieldMixER(D, E, experts=experts, gate=chosen, num_experts=num_experts, context_dim=C, **options)
    torch.nn.init.normal_(net.contexts)
    return net


def task(net: Callable[[int, int], MixER] | None = None, **options: Any) -> DynamicsTask:
    made = DynamicsTask(net=net or (lambda d, e: network()), facts=FACTS, **options)
    made._trainer = cast(Any, Machine())
    return made


class Machine:
    """The parts of a trainer that a step reads."""

    world_size = 1
    barebones = True
    estimated_stepping_batches = 10
    callbacks: tuple[object, ...] = ()


def predict(net: MixER, data: Trajectories) -> Tensor:
    context = net.contexts[data.env]
    return net.rollout(data, context, net.route(context, net.group(data)))


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_one_expert_behind_any_gate_is_the_single_learner_to_the_bit() -> None:
    data, nets = spirals(), []
    for gate in (gates.single(), gates.published(), gates.by_group(), gates.frozen()):
        torch.manual_seed(3)
        net = FieldMixER(D, E, experts=partial(GEPSExperts, width=8), gate=gate, num_experts=1, context_dim=C)
        torch.manual_seed(4)
        net.layer.experts.reset_parameters()
        torch.nn.init.normal_(net.contexts)
        nets.append(net)
    wanted = predict(nets[0], data)

    assert all(torch.equal(predict(net, data), wanted) for net in nets[1:])


def test_permuting_environments_permutes_predictions_and_keeps_the_partition() -> None:
    net, data, order = network(), spirals(), torch.randperm(E)

    torch.testing.assert_close(predict(net, data.environments(order)), predict(net, data)[order])
    experts = net.best_experts(net.contexts, data.family)
    assert torch.equal(net.best_experts(net.contexts[order], data.family[order]), experts[order])


def test_equal_logits_pick_exactly_one_expert_the_first() -> None:
    net = network()
    for parameter in net.layer.router.parameters():
        parameter.data.zero_()
    routing = net.route(net.contexts, torch.zeros(E, dtype=torch.int64))

    assert isinstance(routing, Routing)
    assert routing.expert_M.tolist() == [0] * E
    assert routing.weight_M.tolist() == [1.0] * E


def test_one_shooting_step_is_the_beginning_of_a_roll_out_and_masks_need_both_ends() -> None:
    net, data = network(), spirals()
    context, routing = net.contexts, net.route(net.contexts, data.family)
    ahead, target, mask = net.shoot(data, context, routing)

    torch.testing.assert_close(ahead[:, :, 0], net.rollout(data, context, routing)[:, :, 1])
    assert torch.equal(target, data.x[:, :, 1:])
    assert mask is None
    data.mask = torch.ones(E, N, T, dtype=torch.bool)
    data.mask[0, 0, 3] = False
    _, _, mask = net.shoot(data, context, routing)
    assert mask is not None
    assert (~mask).nonzero().tolist() == [[0, 0, 2], [0, 0, 3]]


def test_scaled_error_is_one_for_a_prediction_that_stands_still() -> None:
    data = spirals()
    still, target = data.x[:, :, :-1], data.x[:, :, 1:]

    torch.testing.assert_close(scaled_errors(still, target, None, data.scale), torch.ones(E))
    hidden = torch.ones(E, N, T - 1, dtype=torch.bool)
    hidden[:, 0] = False
    wrong = still.clone()
    wrong[:, 0] = torch.inf
    assert scaled_errors(wrong, target, hidden, data.scale).isfinite().all()


@pytest.mark.parametrize(("gate", "learns"), [("frozen", False), ("robust", False), ("switch", True), ("soft", True)])
def test_which_gates_learn_by_gradient(gate: str, learns: bool) -> None:
    net = network(getattr(gates, gate)()).double()
    data = spirals()
    data = Trajectories(data.x.double(), data.dt.double(), data.env, data.family, None, data.scale.double())
    weight = net.layer.router.score.weight

    def loss() -> Tensor:
        routing = net.route(net.contexts, data.family)
        return scaled_errors(*net.shoot(data, net.contexts, routing), data.scale).mean()

    if not learns:
        assert not weight.requires_grad
        return
    (slope,) = torch.autograd.grad(loss(), [weight])
    assert slope.abs().max() > 0
    step, (i, j) = 1e-6, divmod(int(slope.abs().argmax()), weight.shape[1])
    values = []
    for sign in (1, -1):
        weight.data[i, j] += sign * step
        values.append(loss())
        weight.data[i, j] -= sign * step
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), slope[i, j], rtol=1e-5, atol=1e-8)


def test_oracle_gate_recovers_the_families_and_a_table_of_environments_gives_each_its_own() -> None:
    data = spirals()
    net = network(gates.by_group())
    assert torch.equal(net.best_experts(net.contexts, net.group(data)), data.family)
    own = network(gates.by_group(), num_experts=E, route_by="environment", experts=partial(PlainExperts, width=8))
    assert torch.equal(own.best_experts(own.contexts, own.group(data)), data.env)


@pytest.mark.parametrize(("top_k", "capacity"), [(1, None), (2, None), (1, 0.5)])
def test_a_field_is_the_layer_whatever_the_gate_gives(top_k: int, capacity: float | None) -> None:
    def gate(context_dim: int, num_experts: int) -> Router:
        limit = None if capacity is None else Capacity(capacity, minimum=1)
        return Router(LinearScore(context_dim, num_experts), TopK(top_k), capacity=limit)

    net, data = network(gate), spirals()
    routing = net.route(net.contexts, net.group(data))
    assert isinstance(routing, Routing)
    x = torch.randn(E, N, D)

    field = net.field(net.contexts, routing, N)(torch.zeros(E), x)

    side = (net.contexts[:, None].expand(-1, N, -1),)
    torch.testing.assert_close(field, net.layer(x, routing=routing.repeat_rows(N), side=side))
    assert (routing.expert_M == K).any() == (capacity is not None)  # a sentinel is what capacity drops


def test_forced_routing_weighs_as_the_gate_would() -> None:
    expert = torch.tensor([2, 1, 0, 0, 1, 2])
    ones = network().route_to(expert, torch.randn(E, C))
    assert isinstance(ones, Routing)
    assert (ones.expert_M.tolist(), ones.weight_M.tolist()) == (expert.tolist(), [1.0] * E)
    net = network(gates.switch())
    routing = net.route_to(expert, net.contexts)
    assert isinstance(routing, Routing)
    wanted = net.layer.router.score(net.contexts).softmax(-1)[torch.arange(E), expert]
    torch.testing.assert_close(routing.weight_M, wanted)
    assert isinstance(network(gates.soft()).route_to(expert, net.contexts), DenseRouting)


def test_sequence_network_follows_what_is_given_and_then_runs_freely() -> None:
    experts = partial(ShallowPLRNNExperts, hidden=4)
    net = SequenceMixER(D, E, experts=experts, gate=gates.robust(), num_experts=K, context_dim=C)
    torch.nn.init.normal_(net.layer.experts.map)
    with torch.no_grad():
        net.layer.experts.map *= 0.2
    data = spirals()
    data.num_given = 4
    other = Trajectories(**{**vars(data), "x": data.x.clone()})
    other.x[:, :, 4:] += 1
    path, same = predict(net, data), predict(net, other)

    torch.testing.assert_close(path, same)
    assert torch.equal(path[:, :, :4], data.x[:, :, :4])
    ahead, target, _ = net.shoot(data, net.contexts, net.route(net.contexts, data.family))
    assert torch.equal(target, data.x[:, :, 1:])
    torch.testing.assert_close(path[:, :, 4], ahead[:, :, 3])


def test_more_experts_than_environments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts=9 exceeds the 6 training environments"):
        FieldMixER(D, E, experts=GEPSExperts, gate=gates.robust(), num_experts=9, context_dim=9)
    with pytest.raises(ValueError, match="serves one expert, but num_experts=3"):
        network(gates.single())


# --- Training ---------------------------------------------------------------------------------------------------------


def test_proximal_terms_and_their_gradients_vanish_at_the_start_of_a_round() -> None:
    made = task()
    made._round_start = [p.detach().clone() for p in (made.net.contexts, *made.model_parameters)]
    for phase, params in (("context", [made.net.contexts]), ("model", made.model_parameters)):
        value = made._proximal(cast(Any, phase))
        assert float(value.detach()) == 0
        assert all(float(g.abs().sum()) == 0 for g in torch.autograd.grad(value, params))
    made.net.contexts.data += 0.5
    assert float(made._proximal("context").detach()) == pytest.approx(10 / 2 * 0.25)


def test_phases_alternate_and_the_last_share_of_the_steps_trains_roll_outs() -> None:
    options = Alternation(context_steps=2, model_steps=1)
    assert [options.phase(step) for step in range(4)] == ["context", "context", "model", "context"]
    assert [step for step in range(7) if options.begins(step)] == [0, 3, 6]
    made = task(alternation=Alternation(rollout_share=0.3))
    assert [made._trains_rollouts(step) for step in (6, 7, 9)] == [False, True, True]


def test_contributors_are_one_environment_and_its_nearest() -> None:
    made = task(alternation=Alternation(contributors=2))
    made.net.contexts.data = torch.tensor([0.0, 9.0, 4.0, 0.1, 9.1, 4.1])[:, None].expand(E, C).clone()
    found = {tuple(made._contributing(spirals()).env.tolist()) for _ in range(40)}

    assert found == {(0, 3), (1, 4), (2, 5)}


def test_losses_for_the_gate_are_those_of_each_expert_alone() -> None:
    made, data = task(), spirals()
    made._training = data
    contexts, losses = made.routing_losses("net.layer", needed=True)

    assert torch.equal(contexts, made.net.contexts)
    assert losses is not None
    for k in range(K):
        routing = made.net.route_to(torch.full((E,), k), contexts)
        alone = scaled_errors(*made.net.shoot(data, contexts, routing), data.scale)
        torch.testing.assert_close(losses[:, k], alone)
    assert made.routing_losses("net.layer", needed=False)[1] is None


def test_modulation_of_pool_1_is_the_plain_loss_and_of_more_is_another_one() -> None:
    data = spirals()
    made = task()
    plain = made.training_loss(data, rollout=False)
    net = cast(FieldMixER, made.net)
    net.modulation = SelfModulation(order=2, pool=1)
    torch.testing.assert_close(made.training_loss(data, rollout=False), plain)
    net.modulation = SelfModulation(order=2, pool=2)
    loss = made.training_loss(data, rollout=False)
    assert not torch.isclose(loss, plain)
    (gradient,) = torch.autograd.grad(loss, [net.contexts])
    assert (gradient.abs().sum(1) > 0).all()


def test_a_step_that_is_not_finite_is_skipped_counted_and_finally_ends_training() -> None:
    made = task(alternation=Alternation(max_skipped=3))
    before = made.net.contexts.detach().clone()
    for count in (1, 2):
        made._descend(made.net.contexts.sum() * torch.nan, [made.net.contexts], cast(Any, None))
        assert int(made.skipped) == count
    assert torch.equal(made.net.contexts, before)
    with pytest.raises(RuntimeError, match=r"training diverged: 3 steps in a row.*Lower model.optimizer.lr"):
        made._descend(made.net.contexts.sum() * torch.inf, [made.net.contexts], cast(Any, None))


def test_cavia_differentiates_through_its_inner_steps() -> None:
    def net(d: int, e: int) -> MixER:
        return FieldMixER(
            d, e, experts=partial(GEPSExperts, width=8), gate=gates.single(), num_experts=1, context_dim=C
        ).double()

    made = CaviaTask(net=net, facts=FACTS, inner_steps=2, inner_lr=0.05)
    data = spirals()
    data = Trajectories(data.x.double(), data.dt.double(), data.env, data.family, None, data.scale.double())
    weight = made.net.layer.experts.down0
    (slope,) = torch.autograd.grad(made.training_loss(data, rollout=False), [weight])
    assert made.net.contexts.abs().sum() > 0
    values = []
    for sign in (1, -1):
        weight.data[0, 0, 0] += sign * 1e-6
        values.append(float(made.training_loss(data, rollout=False).detach()))
        weight.data[0, 0, 0] -= sign * 1e-6
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(slope[0, 0, 0]), rel=1e-4)
    with pytest.raises(ValueError, match="CAVIA has one expert"):
        CaviaTask(net=lambda d, e: network(), facts=FACTS)


def test_step_schedule_multiplies_at_its_shares() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = Steps([1 / 3, 2 / 3], 0.4)(optimizer, 9), []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()

    assert rates == pytest.approx([1, 1, 1, 0.4, 0.4, 0.4, 0.16, 0.16, 0.16])
    with pytest.raises(ValueError, match="must lie in"):
        Steps([1.0])


@pytest.mark.parametrize(("kind", "steps"), [(DynamicsTask, (6, 4)), (CaviaTask, (1, 10))])
def test_contexts_and_weights_reach_the_end_of_the_schedule_with_their_own_last_step(
    kind: type[DynamicsTask], steps: tuple[int, int]
) -> None:
    made = kind(net=lambda d, e: network(gates.single(), num_experts=1), facts=FACTS, schedule=Cosine())
    made._trainer = cast(Any, Machine())  # ten steps, of which the first six are on contexts, except in CAVIA

    optimizers, schedulers = cast(Any, made.configure_optimizers())

    for optimizer, scheduler, count in zip(optimizers, schedulers, steps, strict=True):
        for _ in range(count):
            assert optimizer.param_groups[0]["lr"] > 0
            optimizer.step()
            scheduler["scheduler"].step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_data_of_another_kind_and_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="the data is a sequence, but FieldMixER models a field; use SequenceMixER"):
        DynamicsTask(net=lambda d, e: network(), facts={**FACTS, "kind": "sequence"})
    with pytest.raises(ValueError, match="facts lacks"):
        DynamicsTask(net=lambda d, e: network(), facts=DOMAINS)
    for wrong in ({"context_steps": 0}, {"prox": -1.0}, {"rollout_share": 2.0}, {"contributors": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Alternation(**wrong)  # type: ignore[arg-type]


# --- Adaptation -------------------------------------------------------------------------------------------------------

WAYS = [FromZeros(steps=4), TryExperts(steps=4), TryExperts(steps=4, loss="rollout")]


@pytest.mark.parametrize("way", WAYS, ids=["zeros", "try", "roll-out"])
@pytest.mark.parametrize("gate", ["robust", "switch", "soft", "by_group"])
def test_adaptation_changes_nothing_but_fresh_contexts(way: Adaptation, gate: str) -> None:
    net, new = network(getattr(gates, gate)()), spirals(4, new=True, trajectories=3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = way(net, new.support, spirals().family)

    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert (tuple(found.context.shape), tuple(found.expert.shape)) == ((4, C), (4,))
    assert found.support_loss.isfinite().all()


@pytest.mark.parametrize("way", WAYS, ids=["zeros", "try", "roll-out"])
def test_one_by_one_and_all_at_once_find_the_same_contexts(way: Adaptation) -> None:
    net, new = network(), spirals(4, new=True, trajectories=3)
    at_once = way(net, new.support, spirals().family)
    way.sequential = True
    one_by_one = way(net, new.support, spirals().family)
    way.sequential = False

    torch.testing.assert_close(one_by_one.context, at_once.context, rtol=1e-3, atol=1e-4)
    assert torch.equal(one_by_one.expert, at_once.expert)


def test_no_step_from_zeros_stays_there_and_trying_starts_from_the_best_expert() -> None:
    net, new = network(), spirals(4, new=True)
    assert FromZeros(steps=0)(net, new.support, spirals().family).context.abs().sum() == 0
    groups = spirals().family
    busy, starts = net.expert_starts(groups)
    found = TryExperts(steps=0)(net, new.support, groups)
    losses = torch.stack(
        [
            scaled_errors(*net.shoot(new.support, c.expand(4, C), net.route_to(k.expand(4), c.expand(4, C))), new.scale)
            for k, c in zip(busy, starts, strict=True)
        ]
    )

    torch.testing.assert_close(found.support_loss, losses.amin(0))
    assert torch.equal(found.expert, busy[losses.argmin(0)])
    torch.testing.assert_close(found.context, starts[losses.argmin(0)])


def test_steps_of_adaptation_lower_the_support_loss() -> None:
    net, new, groups = network(), spirals(4, new=True), spirals().family
    before = TryExperts(steps=0)(net, new.support, groups).support_loss
    after = TryExperts(steps=30)(net, new.support, groups).support_loss

    assert (after < before).all()


def test_partition_state_is_part_of_the_network() -> None:
    net = network()
    keys = [key for key in net.state_dict() if "partition" in key]
    assert sorted(key.rsplit(".", 1)[1] for key in keys) == ["abandoned", "calls", "labels", "same_calls"]
    assert isinstance(net.layer.router.partition, RobustKMeans)
