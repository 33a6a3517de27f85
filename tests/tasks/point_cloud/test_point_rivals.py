# SPDX-License-Identifier: Apache-2.0
"""Rivals of Point-MoE: each differs from the system in what its paper says, and costs the same where it should."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch

from moeapps.commands.run import Cli, quiet
from moeapps.moe import MoERecorder
from moeapps.moe.presets import linear, point_moe
from moeapps.training.cost import count_flops
from tasks.point_cloud.model import PointMoE
from tasks.point_cloud.module import PointCloudTask
from tasks.point_cloud.rivals.baselines import (
    ConvRoutedPointMoE,
    ConvUNet,
    DomainGuidedScore,
    MisalignedTask,
    domain_guided_router,
)
from tests.tasks.point_cloud.rivals_common import ATTENTION, FACTS, SIZES, mixed

CONFIGS = Path(__file__).parents[3] / "configs"


# --- costs of the shipped overlays ---


def overlay_net(*names: str) -> PointMoE:
    """The network of configs/point_moe.yaml under baseline overlays, built as the command line builds it."""
    files = [CONFIGS / "point_moe.yaml", *(CONFIGS / "baselines" / f"point_moe_{name}.yaml" for name in names)]
    quiet()
    net = Cli([word for file in files for word in ("--config", str(file))], run=False).model.net
    assert isinstance(net, PointMoE)
    return net.eval()


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
        base_cost["base"] = count_flops(overlay_net(), batch)

    assert count_flops(overlay_net(name), batch) == pytest.approx(base_cost["base"], rel=0.02)


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
    net = PointMoE(FACTS, moe=point_moe(router=domain_guided_router(num_domains=2)), **ATTENTION)
    one, other = (mixed(make_scan, d, d) for d in (0, 1))
    net.eval()

    assert not torch.equal(net(one), net(other))
    net.train()(mixed(make_scan, 0, 1)).square().sum().backward()
    grads = [p.grad for name, p in net.named_parameters() if name.endswith("score.domains.weight")]
    assert len(grads) == 3
    assert all(grad is not None and grad.abs().sum(dim=1).min() > 0 for grad in grads)


def test_conv_router_reads_what_the_positional_convolution_gives(make_batch) -> None:
    torch.manual_seed(1)
    net, plain = (kind(FACTS, moe=point_moe(), **ATTENTION).eval() for kind in (ConvRoutedPointMoE, PointMoE))
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
    net = ConvUNet(FACTS, **SIZES).eval()
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
        kind(net=partial(PointMoE, moe=linear(), **ATTENTION), facts=FACTS) for kind in (PointCloudTask, MisalignedTask)
    )
    wrong.load_state_dict(right.state_dict())
    batch = mixed(make_scan, 0, 1)
    for task in (right, wrong):
        task.eval()

    (_, room), (_, street) = right(batch)["room"], right(batch)["street"]

    torch.testing.assert_close(wrong(batch)["room"][1], room)
    torch.testing.assert_close(wrong(batch)["street"][1], street.roll(-1, dims=1))
    assert wrong.predict_step(batch)[1]["names"] == FACTS["label_sets"]["street"]
