# SPDX-License-Identifier: Apache-2.0
"""Aggregator, masks and experts: invariances, and what must not be read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeapps.moe import ConstantScore, Dense, ModuleExperts, MoELayer, Router
from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.nets.aggregator import Aggregator
from tasks.adaptation.nets.backbones import SmallCNN, TimmBackbone, has_batch_norm
from tests.tasks.adaptation.meta_dmoe_common import LinearBackbone, facts, images, net, own

N, E, D = 5, 4, 8


def tokens(num: int = E) -> tuple[Tensor, Tensor]:
    return torch.randn(N, num, D, generator=torch.Generator().manual_seed(0)), torch.ones(N, num, dtype=torch.bool)


def aggregator(depth: int = 1) -> Aggregator:
    torch.manual_seed(0)
    made = Aggregator(D, depth=depth, heads=2).eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def by_hand(made: Aggregator, z_ED: Tensor) -> Tensor:
    """One image, head by head, from the formula."""
    for block in made.blocks:
        attention, mlp = block.attention, block.mlp
        h_ED = torch.layer_norm(z_ED, (D,), block.attention_norm.weight, block.attention_norm.bias)
        q, k, v = (h_ED @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
        heads = []
        for head in range(2):
            part = slice(head * D // 2, (head + 1) * D // 2)
            heads.append((q[:, part] @ k[:, part].T / (D // 2) ** 0.5).softmax(-1) @ v[:, part])
        z_ED = z_ED + torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias
        h_ED = torch.layer_norm(z_ED, (D,), block.mlp_norm.weight, block.mlp_norm.bias)
        hidden = torch.nn.functional.gelu(h_ED @ mlp[0].weight.T + mlp[0].bias)
        z_ED = z_ED + hidden @ mlp[3].weight.T + mlp[3].bias
    return z_ED.mean(0)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_aggregator_is_the_formula(depth: int) -> None:
    made, (z, present) = aggregator(depth), tokens()

    torch.testing.assert_close(made(z, present), torch.stack([by_hand(made, row) for row in z]), atol=1e-5, rtol=1e-5)


def test_the_order_of_the_experts_does_not_matter() -> None:
    made, (z, present) = aggregator(), tokens()
    order = torch.tensor([2, 0, 3, 1])

    torch.testing.assert_close(made(z[:, order], present), made(z, present), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e9])
def test_an_absent_token_is_not_read_and_is_the_same_as_none(value: float) -> None:
    made, (z, present) = aggregator(2), tokens()
    without = torch.cat([z[:, :1], z[:, 2:]], 1)
    z, present = z.clone(), present.clone()
    z[:, 1], present[:, 1] = value, False

    torch.testing.assert_close(made(z, present), made(without, present[:, :3] | True), atol=1e-5, rtol=1e-5)
    assert bool((made.attention(z, present)[:, 1] == 0).all())


def test_each_row_has_absent_tokens_of_its_own() -> None:
    made, (z, _) = aggregator(), tokens()
    present = torch.arange(E) != torch.tensor([0, 1, 2, 3, 0]).unsqueeze(1)
    expected = torch.stack([by_hand(made, row[here]) for row, here in zip(z, present, strict=True)])

    torch.testing.assert_close(made(z, present), expected, atol=1e-5, rtol=1e-5)


def test_without_its_branches_it_is_the_mean_and_the_cores_uniform_mixture() -> None:
    made, x = aggregator(), images(N)
    for block in made.blocks:
        for parameter in (*block.attention.out_proj.parameters(), *block.mlp[3].parameters()):
            parameter.data.zero_()
    experts = [LinearBackbone(facts(), dim=D) for _ in range(E)]
    z = torch.stack([expert(x) for expert in experts], 1)
    bank = ModuleExperts(experts, in_dim=3, out_dim=D, row_dims=3)
    mixture = MoELayer(Router(ConstantScore(E), Dense()), bank)

    found = made(z, torch.ones(N, E, dtype=torch.bool))

    torch.testing.assert_close(found, z.mean(1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, mixture(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num", [1, 3, 4, 9])
def test_any_number_of_tokens_will_do(num: int) -> None:
    made = aggregator()
    assert made(*tokens(num)).shape == (N, D)
    torch.testing.assert_close(made.attention(*tokens(num)).sum(1), torch.ones(N))


@pytest.mark.parametrize("depth", [0, 1])
def test_attention_without_preference_is_even(depth: int) -> None:
    made, (z, present) = aggregator(depth), tokens()
    for block in made.blocks:
        block.attention.in_proj_weight.data[:D].zero_()  # no query: every score is the same
        block.attention.in_proj_bias.data[:D].zero_()
    present = present.clone()
    present[:, 0] = False

    torch.testing.assert_close(made.attention(z, present), present / 3.0)


def test_a_row_without_an_expert_is_told() -> None:
    z, present = tokens()
    with pytest.raises(ValueError, match="no present expert"):
        aggregator()(z, present & False)
    with pytest.raises(ValueError, match="heads=3"):
        Aggregator(8, heads=3)


# Masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), 7.0])
def test_dropping_reads_nothing_of_the_own_expert(value: float) -> None:
    made, x = net(), images(6)
    expected = made.target(*made.tokens(x, own(6, 1)))
    for parameter in made.experts[1].parameters():
        parameter.data.fill_(value)

    torch.testing.assert_close(made.target(*made.tokens(x, own(6, 1))), expected, atol=0, rtol=0)
    assert not torch.equal(made.target(*made.tokens(x)), expected)


def test_dropping_is_the_target_of_the_other_experts_alone() -> None:
    made, x = net(), images(6)
    others = torch.stack([made.experts[e](x) for e in (0, 2)], 1)

    expected = made.aggregator(others, torch.ones(6, 2, dtype=torch.bool))

    torch.testing.assert_close(made.target(*made.tokens(x, own(6, 1))), expected, atol=1e-6, rtol=1e-5)


def test_zeros_in_its_place_are_the_papers_form_and_another_one() -> None:
    x = images(6)
    dropped, zeroed, asked = (net(mask_mode=mode) for mode in ("drop", "zero", "none"))  # type: ignore[arg-type]
    z, present = zeroed.tokens(x, own(6, 1))
    everything, _ = zeroed.tokens(x)

    assert bool(present.all())
    assert not bool(z[:, 1].any())
    assert torch.equal(z[:, [0, 2]], everything[:, [0, 2]])
    targets = [each.target(*each.tokens(x, own(6, 1))) for each in (dropped, zeroed, asked)]
    assert not torch.allclose(targets[0], targets[1])
    assert torch.equal(targets[2], asked.target(*asked.tokens(x)))


def test_an_image_without_an_expert_of_its_own_asks_all() -> None:
    made, x = net(), images(6)
    for number in (-1, made.num_experts):
        assert torch.equal(made.tokens(x, own(6, number))[0], made.tokens(x)[0])
        assert bool(made.tokens(x, own(6, number))[1].all())


def test_tokens_are_the_experts_features() -> None:
    made, x = net(), images(6)

    z, present = made.tokens(x)

    assert bool(present.all())
    torch.testing.assert_close(z, torch.stack([expert(x) for expert in made.experts], 1))


def test_experts_may_use_the_statistics_of_the_images_they_are_asked_about() -> None:
    made, x = net(expert_statistics="batch"), images(6)
    for expert in made.experts:  # running statistics far from those of the images
        for layer in has_batch_norm(expert):
            assert layer.running_mean is not None
            layer.running_mean += 3.0
    before = copy.deepcopy(made.state_dict())

    z, _ = made.tokens(x)

    alone = [copy.deepcopy(expert).train() for expert in made.experts]
    torch.testing.assert_close(z, torch.stack([expert(x) for expert in alone], 1), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(z, net().tokens(x)[0])
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    torch.testing.assert_close(made.tokens(x[:1])[0], torch.stack([expert(x[:1]) for expert in made.experts], 1))


def test_experts_stay_frozen_and_in_evaluation_mode() -> None:
    made = net().train()

    assert made.student.training
    assert made.aggregator.training
    assert not any(module.training for module in made.layer.modules())
    assert not any(parameter.requires_grad for parameter in (*made.layer.parameters(), *made.expert_heads.parameters()))


def test_specialising_copies_the_student_into_every_expert() -> None:
    made, x = net(), images(6)
    made.specialise()

    for expert, head in zip(made.experts, made.expert_heads, strict=True):
        assert torch.equal(head(expert(x)), made(x))
    made.student.head.weight.data.zero_()
    assert bool(made.expert_heads[0].weight.any())


# Building ------------------------------------------------------------------------------------------------------------


def test_the_default_sizes() -> None:
    """A count by hand for 28 x 28 colour images, ten classes."""
    blocks = sum(9 * a * b + 2 * b for a, b in ((3, 16), (16, 32), (32, 64)))
    student = blocks + (576 * 64 + 64) + (64 * 10 + 10)
    aggregator = 4 * 64 * 64 + 4 * 64 + (64 * 128 + 128) + (128 * 64 + 64) + 2 * 2 * 64

    made = MetaDMoE(facts(image_size=28, num_classes=10))

    assert sum(p.numel() for p in made.student.parameters()) == student
    assert sum(p.numel() for p in made.aggregator.parameters()) == aggregator


@pytest.mark.parametrize(
    ("changes", "told", "text"),
    [
        ({}, {"num_experts": 1}, "one expert cannot be left out"),
        ({"mask_mode": "half"}, {}, "mask_mode='half'"),
        ({"backbone": SmallCNN}, {"image_size": 7}, "7 pixels are too small"),
    ],
)
def test_what_cannot_be_built_is_told(changes: dict[str, Any], told: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        net(told=facts(**told), **changes)


def test_one_expert_works_where_nothing_is_masked() -> None:
    made = net(told=facts(num_experts=1), mask_mode="none")
    assert made(images(3), made.adapt(images(6))).shape == (3, 4)


def test_experts_of_different_widths_are_told() -> None:
    widths = iter([8, 8, 6, 8])

    def uneven(facts: dict[str, Any]) -> SmallCNN:
        return SmallCNN(facts, dim=next(widths), width=4)

    with pytest.raises(ValueError, match=r"widths \[6, 8\]"):
        net(backbone=uneven)


def test_networks_of_timm(tmp_path: Path) -> None:
    told = facts(image_size=160)
    first = TimmBackbone(told, name="test_resnet")
    torch.save({**first.body.state_dict(), "head.fc.weight": torch.zeros(7, 7)}, tmp_path / "weights.pth")

    again = TimmBackbone(told, name="test_resnet", checkpoint=tmp_path / "weights.pth")

    x = images(2, size=160)
    assert torch.equal(first.eval()(x), again.eval()(x))
    with pytest.raises(ValueError, match="no model 'resnet18000'"):
        TimmBackbone(told, name="resnet18000")
    with pytest.raises(ValueError, match="no such file"):
        TimmBackbone(told, name="test_resnet", checkpoint=tmp_path / "gone.pth")
