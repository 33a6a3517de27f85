# SPDX-License-Identifier: Apache-2.0
"""Limiting cases of the mixture inside Point-MoE, and faults of the public code that ours must not have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch_geometric.data import Batch

from moeapps.moe import MoERecorder, SwitchBalance
from moeapps.moe.presets import point_moe
from tasks.point_cloud.model import PointMoE
from tasks.point_cloud.module import PointCloudTask

CONFIGS = Path(__file__).parents[3] / "configs"
FACTS = {
    "domains": {"seen": ["room", "street"], "validation": ["office"], "unseen": []},
    "domain_names": ["room", "street", "office"],
    "label_sets": {"room": ["wall", "floor", "chair"], "street": ["road", "car", "wall"], "office": ["floor", "wall"]},
    "in_dim": 6,
}
SIZES: dict[str, Any] = {
    **{"enc_depths": (1, 1), "enc_dims": (16, 32), "dec_depths": (1,), "dec_dims": (16,), "patch_size": 16},
    **{"drop_path": 0.0, "orders": ("z",)},
}


def network(**options: Any) -> PointMoE:
    return PointMoE(FACTS, **{**SIZES, "moe": point_moe(num_experts=4, top_k=2), **options})


def mixed(make_scan: Any, *domains: int) -> Batch:
    scans = [make_scan(40 + 7 * i, seed=i, domain=d, num_classes=2) for i, d in enumerate(domains)]
    return Batch.from_data_list(scans)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# --- the layer ---


def test_one_expert_is_a_plain_gated_network_and_its_router_learns_nothing() -> None:
    layer, x = point_moe(num_experts=1, top_k=1)(16), torch.randn(9, 16)
    (gate, up), down = layer.experts.w_in[0].chunk(2, dim=1), layer.experts.w_out[0]

    y = layer(x)
    y.square().sum().backward()

    torch.testing.assert_close(y, ((x @ gate).relu() * (x @ up)) @ down)
    for parameter in layer.router.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_a_single_chosen_expert_keeps_its_probability_and_so_its_router_learns() -> None:
    layer, x = point_moe(num_experts=3, top_k=1)(16), torch.randn(9, 16)

    with MoERecorder(layer) as recorder:
        layer(x).square().sum().backward()

    routing = recorder.records[0].routing
    torch.testing.assert_close(routing.weight_M, routing.logits_NE.softmax(1).amax(1))  # not renormalised to 1
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.router.parameters())


def test_two_chosen_experts_share_weight_one_and_the_router_learns() -> None:
    layer, x = point_moe(num_experts=3, top_k=2)(16), torch.randn(9, 16)

    with MoERecorder(layer) as recorder:
        layer(x).square().sum().backward()

    torch.testing.assert_close(recorder.records[0].routing.assignment().sum(1), torch.ones(9))
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.router.parameters())


def test_every_layer_of_the_network_does_k_times_its_rows_of_work(make_scan) -> None:
    batch = mixed(make_scan, 0, 1, 2)
    net = network().eval()
    rows = [int(row.max()) + 1 for row in net.rows(batch)]

    with MoERecorder(net) as recorder:
        net(batch)

    assert len(recorder.records) == 3
    for record in recorder.records:
        assert int(record.routing.counts().sum()) == 2 * record.routing.num_rows
        assert record.routing.num_rows in rows


def test_drop_path_rises_with_depth_and_falls_again_in_the_decoder() -> None:
    net = network(
        drop_path=0.3, enc_depths=(1, 2, 2), enc_dims=(16, 16, 16), dec_depths=(2, 2), dec_dims=(16, 16)
    )  # the bottom is the deepest

    down = [block.drop_path.drop_prob for stage in net.encoder for block in stage.blocks]
    up = [block.drop_path.drop_prob for stage in reversed(net.decoder) for block in stage.blocks]

    assert down == pytest.approx([0, 0.075, 0.15, 0.225, 0.3])
    assert up == pytest.approx([0.3, 0.2, 0.1, 0])


# --- faults of the public code ---


def test_gradients_in_evaluation_are_those_of_training(make_scan) -> None:
    batch, net = mixed(make_scan, 0, 1), network()
    found = []
    for train in (True, False):
        net.train(train)
        for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d)):
            norm.eval()
        net.zero_grad()
        net(batch).square().sum().backward()
        found.append(gradients(net))

    assert found[0].keys() == found[1].keys() == {name for name, _ in net.named_parameters()}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_the_balance_loss_is_scaled_with_the_rest_under_mixed_precision(make_scan) -> None:
    """A loss injected into the backward pass would be divided by 65,536 when the scaler takes its factor back."""
    found = {}
    for weight in (0.0, 0.5):
        for scaled in (False, True):
            torch.manual_seed(0)
            task = PointCloudTask(net=lambda facts: network(), facts=FACTS, aux_losses=[SwitchBalance(weight=weight)])
            task._trainer = SimpleNamespace(barebones=True, optimizers=[], is_last_batch=False)
            optimizer = torch.optim.SGD(task.parameters())
            scaler = torch.amp.GradScaler("cpu", init_scale=65_536.0, enabled=scaled)
            assert scaler.get_scale() == (65_536.0 if scaled else 1.0)
            scaler.scale(task.training_step(mixed(make_scan, 0, 1), 0)).backward()
            scaler.unscale_(optimizer)
            found[weight, scaled] = gradients(task.net.encoder[0])

    name = next(name for name in found[0.0, False] if "router" in name)
    share = found[0.5, False][name] - found[0.0, False][name]
    assert share.abs().max() > 1e-4  # the balance loss has a gradient of its own,
    torch.testing.assert_close(found[0.5, True][name] - found[0.0, True][name], share, rtol=1e-3, atol=1e-6)
    for key, value in found[0.5, False].items():  # and scaling changes nothing
        torch.testing.assert_close(found[0.5, True][key], value, rtol=1e-4, atol=1e-6)


def test_only_the_balance_ablations_have_a_balance_loss() -> None:
    weights = {}
    files = sorted([CONFIGS / "point_moe.yaml", *CONFIGS.glob("baselines/point_moe_*.yaml"), *CONFIGS.glob("paper/*")])
    for path in files:
        model = yaml.safe_load(path.read_text(encoding="utf-8")).get("model", {})
        for loss in model.get("init_args", {}).get("aux_losses") or []:
            weights[path.stem] = loss["init_args"]["weight"]

    assert weights == {"point_moe_balance": 1e-3, "point_moe_balance_strong": 1e-2}


@pytest.mark.parametrize("domains", [(0, 2), (2, 1, 0, 2)])
def test_a_batch_may_mix_label_sets_of_different_sizes(domains: tuple[int, ...], make_scan) -> None:
    task, batch = PointCloudTask(net=lambda facts: network(), facts=FACTS).eval(), mixed(make_scan, *domains)

    answers = task.predict_step(batch)
    out = task.shared_step(batch, "test")

    assert [len(answer["names"]) for answer in answers] == [(3, 3, 2)[domain] for domain in domains]
    assert torch.equal(torch.cat([answer["label"] for answer in answers]), out.metric_args[2])
    for answer, scan in zip(answers, batch.to_data_list(), strict=True):
        alone = task.predict_step(Batch.from_data_list([scan]))[0]
        assert torch.equal(alone["label"], answer["label"])
        assert answer["label"].max() < len(answer["names"])
