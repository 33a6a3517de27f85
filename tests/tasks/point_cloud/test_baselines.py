# SPDX-License-Identifier: Apache-2.0
"""Rivals of Point-MoE: each differs from the system in what its paper says, and costs the same where it should."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch_geometric.data import Batch

from moeapps.commands.run import Cli, quiet
from moeapps.moe import MoERecorder, Routing
from moeapps.moe.presets import dense, linear, point_moe
from moeapps.training.cost import _extra_formulas
from tasks.point_cloud.baselines import (
    ConvRoutedPointMoE,
    ConvUNet,
    DomainGuidedScore,
    MisalignedTask,
    domain_guided_router,
)
from tasks.point_cloud.experts import ExpertReport, information, layer_place, part_means
from tasks.point_cloud.geometry import finest_level
from tasks.point_cloud.model import PointMoE
from tasks.point_cloud.module import PointCloudTask
from tasks.point_cloud.prompt import PromptedPointMoE, PromptNorm, PromptRows, PromptTask

CONFIGS = Path(__file__).parents[3] / "configs"
SIZES: dict[str, Any] = {
    "enc_depths": (1, 1),
    "enc_dims": (16, 32),
    "dec_depths": (1,),
    "dec_dims": (16,),
    "drop_path": 0.0,
}
ATTENTION = {**SIZES, "patch_size": 16}
FACTS = {
    "domains": {"seen": ["room", "street"], "validation": ["office"], "unseen": []},
    "domain_names": ["room", "street", "office"],
    "label_sets": {"room": ["wall", "floor", "chair"], "street": ["road", "car", "wall"], "office": ["floor", "wall"]},
    "in_dim": 6,
}


def mixed(make_scan, *domains: int) -> Batch:
    return Batch.from_data_list([make_scan(40 + 7 * i, seed=i, domain=d) for i, d in enumerate(domains)])


def prompted(mode: str = "oracle", **options: Any) -> PromptedPointMoE:
    return PromptedPointMoE(domains=["room", "street"], mode=mode, moe=linear(), prompt_dim=8, **ATTENTION, **options)


# --- costs of the shipped overlays ---


def overlay_net(*names: str) -> PointMoE:
    """The network of configs/point_moe.yaml under baseline overlays, built as the command line builds it."""
    files = [CONFIGS / "point_moe.yaml", *(CONFIGS / "baselines" / f"point_moe_{name}.yaml" for name in names)]
    quiet()
    net = Cli([word for file in files for word in ("--config", str(file))], run=False).model.net
    assert isinstance(net, PointMoE)
    return net.eval()


def flops(net: PointMoE, batch: Batch) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_extra_formulas()) as counter:
        net(batch)
    return int(counter.get_total_flops())


@pytest.fixture(scope="module")
def base_cost() -> dict[str, int]:
    return {}


@pytest.mark.parametrize(
    "name",
    [
        *("dense", "random", "domain", "mlp", "top1", "soft", "shared", "domain_guided", "conv_router"),
        *("ppt_oracle", "ppt_classifier", "ppt_generic"),
    ],
)
def test_rivals_match_the_system_in_active_flops(name: str, make_batch, base_cost) -> None:
    batch = make_batch([500, 300], side=16)
    if not base_cost:
        base_cost["base"] = flops(overlay_net(), batch)

    assert flops(overlay_net(name), batch) == pytest.approx(base_cost["base"], rel=0.02)


# --- routers ---


def test_domain_guided_logits_are_linear_in_row_and_domain_vector() -> None:
    score = DomainGuidedScore(5, 4, num_domains=3, domain_dim=2).double()
    x, group = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 3, 9])

    logits = score(x, group=group)

    table = score.domains.weight
    known = torch.cat([x[:4], table[group[:4]]], dim=1) @ score.linear.weight.T
    torch.testing.assert_close(logits[:4], known)
    unseen = torch.cat([x[4:], table.mean(0).expand(2, 2)], dim=1) @ score.linear.weight.T
    torch.testing.assert_close(logits[4:], unseen)
    with pytest.raises(ValueError, match="pass group=ids"):
        score(x)


def test_domain_guided_network_is_told_the_domain_and_trains_its_vectors(make_scan) -> None:
    net = PointMoE(moe=point_moe(router=domain_guided_router(num_domains=2)), **ATTENTION)
    one, other = (mixed(make_scan, d, d) for d in (0, 1))
    net.eval()

    assert not torch.equal(net(one), net(other))
    net.train()(mixed(make_scan, 0, 1)).square().sum().backward()
    grads = [p.grad for name, p in net.named_parameters() if name.endswith("score.domains.weight")]
    assert len(grads) == 3
    assert all(grad is not None and grad.abs().sum(dim=1).min() > 0 for grad in grads)


def test_conv_router_reads_what_the_positional_convolution_gives(make_batch) -> None:
    torch.manual_seed(1)
    net, plain = (kind(moe=point_moe(), **ATTENTION).eval() for kind in (ConvRoutedPointMoE, PointMoE))
    plain.load_state_dict(net.state_dict())
    given: list[torch.Tensor] = []
    for stage in (*net.encoder, *net.decoder):
        stage.blocks[0].cpe.register_forward_hook(lambda module, args, output: given.append(output))
    batch = make_batch([40, 50])

    with MoERecorder(net) as recorder:
        y = net(batch)

    assert len(recorder.records) == len(given) == 3
    for record, cpe in zip(recorder.records, given, strict=True):
        assert torch.equal(record.routing.features_ND, cpe)
    assert not torch.allclose(y, plain(batch))
    for model in (net, plain):  # equal experts: who is chosen does not matter
        for module in model.modules():
            if hasattr(module, "w_in"):
                module.w_in.data[:], module.w_out.data[:] = module.w_in[:1], module.w_out[:1]
    torch.testing.assert_close(net(batch), plain(batch))


# --- the floor ---


def test_conv_unet_answers_each_scan_alone_and_has_no_attention(make_scan) -> None:
    net = ConvUNet(**SIZES).eval()
    batch = mixed(make_scan, 0, 1, 0)
    together = net(batch)

    for i, scan in enumerate(batch.to_data_list()):
        torch.testing.assert_close(together[batch.ptr[i] : batch.ptr[i + 1]], net(Batch.from_data_list([scan])))
    assert not [name for name, _ in net.named_modules() if "attn" in name]
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm1d)} == {0.05}
    net.train()(batch).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


# --- the conflict ---


def test_misaligned_names_are_turned_by_one_in_every_other_domain(make_scan) -> None:
    torch.manual_seed(2)
    right, wrong = (
        kind(net=PointMoE(moe=linear(), **ATTENTION), facts=FACTS) for kind in (PointCloudTask, MisalignedTask)
    )
    wrong.load_state_dict(right.state_dict())
    batch = mixed(make_scan, 0, 1)
    for task in (right, wrong):
        task.eval()

    (_, room), (_, street) = right(batch)["room"], right(batch)["street"]

    torch.testing.assert_close(wrong(batch)["room"][1], room)
    torch.testing.assert_close(wrong(batch)["street"][1], street.roll(-1, dims=1))
    assert wrong.predict_step(batch)[1]["names"] == FACTS["label_sets"]["street"]


# --- PPT ---


def test_fresh_prompts_change_nothing_in_evaluation(make_scan) -> None:
    net = PointMoE(moe=linear(), **ATTENTION).eval()
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
    task = PromptTask(net=prompted("classifier"), facts=FACTS)
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


# --- the expert report ---


def idle_trainer() -> SimpleNamespace:
    """What the report asks of a trainer that writes nothing."""
    data = SimpleNamespace(present=lambda role: ["room", "street"])
    return SimpleNamespace(datamodule=data, world_size=1, fast_dev_run=True, barebones=False)


def test_information_of_experts_that_follow_domain_or_class_alone() -> None:
    by_domain = torch.tensor([[[3.0, 0], [5, 0]], [[0, 1], [0, 1]]]).double()  # (D, L, E)
    by_class = torch.tensor([[[3.0, 0], [0, 3]], [[7, 0], [0, 7]]]).double()
    idle = torch.ones(2, 2, 2).double()

    told = information({"class": by_domain, "range": idle})
    assert (told["mi_domain"], told["mi_class_within"], told["mi_range_within"]) == pytest.approx((1.0, 0.0, 0.0))
    told = information({"class": by_class})
    assert (told["mi_domain"], told["mi_class"], told["mi_class_within"]) == pytest.approx((0.0, 1.0, 1.0))
    many = torch.cat([by_domain[:1] * 1000, by_domain[1:]])
    assert information({"class": many})["mi_domain"] == pytest.approx(1.0), "domains weigh the same"


def test_means_are_taken_over_the_layers_of_encoder_and_decoder() -> None:
    layers = {"encoder.0.0": {"mi": 0.1}, "encoder.1.0": {"mi": 0.3}, "decoder.0.0": {"mi": 0.5}}

    assert part_means(layers) == {"encoder": {"mi": pytest.approx(0.2)}, "decoder": {"mi": 0.5}}
    assert layer_place("net.encoder.2.blocks.1.attn.proj") == ("encoder.2.1", 2)


def test_report_counts_every_voxel_at_every_resolution(make_scan) -> None:
    task = PointCloudTask(net=PointMoE(moe=point_moe(), **ATTENTION), facts=FACTS).eval()
    trainer = idle_trainer()
    task.trainer = trainer
    report = ExpertReport()
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
    for tables in report._tables.values():
        assert tables["range"].sum().item() == pytest.approx(total)
        assert tables["class"].sum().item() == pytest.approx(total - 10)
        assert tables["class"].shape == (2, 5, 4)  # wall is one class of two domains


def test_report_of_an_oracle_router_is_one(make_scan) -> None:
    task = PointCloudTask(net=PointMoE(moe=point_moe(), **ATTENTION), facts=FACTS).eval()
    trainer = idle_trainer()
    task.trainer = trainer
    report = ExpertReport()
    report.on_test_epoch_start(trainer, task)
    batch = mixed(make_scan, 0)
    with MoERecorder(task) as recorder:
        task.net(batch)
    row = task.net.rows(batch)[0].argsort()
    expert = batch.y[row]
    oracle = Routing(torch.arange(len(row)), expert, torch.ones(len(row)), len(row), 4)
    task.last_records = [SimpleNamespace(name=recorder.records[0].name, routing=oracle)]
    task.last_domain = "room"
    report.on_test_batch_end(trainer, task, None, batch, 0)
    report.on_test_epoch_end(trainer, task)

    assert report.result["encoder.0.0"]["mi_class_within"] == pytest.approx(1.0)


def test_a_dense_network_has_nothing_to_report(make_scan) -> None:
    task = PointCloudTask(net=PointMoE(moe=dense(), **ATTENTION), facts=FACTS).eval()
    trainer = idle_trainer()
    task.trainer, task.last_domain = trainer, "room"
    report, batch = ExpertReport(), mixed(make_scan, 0)
    report.on_test_epoch_start(trainer, task)
    with MoERecorder(task) as recorder:
        task.net(batch)
    task.last_records = recorder.records
    report.on_test_batch_end(trainer, task, None, batch, 0)
    report.on_test_epoch_end(trainer, task)

    assert report.describe_results() == {}
