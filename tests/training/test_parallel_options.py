# SPDX-License-Identifier: Apache-2.0
"""What can be told of networks over several processes without starting any."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed as dist
from torch import nn

from moeapps.moe import GLUExperts, JoinedExperts, LinearScore, MLPExperts, MoELayer, Router, TopK
from moeapps.moe.surgery import one_process_state
from moeapps.training import parallel
from moeapps.training.parallel import ModelParallel, spreadable_layers
from moeapps.training.placement import split_by_mesh
from tests.toy import ToyData, ToyNet, ToyTask


def layer(bank: Any, num_shared: int = 0) -> MoELayer:
    return MoELayer(Router(LinearScore(6, bank.num_experts - num_shared), TopK(1)), bank, num_shared=num_shared)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"experts": 0}, "experts=0 is not allowed; use 'node', or"), ({"rest": "halved"}, "rest='halved' is unknown")],
)
def test_wrong_options_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ModelParallel(**options)


def test_scaled_losses_are_refused_before_anything_starts() -> None:
    strategy = ModelParallel(experts=1)
    strategy.parallel_devices, strategy.cluster_environment = [torch.device("cpu")], LightningEnvironment()
    strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    with pytest.raises(ValueError, match=r"give --trainer\.precision bf16-mixed"):
        strategy.setup_environment()


def test_a_strategy_for_networks_that_place_themselves_is_refused() -> None:
    task = ToyTask(net=ToyNet(), facts=ToyData().facts)
    task.configure_model()  # outside of a trainer there is nothing to place
    task._trainer = SimpleNamespace(strategy=ModelParallelStrategy(), barebones=False)  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"use moeapps\.training\.parallel\.ModelParallel"):
        task.configure_model()


def test_names_of_a_spread_network_become_those_of_one_process() -> None:
    net = nn.Sequential(layer(MLPExperts(5, 6, 8), 2), layer(MLPExperts(3, 6, 8)), layer(two_widths(), 1))
    whole = net.state_dict()
    cut = {key: value for key, value in whole.items() if not key.startswith("0.experts.")}
    for name, value in net[0].experts.named_parameters():
        cut[f"0.experts.banks.0.{name}"], cut[f"0.experts.banks.1.{name}"] = value[:3], value[3:]

    for state, split in ((cut, ["0.experts"]), (whole, [])):
        found = one_process_state(state, split)
        assert set(found) == set(whole)
        assert all(torch.equal(value, whole[key]) for key, value in found.items())


def two_widths() -> JoinedExperts:
    return JoinedExperts([GLUExperts(3, 6, 8), GLUExperts(1, 6, 4)])


def test_layers_of_stacked_experts_are_spread_and_no_others() -> None:
    from moeapps.moe import ConstantScore, Dense, ModuleExperts

    modules = MoELayer(Router(ConstantScore(2), Dense()), ModuleExperts([nn.Linear(6, 6), nn.Linear(6, 6)]))
    one = MoELayer(Router(ConstantScore(1), Dense()), MLPExperts(1, 6, 8))
    stacked = [layer(MLPExperts(4, 6, 8)), layer(two_widths(), 1)]

    assert spreadable_layers(nn.ModuleList([modules, one, *stacked])) == stacked


def test_groups_of_parameters_on_one_device_stay_as_they_are() -> None:
    groups = [{"params": list(nn.Linear(2, 2).parameters()), "name": "default", "lr": 0.1}]

    assert split_by_mesh(groups) == groups


def test_a_network_that_is_used_between_steps_stays_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its gradients are averaged once, however often it is placed (for the fit, then for the test)."""
    three_processes = SimpleNamespace(
        broadcast=lambda tensor, source: None,
        all_reduce=lambda tensor, op=None: tensor.mul_(6) if op is None else None,
        get_world_size=lambda: 3,
        ReduceOp=dist.ReduceOp,
    )
    monkeypatch.setattr(parallel, "dist", three_processes)
    monkeypatch.setattr(ToyTask, "stays_whole", True)
    strategy = ModelParallel()
    strategy.parallel_devices = [torch.device("cpu")]
    strategy.cluster_environment = LightningEnvironment()
    task = ToyTask(net=ToyNet(), facts=ToyData().facts)
    alone = copy.deepcopy(task)
    with caplog.at_level("INFO", logger="moeapps"):
        for _ in range(2):
            strategy.spread(task)

    for module in (task, alone):
        loss = sum(p.square().sum() for p in module.parameters())
        loss.backward()
        if module is task:
            strategy.post_backward(loss)
    for ours, wanted in zip(task.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, 2 * wanted.grad)
        assert type(ours) is nn.Parameter
    assert [record.message for record in caplog.records] == [
        "ToyTask uses its network between steps: all of it stays on every process"
    ]


def test_systems_that_use_their_network_between_steps_say_so() -> None:
    from tasks.adaptation.module import AdaptationTask
    from tasks.dynamics.module import DynamicsTask

    assert AdaptationTask.stays_whole
    assert DynamicsTask.stays_whole
