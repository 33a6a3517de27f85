# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Batch

from moeapps.evaluation.units import pooled_score
from moeapps.moe import MoERecorder, Record, Routing
from moeapps.training.scores import DomainScores
from tasks.point_cloud.losses import segmentation_loss
from tasks.point_cloud.metrics import confusion, scores
from tasks.point_cloud.model import PointMoE
from tasks.point_cloud.module import PointCloudTask, voxel_experts
from tasks.point_cloud.nets.text import RandomText
from tasks.point_cloud.report.figures import picture_of

FACTS = {
    "domains": {"seen": ["room", "street"], "validation": ["office"], "unseen": []},
    "domain_names": ["room", "street", "office"],
    "label_sets": {"room": ["wall", "floor", "chair"], "street": ["road", "car", "wall"], "office": ["floor", "wall"]},
    "in_dim": 6,
}


def task_of(moe, **options) -> PointCloudTask:
    sizes = {"enc_depths": (1, 1), "enc_dims": (16, 32), "dec_depths": (1,), "dec_dims": (16,), "patch_size": 16}
    return PointCloudTask(net=partial(PointMoE, moe=moe, **sizes), facts=FACTS, **options)


def mixed_batch(make_scan) -> Batch:
    return Batch.from_data_list([make_scan(40 + 5 * i, seed=i, domain=i % 2) for i in range(4)])


def test_each_domain_weighs_the_same_whatever_its_number_of_points(make_scan, naive_moe) -> None:
    task = task_of(naive_moe).eval()
    batch = mixed_batch(make_scan)
    domain = batch.domain[batch.batch]

    out = task.shared_step(batch, "train")

    features = task.net(batch)
    parts = [
        segmentation_loss(task.head(features, name)[domain == i], batch.y[domain == i])["loss"]
        for i, name in enumerate(["room", "street"])
    ]
    torch.testing.assert_close(out.loss, sum(parts) / 2)
    torch.testing.assert_close(out.loss, out.logs["ce"] + out.logs["lovasz"])
    assert out.metric_args == ()


def test_evaluation_scores_raw_points_through_their_voxels(make_scan, naive_moe) -> None:
    task = task_of(naive_moe).eval()
    batch = Batch.from_data_list([make_scan(30, seed=i, domain=1) for i in range(3)])

    out = task.shared_step(batch, "val")

    pred, target, raw_pred, raw_target = out.metric_args
    assert torch.equal(pred, task.head(task.net(batch), "street").argmax(1))
    assert torch.equal(raw_pred, pred[batch.inverse])
    assert torch.equal(target, batch.y)
    assert torch.equal(raw_target, batch.raw_y)
    unit, parts = out.parts["miou"]
    assert len(set(unit.tolist())) == 3
    assert float(pooled_score(parts.sum(0).numpy())) == pytest.approx(
        float(scores(confusion(raw_pred, raw_target, 3))["miou"])
    )
    metrics = task.configure_metrics("street")
    metrics.update(*out.metric_args)
    assert metrics.compute()["allacc"].item() == pytest.approx((raw_pred == raw_target).float().mean().item())


def unlabelled(scan: Batch) -> Batch:
    scan.y, scan.raw_y = torch.full_like(scan.y, -1), torch.full_like(scan.raw_y, -1)
    return scan


def test_an_unlabelled_crop_changes_nothing_of_a_batch_but_its_weight(make_scan, naive_moe) -> None:
    task = task_of(naive_moe).eval()
    known, other = make_scan(40, seed=0, domain=0), unlabelled(make_scan(45, seed=1, domain=1))

    both = task.shared_step(Batch.from_data_list([known, other]), "train")

    alone = task.shared_step(Batch.from_data_list([known]), "train")
    torch.testing.assert_close(both.loss, alone.loss)
    assert (both.weight, both.batch_size, alone.weight) == (1, 2, 1)


def test_a_batch_without_a_label_gives_no_gradient_and_no_score(make_scan, naive_moe) -> None:
    task = task_of(naive_moe)
    batch = Batch.from_data_list([unlabelled(make_scan(40, seed=0, domain=0))])

    out = task.shared_step(batch, "train")
    out.loss.backward()

    assert out.weight == 0
    assert out.loss == 0
    assert all(p.grad is None or not p.grad.any() for p in task.parameters())
    scored = task.eval().shared_step(batch, "val")
    held = DomainScores({"room": "seen"}, task.configure_metrics)
    held.update(
        "room", scored.loss, scored.batch_size, scored.metric_args, {}, weight=scored.labelled, parts=scored.parts
    )
    table = held.compute(["room"])
    assert all(math.isnan(score.value) for score in table.scores)
    assert table.scorable == {"room": 0}


def test_tiles_of_one_scan_are_one_unit(make_scan, naive_moe) -> None:
    task = task_of(naive_moe).eval()
    scans = [make_scan(30 + i, seed=i) for i in range(5)]
    for scan in scans[1:4]:
        scan.name = "same"
    held = DomainScores({"room": "seen"}, task.configure_metrics)
    for part in (scans[:2], scans[2:]):
        out = task.shared_step(Batch.from_data_list(part), "test")
        held.update("room", out.loss, out.batch_size, out.metric_args, {}, weight=out.labelled, parts=out.parts)

    table = held.compute(["room"])

    parts = np.array(table.parts["room"]["miou"])
    assert parts.shape == (3, 3, 3)
    miou = next(score.value for score in table.scores if score.metric == "miou")
    assert float(pooled_score(parts.sum(0))) == pytest.approx(miou)
    labels = [int((scan.raw_y >= 0).sum()) for scan in scans]
    assert sorted(parts[:, :, 2].sum(1)) == sorted([labels[0], sum(labels[1:4]), labels[4]])


