# SPDX-License-Identifier: Apache-2.0
"""MixER's compute by hand: a context bends an expert's layers once, then four stages of the solver for every sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeapps.training.cost import count_flops, measure_training
from tasks.dynamics.data.batch import Trajectories
from tasks.dynamics.model import FieldMixER
from tasks.dynamics.module import DynamicsTask
from tasks.dynamics.nets.alternation import Alternation
from tasks.dynamics.nets.experts import GEPSExperts
from tasks.dynamics.nets.gates import GateFactory, robust
from tasks.dynamics.rivals.gates import single

S, N, T, D, WIDTH, E, PIECE = 12, 3, 9, 2, 8, 4, 4
LAYERS = ((D, WIDTH), (WIDTH, WIDTH), (WIDTH, D))
FIELD = sum(2 * n_in * n_out for n_in, n_out in LAYERS)
BEND = sum(2 * n_in * PIECE * n_out + 2 * PIECE * n_out for n_in, n_out in LAYERS)
STAGES = 4


def data(environments: int = S) -> Trajectories:
    numbers = torch.arange(environments)
    x = torch.randn(environments, N, T, D)
    return Trajectories(
        x=x,
        dt=torch.full((environments,), 0.1),
        env=numbers,
        family=numbers % 4,
        mask=None,
        scale=torch.ones(environments),
    )


def task(contributors: int | None = None, warmup: int = 0, gate: GateFactory | None = None) -> DynamicsTask:
    def net(facts: dict[str, Any]) -> FieldMixER:
        return FieldMixER(
            facts,
            experts=lambda d, k, c: GEPSExperts(d, k, c, width=WIDTH, depth=3),
            gate=gate or robust(warmup=warmup),
            num_experts=1 if gate else E,
            context_dim=PIECE if gate else E * PIECE,
        )

    facts = {"domains": {"seen": ["a"], "validation": [], "unseen": []}, "kind": "field"}
    facts |= {"num_environments": S, "state_dim": D}
    alternation = Alternation(context_steps=3, model_steps=9, rollout_share=0.25, contributors=contributors)
    return DynamicsTask(net=net, facts=facts, alternation=alternation)


class RollOut(torch.nn.Module):
    """Whole trajectories of all environments under the gate."""

    def __init__(self, net: FieldMixER) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Trajectories) -> torch.Tensor:
        routing = self.net.route(self.net.contexts, self.net.group(batch))
        return self.net.rollout(batch, self.net.contexts, routing)


def test_a_roll_out_costs_four_stages_a_sample() -> None:
    batch = data()
    gate = 2 * S * E * PIECE * E
    by_hand = gate + S * BEND + S * N * (T - batch.num_given) * STAGES * FIELD

    assert count_flops(RollOut(task().net), batch) == pytest.approx(by_hand, rel=0.01)


def test_steps_of_all_kinds_are_counted_apart() -> None:
    cost = measure_training(task(), data(), planned=48)

    assert cost.planned == {
        "context, one sample ahead": 9,
        "model, one sample ahead": 27,
        "context, roll-out": 3,
        "model, roll-out": 9,
        "fit of the gate": 24,
    }
    assert cost.steps == 48
    ahead = S * N * (T - 1) * STAGES * FIELD
    for kind, flops in cost.step.items():
        if kind == "fit of the gate":  # every expert on every environment, forward
            assert flops == pytest.approx(E * (ahead + S * BEND), rel=0.01)
            continue
        assert 2 * ahead < flops < 3.3 * ahead, kind  # forward, and one or two products of its size backward
    assert cost.flops() == sum(cost.step[kind] * count for kind, count in cost.planned.items())


def test_fits_begin_after_the_warm_up_and_only_a_fitted_gate_has_any() -> None:
    late, fixed = task(warmup=10), task(gate=single())

    assert late.step_kinds(48, 48)["fit of the gate"] == 24 - 9  # the tenth call is the first that reads losses
    assert late.step_kinds(12, 48)["fit of the gate"] == 0
    assert "fit of the gate" not in fixed.step_kinds(48, 48)


def test_a_third_of_the_environments_is_a_third_of_the_compute_of_steps_not_of_fits() -> None:
    whole, part = (measure_training(task(count), data(), planned=48) for count in (None, S // 3))

    steps = {kind: count for kind, count in whole.planned.items() if kind != "fit of the gate"}
    assert part.flops(steps) == pytest.approx(whole.flops(steps) / 3, rel=0.01)
    assert part.step["fit of the gate"] == whole.step["fit of the gate"]
