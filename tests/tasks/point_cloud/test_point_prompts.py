# SPDX-License-Identifier: Apache-2.0
"""Prompts of PPT: they keep domains apart, change nothing while fresh, and reach a domain never seen in three ways."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch

from moeapps.moe.presets import linear
from tasks.point_cloud.model import PointMoE
from tasks.point_cloud.nets.geometry import finest_level
from tasks.point_cloud.rivals.prompt import PromptedPointMoE, PromptNorm, PromptRows, PromptTask
from tests.tasks.point_cloud.rivals_common import ATTENTION, FACTS, mixed


def prompted(mode: str = "oracle", **options: Any) -> PromptedPointMoE:
    sizes = {**ATTENTION, "prompt_dim": 8, **options}
    return PromptedPointMoE(FACTS, domains=["room", "street"], mode=mode, moe=linear(), **sizes)


def test_fresh_prompts_change_nothing_in_evaluation(make_scan) -> None:
    net = PointMoE(FACTS, moe=linear(), **ATTENTION).eval()
    ours = prompted().eval()
    ours.name_domains(["room", "street"])
    state = net.state_dict()
    renamed = {key: state[key if key in state else key.replace("norms.0.", "").replace("norms.1.", "")]
               for key in ours.state_dict() if "modulation" not in key and key != "prompts.weight"}  # fmt: skip
    missing = ours.load_state_dict(renamed, strict=False)
    assert all("modulation" in key or key == "prompts.weight" for key in missing.missing_keys)
    batch = mixed(make_scan, 0, 1, 1)

    torch.testing.assert_close(ours(batch), net(batch))


def test_prompt_norm_is_the_norm_of_the_prompt_then_scale_and_shift() -> None:
    norm = PromptNorm(nn.LayerNorm(4), rows := PromptRows(), 3, 5).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    batch = torch.tensor([0, 0, 1, 1, 1, 2])
    grid = torch.arange(18).view(6, 3)
    level, _ = finest_level(grid, batch, 3, ["z"])
    vectors, x = torch.randn(3, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    rows.fill([level], torch.tensor([2, 0, 2]), vectors)

    y = norm(x)

    for n, prompt in enumerate([2, 2, 0, 0, 0, 2]):
        v = vectors[prompt]
        scale, shift = (norm.modulation.weight @ (v * torch.sigmoid(v)) + norm.modulation.bias).chunk(2)
        own = norm.norms[prompt]
        centred = x[n] - x[n].mean()
        plain = centred / (centred.square().mean() + own.eps).sqrt() * own.weight + own.bias
        torch.testing.assert_close(y[n], plain * (1 + scale) + shift)


def test_prompts_keep_domains_apart_even_in_the_statistics_of_a_mixed_batch(make_scan) -> None:
    torch.manual_seed(3)
    net = prompted(orders=("z",))
    net.name_domains(["room", "street"])
    batch = mixed(make_scan, 0, 1, 0)
    rooms = Batch.from_data_list([scan for scan in batch.to_data_list() if scan.domain == 0])

    torch.testing.assert_close(net(batch)[batch.domain[batch.batch] == 0], net(rooms))
    norm = net.stem.norm
    assert [int(own.num_batches_tracked) for own in norm.norms] == [2, 1]
    with pytest.raises(KeyError):
        norm(torch.zeros(len(batch.x), 16))  # nothing is remembered after a pass


def test_a_prompt_with_one_row_is_normalised_by_running_statistics() -> None:
    norm = PromptNorm(nn.BatchNorm1d(2), rows := PromptRows(), 1, None)
    level, _ = finest_level(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1, ["z"])
    rows.fill([level], torch.tensor([0]), None)

    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3.0, 4.0]]) / math.sqrt(1 + 1e-5))


def test_oracle_lends_an_unseen_domain_the_prompt_of_its_stand_in(make_scan) -> None:
    net = prompted(stand_in={"office": "street"}).eval()
    net.name_domains(["room", "street", "office"])
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    scans = {d: net(mixed(make_scan, d, d)) for d in (0, 1, 2)}

    assert torch.equal(scans[2], scans[1])
    assert not torch.allclose(scans[2], scans[0])
    with pytest.raises(ValueError, match="stand_in"):
        prompted().name_domains(["room", "street", "office"])
    with pytest.raises(ValueError, match="which the data lacks"):
        prompted().name_domains(["room"])


def test_classifier_gives_each_scan_the_prompt_it_takes_it_for(make_scan) -> None:
    torch.manual_seed(4)
    net, oracle = (prompted(mode, orders=("z",)).eval() for mode in ("classifier", "oracle"))
    for model in (net, oracle):
        model.name_domains(["room", "street"])
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    oracle.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("detector.")})
    batch = mixed(make_scan, 0, 1, 0)
    net.detector.mlp[-1].bias.data += torch.tensor([0.0, 100.0])

    taken_for = mixed(make_scan, 1, 1, 1)

    assert net.detect(batch).argmax(1).tolist() == [1, 1, 1]
    torch.testing.assert_close(net(batch), oracle(taken_for))
    torch.testing.assert_close(net.train()(batch), oracle.train()(batch))  # in training the label decides


def test_detector_learns_beside_and_shares_no_parameter_with_the_rest(make_scan) -> None:
    torch.manual_seed(5)
    task = PromptTask(net=lambda facts: prompted("classifier"), facts=FACTS)
    batch = mixed(make_scan, 0, 1, 0, 1)
    batch.x = batch.x + 2.0 * batch.domain[batch.batch][:, None]
    optimizer = torch.optim.Adam(task.net.detector.parameters(), lr=1e-2)
    first = task.shared_step(batch, "train").logs["detector"]
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(task.net.detect(batch), batch.domain, label_smoothing=0.1).backward()
        optimizer.step()
    out = task.shared_step(batch, "train")

    assert out.logs["detector"] < 0.7 * first
    assert out.logs["detector_accuracy"] == 1.0
    torch.testing.assert_close(out.loss, out.logs["ce"] + out.logs["lovasz"] + out.logs["detector"])
    assert "detector" not in task.eval().shared_step(batch, "val").logs


def test_generic_prompt_is_trained_by_its_share_of_scans_and_used_by_all_in_evaluation(make_scan) -> None:
    net = prompted("generic", generic_batches=0.5, generic_scans=0.25)
    net.name_domains(["room", "street"])
    batch = mixed(make_scan, *[0, 1] * 10)
    level = net._levels(batch)[0][0]
    chosen = torch.stack([net.choose(batch.x, level) for _ in range(400)])

    assert (chosen == 2).double().mean().item() == pytest.approx(0.5 * 0.25, abs=0.03)
    assert (chosen == 2).any(dim=1).double().mean().item() == pytest.approx(0.5, abs=0.08)
    own = torch.where(chosen == 2, batch.domain, chosen)
    assert torch.equal(own, batch.domain.expand_as(own))
    assert net.eval().choose(batch.x, level).eq(2).all()


def test_prompts_that_cannot_be_are_errors() -> None:
    with pytest.raises(ValueError, match="choose from"):
        prompted("guess")
    with pytest.raises(ValueError, match="must name seen domains"):
        prompted(stand_in={"office": "kitchen"})
    with pytest.raises(ValueError, match="shares are in"):
        prompted("generic", generic_scans=1.5)