def test_predictions_cover_every_raw_point_and_name_its_expert(make_scan, naive_moe) -> None:
    task, batch = task_of(naive_moe).eval(), mixed_batch(make_scan)

    answers = task.predict_step(batch)

    assert [answer["domain"] for answer in answers] == ["room", "street", "room", "street"]
    assert [answer["name"] for answer in answers] == [f"scan-{i}" for i in range(4)]
    assert torch.equal(torch.cat([answer["truth"] for answer in answers]), batch.y)
    for answer, scan in zip(answers, batch.to_data_list(), strict=True):
        assert torch.equal(answer["inverse"], scan.inverse)
        assert answer["label"].shape == answer["expert"].shape == scan.inverse.shape
        alone = task.predict_step(Batch.from_data_list([scan]))[0]
        assert torch.equal(alone["label"], answer["label"])
        assert torch.equal(alone["expert"], answer["expert"])


def test_the_answer_of_a_tests_own_pass_is_that_of_predict(make_scan, naive_moe) -> None:
    task, batch = task_of(naive_moe).eval(), mixed_batch(make_scan)
    passes: list[int] = []
    task.net.register_forward_hook(lambda *_: passes.append(1))

    task.recorded_step(batch, "test")
    assert task.last_answer is not None
    answers = task.last_answer()

    assert len(passes) == 1
    for answer, other in zip(answers, task.predict_step(batch), strict=True):
        assert answer.keys() == other.keys()
        for key, value in answer.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]


def test_experts_of_voxels_follow_the_rows_of_every_resolution(make_scan, naive_moe) -> None:
    task, batch = task_of(naive_moe).eval(), mixed_batch(make_scan)
    with MoERecorder(task.net) as recorder:
        task.net(batch)
    rows = task.net.rows(batch)

    for record in recorder.records:
        level = int(record.name.split(".")[1])
        owner = torch.unique(torch.cat([batch.batch[:, None], batch.grid >> level], dim=1), dim=0, return_inverse=True)[
            1
        ]
        num_rows = record.routing.num_rows
        row = torch.arange(num_rows)
        own_expert = replace(record, routing=Routing(row, row, torch.ones(num_rows), num_rows, num_rows))
        expert = voxel_experts(own_expert, rows)
        assert num_rows == int(owner.max()) + 1
        assert torch.unique(torch.stack([owner, expert]), dim=1).shape[1] == num_rows  # one row per cell, and back


def test_a_voxel_without_an_expert_says_so(make_scan, naive_moe) -> None:
    task, batch = task_of(naive_moe).eval(), mixed_batch(make_scan)
    rows, number = task.net.rows(batch), batch.num_nodes
    idle = Routing(torch.arange(number), torch.full((number,), 4), torch.ones(number), number, 4)

    expert = voxel_experts(Record("decoder.0.blocks.0.attn.proj", idle, nn.Identity()), rows)

    assert expert.eq(-1).all()


def test_a_network_without_experts_predicts_none(make_scan) -> None:
    answers = task_of(lambda dim: nn.Linear(dim, dim)).eval().predict_step(mixed_batch(make_scan))

    assert all(answer["expert"] is None for answer in answers)


def test_tiles_of_a_scan_are_joined_for_its_picture(make_scan, naive_moe) -> None:
    scans = [make_scan(30, seed=i) for i in range(3)]
    for scan in scans[:2]:
        scan.name = "same"
        scan.inverse = torch.cat([torch.randperm(30), scan.inverse])
        scan.raw_y = scan.y[scan.inverse]
    answers = task_of(naive_moe).eval().predict_step(Batch.from_data_list(scans))

    picture = picture_of(answers, "seen")

    assert picture.title == "room (seen)"
    assert picture.pos_R3.shape == (60, 3)
    for i, answer in enumerate(answers[:2]):
        labels = np.empty(30, dtype=np.int64)
        labels[answer["inverse"].numpy()] = answer["label"].numpy()
        assert (picture.pred_R[30 * i : 30 * i + 30] == labels).all()


def test_blocks_can_be_trained_at_a_rate_of_their_own(naive_moe) -> None:
    names = [name for name, _ in task_of(naive_moe).named_parameters()]

    blocks = [name for name in names if "block" in name]

    assert {name.split(".")[1] for name in blocks} == {"encoder", "decoder"}
    assert {name.split(".")[1] for name in names if name not in blocks} == {
        "stem",
        "pools",
        "unpools",
        "linear",
        "log_scale",
    }


def test_facts_that_do_not_fit_are_errors(naive_moe) -> None:
    net = partial(PointMoE, moe=naive_moe)
    with pytest.raises(ValueError, match=r"lacks \['domain_names', 'label_sets'\]"):
        PointCloudTask(net=net, facts={"domains": {}, "in_dim": 6})


def test_the_network_reads_as_many_channels_as_the_data_has(naive_moe) -> None:
    task = PointCloudTask(net=partial(PointMoE, moe=naive_moe), facts={**FACTS, "in_dim": 4})
    assert task.net.stem.conv.weight.shape[1] == task.net.in_dim == 4


def test_text_provider_decides_the_width_of_the_head(naive_moe) -> None:
    assert task_of(naive_moe, text=RandomText(24)).head.linear.out_features == 24
