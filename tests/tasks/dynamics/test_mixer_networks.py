# SPDX-License-Identifier: Apache-2.0
"""Networks, gates and adaptation of MixER: limits, invariances, and what must not change."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from moeapps.moe import Capacity, DenseRouting, LinearScore, Router, Routing, TopK
from tasks.dynamics.data.batch import Trajectories
from tasks.dynamics.losses import scaled_errors
from tasks.dynamics.model import FieldMixER, MixER, SequenceMixER
from tasks.dynamics.nets import gates
from tasks.dynamics.nets.adaptation import Adaptation, FromZeros, TryExperts
from tasks.dynamics.nets.experts import GEPSExperts, PlainExperts, ShallowPLRNNExperts
from tasks.dynamics.nets.partition import RobustKMeans
from tasks.dynamics.rivals import gates as rival_gates
from tests.tasks.dynamics.mixer_common import SIZES, C, D, E, N, S, T, network, spirals

GATES = {**vars(gates), **vars(rival_gates)}


def predict(net: MixER, data: Trajectories) -> Tensor:
    context = net.contexts[data.env]
    return net.rollout(data, context, net.route(context, net.group(data)))


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_one_expert_behind_any_gate_is_the_single_learner_to_the_bit() -> None:
    data, nets = spirals(), []
    for gate in (rival_gates.single(), gates.published(), rival_gates.by_group(), rival_gates.frozen()):
        torch.manual_seed(3)
        net = FieldMixER(SIZES, experts=partial(GEPSExperts, width=8), gate=gate, num_experts=1, context_dim=C)
        torch.manual_seed(4)
        net.layer.experts.reset_parameters()
        torch.nn.init.normal_(net.contexts)
        nets.append(net)
    wanted = predict(nets[0], data)

    assert all(torch.equal(predict(net, data), wanted) for net in nets[1:])


def test_permuting_environments_permutes_predictions_and_keeps_the_partition() -> None:
    net, data, order = network(), spirals(), torch.randperm(S)

    torch.testing.assert_close(predict(net, data.environments(order)), predict(net, data)[order])
    experts = net.best_experts(net.contexts, data.family)
    assert torch.equal(net.best_experts(net.contexts[order], data.family[order]), experts[order])


def test_equal_logits_pick_exactly_one_expert_the_first() -> None:
    net = network()
    for parameter in net.layer.router.parameters():
        parameter.data.zero_()
    routing = net.route(net.contexts, torch.zeros(S, dtype=torch.int64))

    assert isinstance(routing, Routing)
    assert routing.expert_M.tolist() == [0] * S
    assert routing.weight_M.tolist() == [1.0] * S


def test_one_shooting_step_is_the_beginning_of_a_roll_out_and_masks_need_both_ends() -> None:
    net, data = network(), spirals()
    context, routing = net.contexts, net.route(net.contexts, data.family)
    ahead, target, mask = net.shoot(data, context, routing)

    torch.testing.assert_close(ahead[:, :, 0], net.rollout(data, context, routing)[:, :, 1])
    assert torch.equal(target, data.x[:, :, 1:])
    assert mask is None
    data.mask = torch.ones(S, N, T, dtype=torch.bool)
    data.mask[0, 0, 3] = False
    _, _, mask = net.shoot(data, context, routing)
    assert mask is not None
    assert (~mask).nonzero().tolist() == [[0, 0, 2], [0, 0, 3]]


def test_scaled_error_is_one_for_a_prediction_that_stands_still() -> None:
    data = spirals()
    still, target = data.x[:, :, :-1], data.x[:, :, 1:]

    torch.testing.assert_close(scaled_errors(still, target, None, data.scale), torch.ones(S))
    hidden = torch.ones(S, N, T - 1, dtype=torch.bool)
    hidden[:, 0] = False
    wrong = still.clone()
    wrong[:, 0] = torch.inf
    assert scaled_errors(wrong, target, hidden, data.scale).isfinite().all()


@pytest.mark.parametrize(("gate", "learns"), [("frozen", False), ("robust", False), ("switch", True), ("soft", True)])
def test_which_gates_learn_by_gradient(gate: str, learns: bool) -> None:
    net = network(GATES[gate]()).double()
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
    net = network(rival_gates.by_group())
    assert torch.equal(net.best_experts(net.contexts, net.group(data)), data.family)
    own = network(rival_gates.by_group(), num_experts=S, route_by="environment", experts=partial(PlainExperts, width=8))
    assert torch.equal(own.best_experts(own.contexts, own.group(data)), data.env)


@pytest.mark.parametrize(("top_k", "capacity"), [(1, None), (2, None), (1, 0.5)])
def test_a_field_is_the_layer_whatever_the_gate_gives(top_k: int, capacity: float | None) -> None:
    def gate(context_dim: int, num_experts: int) -> Router:
        limit = None if capacity is None else Capacity(capacity, minimum=1)
        return Router(LinearScore(context_dim, num_experts), TopK(top_k), capacity=limit)

    net, data = network(gate), spirals()
    routing = net.route(net.contexts, net.group(data))
    assert isinstance(routing, Routing)
    x = torch.randn(S, N, D)

    field = net.field(net.contexts, routing, N)(torch.zeros(S), x)

    side = (net.contexts[:, None].expand(-1, N, -1),)
    torch.testing.assert_close(field, net.layer(x, routing=routing.repeat_rows(N), side=side))
    assert (routing.expert_M == E).any() == (capacity is not None)  # a sentinel is what capacity drops


def test_forced_routing_weighs_as_the_gate_would() -> None:
    expert = torch.tensor([2, 1, 0, 0, 1, 2])
    ones = network().route_to(expert, torch.randn(S, C))
    assert isinstance(ones, Routing)
    assert (ones.expert_M.tolist(), ones.weight_M.tolist()) == (expert.tolist(), [1.0] * S)
    net = network(rival_gates.switch())
    routing = net.route_to(expert, net.contexts)
    assert isinstance(routing, Routing)
    wanted = net.layer.router.score(net.contexts).softmax(-1)[torch.arange(S), expert]
    torch.testing.assert_close(routing.weight_M, wanted)
    assert isinstance(network(rival_gates.soft()).route_to(expert, net.contexts), DenseRouting)


def test_sequence_network_follows_what_is_given_and_then_runs_freely() -> None:
    experts = partial(ShallowPLRNNExperts, hidden=4)
    net = SequenceMixER(SIZES, experts=experts, gate=gates.robust(), num_experts=E, context_dim=C)
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
        FieldMixER(SIZES, experts=GEPSExperts, gate=gates.robust(), num_experts=9, context_dim=9)
    with pytest.raises(ValueError, match="serves one expert, but num_experts=3"):
        network(rival_gates.single())


def test_partition_state_is_part_of_the_network() -> None:
    net = network()
    keys = [key for key in net.state_dict() if "partition" in key]
    assert sorted(key.rsplit(".", 1)[1] for key in keys) == ["abandoned", "calls", "labels", "same_calls"]
    assert isinstance(net.layer.router.partition, RobustKMeans)


# --- Adaptation -------------------------------------------------------------------------------------------------------


WAYS = [FromZeros(steps=4), TryExperts(steps=4), TryExperts(steps=4, loss="rollout")]


@pytest.mark.parametrize("way", WAYS, ids=["zeros", "try", "roll-out"])
@pytest.mark.parametrize("gate", ["robust", "switch", "soft", "by_group"])
def test_adaptation_changes_nothing_but_fresh_contexts(way: Adaptation, gate: str) -> None:
    net, new = (
        network(GATES[gate]()),
        spirals(4, new=True, trajectories=3),
    )
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
