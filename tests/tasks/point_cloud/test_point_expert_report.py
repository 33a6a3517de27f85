# SPDX-License-Identifier: Apache-2.0
"""The expert report: information of experts about domain and class, counted over every voxel at every resolution."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from moeapps.moe import MoERecorder, Routing
from moeapps.moe.presets import dense, point_moe
from moeapps.moe.record import place_of
from moeapps.training.callbacks.experts import group_names, with_means
from tasks.point_cloud.model import PointMoE
from tasks.point_cloud.module import PointCloudTask
from tasks.point_cloud.report.experts import VoxelExpertReport, informations
from tests.tasks.point_cloud.rivals_common import ATTENTION, FACTS, mixed


def idle_trainer() -> SimpleNamespace:
    """What the report asks of a trainer that writes nothing."""
    data = SimpleNamespace(present=lambda role: ["room", "street"])
    return SimpleNamespace(datamodule=data, world_size=1, is_global_zero=True, fast_dev_run=True, barebones=False)


def test_information_of_experts_that_follow_domain_or_class_alone() -> None:
    by_domain = torch.tensor([[[3.0, 0], [5, 0]], [[0, 1], [0, 1]]]).double()  # (D, L, E)
    by_class = torch.tensor([[[3.0, 0], [0, 3]], [[7, 0], [0, 7]]]).double()
    idle = torch.ones(2, 2, 2).double()

    told = informations({"class": by_domain, "range": idle})
    assert (told["mi_domain"], told["mi_class_within"], told["mi_range_within"]) == pytest.approx((1.0, 0.0, 0.0))
    told = informations({"class": by_class})
    assert (told["mi_domain"], told["mi_class"], told["mi_class_within"]) == pytest.approx((0.0, 1.0, 1.0))
    many = torch.cat([by_domain[:1] * 1000, by_domain[1:]])
    assert informations({"class": many})["mi_domain"] == pytest.approx(1.0), "domains weigh the same"


def test_means_are_taken_over_the_layers_of_encoder_and_decoder() -> None:
    layers = {"encoder.0.0": {"mi": 0.1}, "encoder.1.0": {"mi": 0.3}, "decoder.0.0": {"mi": 0.5}}

    assert with_means(layers) == {"encoder": {"mi": pytest.approx(0.2)}, "decoder": {"mi": 0.5}, **layers}
    place, other = place_of("net.encoder.2.blocks.1.attn.proj"), place_of("net.decoder.0.blocks.0.attn.proj")
    assert group_names([place, other]) == {place: "encoder.2.1", other: "decoder.0.0"}
    assert place.numbers[0] == 2


def test_report_counts_every_voxel_at_every_resolution(make_scan) -> None:
    task = PointCloudTask(net=partial(PointMoE, moe=point_moe(), **ATTENTION), facts=FACTS).eval()
    trainer = idle_trainer()
    task.trainer = trainer
    report = VoxelExpertReport()
    report.on_test_epoch_start(trainer, task)
    total = 0
    for index, name in enumerate(["room", "street", "office"]):
        batch = mixed(make_scan, index, index)
        batch.y[:5] = -1
        with MoERecorder(task) as recorder:
            task.net(batch)
        task.last_records, task.last_domain = recorder.records, name
        report.on_test_batch_end(trainer, task, None, batch, 0, index)
        total += 0 if name == "office" else len(batch.y)
    report.on_test_epoch_end(trainer, task)

    result = report.describe_results()
    assert set(result) == {"encoder", "decoder", "encoder.0.0", "encoder.1.0", "decoder.0.0"}
    assert set(result["encoder"]) == {
        "mi_domain",
        "mi_class",
        *(f"mi_{f}_within" for f in ("class", "normal", "range")),
    }
    assert all(0 <= value <= 1 for numbers in result.values() for value in numbers.values())
    for layer in report.layers.values():
        tables = layer.tables
        assert tables["range"].sum().item() == pytest.approx(total)
        assert tables["class"].sum().item() == pytest.approx(total - 10)
        assert tables["class"].shape == (2, 5, 4)  # wall is one class of two domains


def test_report_of_an_oracle_router_is_one(make_scan) -> None:
    task = PointCloudTask(net=partial(PointMoE, moe=point_moe(), **ATTENTION), facts=FACTS).eval()
    trainer = idle_trainer()
    task.trainer = trainer
    report = VoxelExpertReport()
    report.on_test_epoch_start(trainer, task)
    batch = mixed(make_scan, 0)
    with MoERecorder(task) as recorder:
        task.net(batch)
    row = task.net.rows(batch)[0].argsort()
    expert = batch.y[row]
    oracle = Routing(torch.arange(len(row)), expert, torch.ones(len(row)), len(row), 4)
    task.last_records = [replace(recorder.records[0], routing=oracle)]
    task.last_domain = "room"
    report.on_test_batch_end(trainer, task, None, batch, 0)
    report.on_test_epoch_end(trainer, task)

    assert report.result["encoder.0.0"]["mi_class_within"] == pytest.approx(1.0)


def test_a_dense_network_has_nothing_to_report(make_scan) -> None:
    task = PointCloudTask(net=partial(PointMoE, moe=dense(), **ATTENTION), facts=FACTS).eval()
    trainer = idle_trainer()
    task.trainer, task.last_domain = trainer, "room"
    report, batch = VoxelExpertReport(), mixed(make_scan, 0)
    report.on_test_epoch_start(trainer, task)
    with MoERecorder(task) as recorder:
        task.net(batch)
    task.last_records = recorder.records
    report.on_test_batch_end(trainer, task, None, batch, 0)
    report.on_test_epoch_end(trainer, task)

    assert report.describe_results() == {}
