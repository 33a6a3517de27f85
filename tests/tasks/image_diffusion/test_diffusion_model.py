# SPDX-License-Identifier: Apache-2.0
"""Laws of the network: published sizes, a start at zero, labels decided once, ProMoE's layer against a slow oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeapps.moe import MoELayer, MoERecorder
from moeapps.moe.presets import dense, promoe
from moeapps.training.cost import count_flops
from tasks.image_diffusion.model import SIZES, DiT, dit_paper
from tasks.image_diffusion.nets.blocks import LabelEmbedder, TimeEmbedder, position_table
from tasks.image_diffusion.nets.flow import RectifiedFlow
from tests.tasks.image_diffusion.model_common import K, awake, batch, layers, net, noisy

PUBLISHED = {"S": (None, 75e6), "B": (130e6, 300e6), "L": (458e6, 1.063e9), "XL": (675e6, 1.568e9)}


def closed_form(depth: int, dim: int, *, classes: int, channels: int, patch: int, moe: bool) -> int:
    """Parameters of a DiT that learns a variance, counted by hand; with 12 + 1 + 1 experts in every second block."""
    d, io = dim, channels * patch**2
    total = (d * io + d) + (256 * d + d + d * d + d) + (classes + 1) * d
    total += depth * (18 * d * d + 15 * d) + (2 * d * d + 2 * d) + (d * 2 * io + 2 * io)
    return total + (depth // 2 * (14 * (4 * d * d + 3 * d) - (8 * d * d + 5 * d) + 12 * d) if moe else 0)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_published_number_of_parameters(size: str) -> None:
    depth, dim, _ = SIZES[size]
    for moe, published in zip((None, promoe()), PUBLISHED[size], strict=True):
        with torch.device("meta"):
            built = dit_paper(size, moe)
        count = sum(p.numel() for p in built.parameters())
        assert count == closed_form(depth, dim, classes=1000, channels=4, patch=2, moe=moe is not None)
        # Published with three digits, of which the last may hold the fixed position table (0.1 to 0.3 million).
        assert published is None or abs(count - published) < 0.6e6


def test_a_size_that_is_not_the_papers_is_refused() -> None:
    with pytest.raises(ValueError, match="the paper has S, B, L, XL"):
        dit_paper("M")


@pytest.mark.parametrize("moe", [None, promoe(num_experts=3), dense(expansion=4.0, gated=False)])
def test_the_output_starts_at_exactly_zero_and_the_loss_is_what_that_means(moe) -> None:
    network, flow, x0 = net(moe), RectifiedFlow(), batch(64).image
    for label in (torch.zeros(64, dtype=torch.int64), torch.full((64,), K), torch.arange(64) % K):
        for t in (0.1, 0.9):
            eps, t_B = torch.randn_like(x0), torch.full((64,), t)
            output = network(flow.corrupt(x0, eps, t_B), flow.network_time(t_B), label)
            assert torch.equal(output, torch.zeros_like(output))
            torch.testing.assert_close(flow.losses(output, x0, eps, t_B), (eps - x0).square().flatten(1).mean(1))
    wide = torch.randn(4096, 1, 8, 8)
    loss = flow.losses(torch.zeros_like(wide), wide * 0.5, torch.randn_like(wide), torch.rand(4096)).mean()
    assert loss.item() == pytest.approx(1.25, rel=0.02)  # 1 + mean square of the data


@pytest.mark.parametrize("classes", [1, 6, 30, 1000, 1001])
def test_the_null_label_is_the_number_of_classes_whatever_it_is(classes: int) -> None:
    network = awake(net(promoe(num_experts=3), num_classes=classes))
    label = torch.tensor([0, classes - 1, classes])
    assert (network.groups(label) < 0).tolist() == [False, False, True]
    with MoERecorder(network) as recorder:
        network(noisy(3), torch.zeros(3), label)
    expert = recorder.records[0].routing.expert_M.view(3, -1)
    assert (expert[2] == 3).all()
    assert (expert[:2] < 3).all()


def test_group_ids_tell_images_and_classes_apart() -> None:
    label = torch.tensor([2, K, 5, 2, K])
    group = net().groups(label)
    assert len(set(group.tolist())) == 5
    kept = label < K
    assert (group[kept] % K).tolist() == label[kept].tolist()


def test_labels_are_dropped_once_per_image_and_alike_in_all_layers() -> None:
    network = net(promoe(num_experts=3), depth=4, label_dropout=0.5).train()
    with MoERecorder(network) as recorder:
        network(noisy(64), torch.zeros(64), torch.zeros(64, dtype=torch.int64))
    groups = [record.group.view(64, -1) for record in recorder.records]
    assert len(groups) == 2
    assert torch.equal(groups[0], groups[1])
    dropped = groups[0] < 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert 16 < int(dropped[:, 0].sum()) < 48


def test_no_label_is_dropped_in_evaluation_and_the_share_is_checked() -> None:
    embed = LabelEmbedder(K, 8, 0.99).eval()
    label = torch.arange(K)
    assert torch.equal(embed(label)[1], label)
    torch.testing.assert_close(embed(label)[0], embed.table.weight[:K])
    with pytest.raises(ValueError, match="a share in"):
        LabelEmbedder(K, 8, 1.1)


def test_experts_start_like_linear_layers_of_their_own() -> None:
    network = net(promoe(num_experts=3), dim=64, num_heads=4)
    bank = layers(network)[0].experts
    assert bank.w_in.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 128)), rel=0.01)
    assert bank.w_out.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 128)), rel=0.01)
    assert not bank.b_in.any()
    first = network.blocks[0].mlp.fc1.weight
    assert first.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 256)), rel=0.01)


def test_experts_sit_in_odd_blocks() -> None:
    network = net(promoe(num_experts=3), depth=5)
    assert [isinstance(block.mlp, MoELayer) for block in network.blocks] == [False, True, False, True, False]
    every = net(promoe(num_experts=3), depth=2, moe_every=1)
    assert all(isinstance(block.mlp, MoELayer) for block in every.blocks)


@pytest.mark.parametrize("order", ["columns_first", "rows_first"])
def test_position_table_is_sines_of_one_axis_then_of_the_other(order: Any) -> None:
    table = position_table(5, 16, order)
    rates = 10_000.0 ** (-torch.arange(4) / 4)
    for row in range(5):
        for column in range(5):
            halves = []
            for place in (column, row) if order == "columns_first" else (row, column):
                halves += [torch.sin(place * rates), torch.cos(place * rates)]
            torch.testing.assert_close(table[5 * row + column], torch.cat(halves))


def test_networks_know_positions_as_dit_does_unless_told_otherwise() -> None:
    def table(**options: Any) -> torch.Tensor:
        return net(None, depth=1, **options).position_LD

    edge = math.isqrt(len(table()))
    assert torch.equal(table(), position_table(edge, table().shape[1], "columns_first"))
    assert torch.equal(table(positions="rows_first"), position_table(edge, table().shape[1], "rows_first"))
    assert not torch.equal(table(), table(positions="rows_first"))
    with pytest.raises(ValueError, match="positions='diagonal'; use columns_first or rows_first"):
        table(positions="diagonal")


def test_time_is_told_by_cosines_and_sines() -> None:
    embed, seen = TimeEmbedder(8), []
    embed.first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embed(torch.tensor([0.0, 250.0]))
    assert torch.equal(seen[0][0], torch.cat([torch.ones(128), torch.zeros(128)]))
    expected = [math.cos(250 * 10_000 ** (-i / 128)) for i in (0, 5, 127)]
    torch.testing.assert_close(seen[0][1, [0, 5, 127]], torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_patches_come_back_where_they_were() -> None:
    network = net(channels=2, image_size=12, learn_sigma=False)
    x = noisy(3, size=12, channels=2)
    rows = nn.functional.unfold(x, 4, stride=4).transpose(1, 2)  # per patch: channel, row, column
    rows = rows.view(3, 9, 2, 16).transpose(2, 3).reshape(3, 9, 32)
    assert torch.equal(network.unpatchify(rows), x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10}, "image_size=10 is not a multiple of patch_size=4"),
        ({"dim": 18, "num_heads": 2}, "multiple of 4"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"depth": 0}, "depth=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"moe": promoe(num_experts=2, top_k=3)}, "top_k=3, but there are only 2 experts"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        net(**changes)


# --- ProMoE's layer ---------------------------------------------------------------------------------------------------


def expert(layer: MoELayer, e: int, x_ND: Tensor) -> Tensor:
    bank = layer.experts
    hidden = nn.functional.gelu(x_ND @ bank.w_in[e] + bank.b_in[e], approximate="tanh")
    return hidden @ bank.w_out[e] + bank.b_out[e]


def slow_promoe(layer: MoELayer, x_ND: Tensor, null_N: Tensor, num: int, top_k: int) -> Tensor:
    """Token by token, docs/papers/promoe.md, equations 1 and 2.

    Bank of num routed experts, the unconditional one, the shared one.
    """
    prototypes = layer.router.conditional.score.prototypes
    rows = []
    for x_D, null in zip(x_ND, null_N.tolist(), strict=True):
        y = expert(layer, num + 1, x_D)
        if null:
            rows.append(y + expert(layer, num, x_D))
            continue
        cosine = nn.functional.cosine_similarity(x_D, prototypes, dim=-1)
        for e in cosine.topk(top_k).indices.tolist():
            y = y + cosine[e] * expert(layer, e, x_D)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_promoe_equals_the_slow_layer(top_k: int) -> None:
    layer = promoe(num_experts=4, top_k=top_k)(6).double()
    torch.nn.init.normal_(layer.experts.b_in), torch.nn.init.normal_(layer.experts.b_out)
    x, group = torch.randn(20, 6, dtype=torch.float64), torch.arange(20).where(torch.arange(20) % 3 > 0, -1)
    torch.testing.assert_close(layer(x, group=group), slow_promoe(layer, x, group < 0, 4, top_k))


def test_all_experts_with_the_identity_score_are_the_dense_sum_and_one_is_its_cosine() -> None:
    for num in (3, 1):
        layer = promoe(num_experts=num, top_k=num)(6).double()
        x, group = torch.randn(9, 6, dtype=torch.float64), torch.arange(9)
        cosine = nn.functional.cosine_similarity(
            x.unsqueeze(1), layer.router.conditional.score.prototypes.unsqueeze(0), dim=-1
        )
        whole = sum(cosine[:, e, None] * expert(layer, e, x) for e in range(num)) + expert(layer, num + 1, x)
        torch.testing.assert_close(layer(x, group=group), whole)


def test_orthonormal_prototypes_take_their_own_tokens_with_gate_one() -> None:
    layer = promoe(num_experts=2)(6)
    with torch.no_grad():
        layer.router.conditional.score.prototypes.copy_(torch.eye(6)[:2])
    x = torch.stack([3 * torch.eye(6)[1], 0.2 * torch.eye(6)[0], torch.eye(6)[1]])
    routing = layer.route(x, group=torch.arange(3))
    assert routing.expert_M.tolist() == [1, 0, 1]
    torch.testing.assert_close(routing.weight_M, torch.ones(3))


def test_gates_do_not_see_lengths_but_the_output_does() -> None:
    layer = promoe(num_experts=4)(6)
    x, group = torch.randn(9, 6), torch.arange(9)
    before, y = layer.route(x, group=group), layer(x, group=group)
    with torch.no_grad():
        layer.router.conditional.score.prototypes.mul_(7.0)
    after = layer.route(5 * x, group=group)
    assert torch.equal(before.expert_M, after.expert_M)
    torch.testing.assert_close(before.weight_M, after.weight_M)
    assert not torch.allclose(y, layer(5 * x, group=group))


def test_permuting_prototypes_and_experts_together_changes_nothing() -> None:
    layer, order = promoe(num_experts=4)(6), [2, 0, 3, 1]
    x, group = torch.randn(9, 6), torch.arange(9).where(torch.arange(9) > 1, -1)
    y = layer(x, group=group)
    with torch.no_grad():
        score, bank = layer.router.conditional.score, layer.experts
        score.prototypes.copy_(score.prototypes[order].clone())
        for parameter in bank.parameters():
            parameter[:4] = parameter[order].clone()
    torch.testing.assert_close(layer(x, group=group), y)


@pytest.mark.parametrize("null", [True, False])
def test_the_half_that_is_not_used_gets_no_gradient(null: bool) -> None:
    network = awake(net(promoe(num_experts=3)))
    label = torch.full((4,), K) if null else torch.arange(4)
    network(noisy(4), torch.full((4,), 500.0), label).square().sum().backward()
    layer = layers(network)[0]
    grads = [p.grad.abs().flatten(1).sum(1) for p in layer.experts.parameters()]
    routed = layer.router.conditional.score.prototypes.grad
    for grad in grads:
        assert (grad[:3] == 0).all() == null
        assert (grad[3] == 0) == (not null)
        assert grad[4] > 0
    assert (routed is None or not routed.any()) == null


def test_a_network_saved_and_loaded_answers_and_routes_alike(tmp_path) -> None:
    network = awake(net(promoe(num_experts=3)))
    torch.save(network.state_dict(), tmp_path / "net.pt")
    other = net(promoe(num_experts=3)).eval()
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    answers = []
    for each in (network, other):
        with MoERecorder(each) as recorder:
            answers.append((each(noisy(4), torch.ones(4), torch.arange(4)), recorder.records[0].routing))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1].expert_M, answers[1][1].expert_M)


def test_bfloat16_autocast_runs_and_routes_in_full_precision() -> None:
    network = awake(net(promoe(num_experts=3), qk_norm=True))
    with torch.autocast("cpu", dtype=torch.bfloat16), MoERecorder(network) as recorder:
        y = network(noisy(4), torch.ones(4), torch.arange(4))
    assert y.isfinite().all()
    assert recorder.records[0].routing.weight_M.dtype == torch.float32


def test_the_dense_twin_has_the_active_operations_of_promoe() -> None:
    counts = []
    for moe in (promoe(num_experts=6), dense(expansion=4.0, activation="gelu_tanh", gated=False), None):
        sizes = {"image_size": 28, "channels": 1, "num_classes": 30}
        network = DiT(sizes, patch_size=4, dim=128, depth=4, num_heads=4, moe=moe).eval()
        counts.append(count_flops(network, noisy(8, size=28), torch.ones(8), torch.arange(8)))
    assert counts[1] == counts[2]
    assert counts[0] / counts[1] == pytest.approx(1.0, abs=0.01)
