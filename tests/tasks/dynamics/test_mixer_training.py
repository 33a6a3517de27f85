# SPDX-License-Identifier: Apache-2.0
"""Training of MixER: which steps train what, what the gate is fitted to, and what is told when it fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from moeapps.cli import main
from moeapps.training.optim import Cosine
from tasks.dynamics.data.batch import Trajectories
from tasks.dynamics.losses import scaled_errors
from tasks.dynamics.model import FieldMixER, MixER
from tasks.dynamics.module import DynamicsTask
from tasks.dynamics.nets.alternation import Alternation
from tasks.dynamics.nets.experts import GEPSExperts
from tasks.dynamics.nets.modulation import SelfModulation
from tasks.dynamics.rivals import gates as rival_gates
from tasks.dynamics.rivals.cavia import CaviaTask
from tests.systems import CONFIGS, tiny
from tests.tasks.dynamics.mixer_common import C, D, E, S, network, spirals

DOMAINS = {"domains": {"seen": ["a"], "validation": ["b"], "unseen": ["c"]}}
FACTS = {**DOMAINS, "num_environments": S, "state_dim": D, "kind": "field"}


def task(net: Callable[[int, int], MixER] | None = None, **options: Any) -> DynamicsTask:
    made = DynamicsTask(net=net or (lambda facts: network()), facts=FACTS, **options)
    made._trainer = cast(Any, Machine())
    return made


class Machine:
    """The parts of a trainer that a step reads."""

    world_size = 1
    barebones = True
    estimated_stepping_batches = 10
    callbacks: tuple[object, ...] = ()


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
    made.net.contexts.data = torch.tensor([0.0, 9.0, 4.0, 0.1, 9.1, 4.1])[:, None].expand(S, C).clone()
    found = {tuple(made._contributing(spirals()).env.tolist()) for _ in range(40)}

    assert found == {(0, 3), (1, 4), (2, 5)}


def test_losses_for_the_gate_are_those_of_each_expert_alone() -> None:
    made, data = task(), spirals()
    made._training = data
    contexts, losses = made.routing_losses("net.layer", needed=True)

    assert torch.equal(contexts, made.net.contexts)
    assert losses is not None
    for k in range(E):
        routing = made.net.route_to(torch.full((S,), k), contexts)
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


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_that_no_roll_out_survives_are_told(
    precision: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *tiny(CONFIGS / "mixer.yaml"), "--trainer.precision", precision]) == 2

    assert f"--trainer.precision {precision}: a roll-out needs 32-true" in capfd.readouterr().err


def test_cavia_differentiates_through_its_inner_steps() -> None:
    def net(facts: dict[str, Any]) -> MixER:
        sizes = {"num_experts": 1, "context_dim": C}
        return FieldMixER(facts, experts=partial(GEPSExperts, width=8), gate=rival_gates.single(), **sizes).double()

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
    near, found = made.training_loss(data, rollout=False), made.net.contexts.detach().clone()
    rolled = made.training_loss(data, rollout=True)
    assert torch.equal(made.net.contexts, found)  # a descent on whole roll-outs diverges
    assert float(rolled.detach()) != pytest.approx(float(near.detach()), rel=1e-3)
    made.net.layer.experts.down0.data *= 1e3  # steep: an inner step is no longer than its rate
    made.training_loss(data, rollout=False)
    assert made.net.contexts.norm(dim=1).max() <= 2 * 0.05 + 1e-9
    with pytest.raises(ValueError, match="CAVIA has one expert"):
        CaviaTask(net=lambda facts: network(), facts=FACTS)


@pytest.mark.parametrize(("kind", "steps"), [(DynamicsTask, (6, 4)), (CaviaTask, (1, 10))])
def test_contexts_and_weights_reach_the_end_of_the_schedule_with_their_own_last_step(
    kind: type[DynamicsTask], steps: tuple[int, int]
) -> None:
    made = kind(net=lambda facts: network(rival_gates.single(), num_experts=1), facts=FACTS, schedule=Cosine())
    made._trainer = cast(Any, Machine())  # ten steps, of which the first six are on contexts, except in CAVIA

    optimizers, schedulers = cast(Any, made.configure_optimizers())

    for optimizer, scheduler, count in zip(optimizers, schedulers, steps, strict=True):
        for _ in range(count):
            assert optimizer.param_groups[0]["lr"] > 0
            optimizer.step()
            scheduler["scheduler"].step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_a_round_that_a_checkpoint_holds_goes_on_where_the_network_is() -> None:
    """A checkpoint is read to the CPU; the network may be elsewhere when training starts."""
    made = task()
    made.on_load_checkpoint({"round_start": [p.detach().clone() for p in (made.net.contexts, *made.model_parameters)]})
    made.to("meta")
    cast(Any, made._trainer).global_step = 1
    made.on_train_start()

    assert {value.device.type for value in made._round_start} == {"meta"}


def test_data_of_another_kind_and_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="the data is a sequence, but FieldMixER models a field; use SequenceMixER"):
        DynamicsTask(net=lambda facts: network(), facts={**FACTS, "kind": "sequence"})
    with pytest.raises(ValueError, match="facts lacks"):
        DynamicsTask(net=lambda facts: network(), facts=DOMAINS)
    for wrong in ({"context_steps": 0}, {"prox": -1.0}, {"rollout_share": 2.0}, {"contributors": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Alternation(**wrong)  # type: ignore[arg-type]
