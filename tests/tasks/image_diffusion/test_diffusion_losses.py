# SPDX-License-Identifier: Apache-2.0
"""Laws of the losses on the routing, against values known by arithmetic or slow loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moeapps.moe import MLPExperts, MoELayer, MoERecorder
from moeapps.moe.losses import SwitchBalance
from moeapps.moe.presets import promoe, random_router
from tasks.image_diffusion.losses import (
    CapacityLoss,
    RouterSimilarity,
    RoutingContrast,
    SuperclassLoss,
    router_similarity,
    routing_contrast,
)
from tasks.image_diffusion.rivals import routers

TAU = 0.07


def one_hot(ids: list[int], num: int) -> torch.Tensor:
    return F.one_hot(torch.tensor(ids), num).bool()


def records_of(layer: MoELayer, x: torch.Tensor, group: torch.Tensor):
    with MoERecorder() as recorder:
        layer(x, group=group)
    return recorder.records


@pytest.mark.parametrize("num", [2, 5, 12])
def test_contrast_of_prototypes_that_are_their_means(num: int) -> None:
    unit = torch.eye(num, dtype=torch.float64)
    loss = routing_contrast(unit, 3 * unit, one_hot(list(range(num)), num))
    assert loss.item() == pytest.approx(math.log(1 + (num - 1) * math.exp(-1 / TAU)), abs=1e-6)


def test_contrast_of_equal_means_is_the_logarithm_of_their_number() -> None:
    x = torch.ones(6, 4)
    assert routing_contrast(torch.randn(3, 4), x, one_hot([0, 1, 2, 0, 1, 2], 3)).item() == pytest.approx(math.log(3))


def test_contrast_is_zero_with_fewer_than_two_active_experts() -> None:
    x, prototypes = torch.randn(4, 5), torch.randn(3, 5, requires_grad=True)
    for taken in (one_hot([1, 1, 1, 1], 3), torch.zeros(4, 3, dtype=torch.bool)):
        loss = routing_contrast(prototypes, x, taken)
        loss.backward()
        assert loss.item() == 0
        assert not prototypes.grad.any()


def slow_contrast(prototypes, x, taken) -> float:
    means = {e: x[taken[:, e]].mean(0) for e in range(len(prototypes)) if taken[:, e].any()}
    terms = []
    for i in means:
        cosines = {j: F.cosine_similarity(prototypes[i], m, dim=0) / TAU for j, m in means.items()}
        terms.append(-(cosines[i] - torch.logsumexp(torch.stack(list(cosines.values())), 0)))
    return float(torch.stack(terms).mean())


def test_contrast_equals_the_sum_in_the_paper_over_active_experts() -> None:
    x, prototypes = torch.randn(30, 5), torch.randn(6, 5)
    taken = torch.rand(30, 6) < 0.2
    taken[:, 4] = False
    assert routing_contrast(prototypes, x, taken).item() == pytest.approx(slow_contrast(prototypes, x, taken), rel=1e-4)


def test_contrast_per_image_is_the_mean_over_images_and_experts() -> None:
    x, prototypes, taken = torch.randn(24, 5), torch.randn(3, 5), torch.rand(24, 3) < 0.6
    group = torch.tensor([7] * 8 + [0] * 8 + [3] * 8)
    taken[group == 3] = False  # an image no expert took counts nowhere
    parts, sizes = [], []
    for image in (7, 0):
        own = group == image
        parts.append(slow_contrast(prototypes, x[own], taken[own]))
        sizes.append(int(taken[own].any(0).sum()))
    expected = sum(p * s for p, s in zip(parts, sizes, strict=True)) / sum(sizes)
    assert routing_contrast(prototypes, x, taken, group_N=group).item() == pytest.approx(expected, rel=1e-4)


def test_contrast_of_a_permutation_of_the_experts_is_the_same() -> None:
    x, prototypes, taken, order = torch.randn(30, 5), torch.randn(4, 5), torch.rand(30, 4) < 0.3, [3, 1, 0, 2]
    plain = routing_contrast(prototypes, x, taken)
    torch.testing.assert_close(routing_contrast(prototypes[order], x, taken[:, order]), plain)


def test_contrast_reaches_prototypes_and_tokens_and_sums_over_layers() -> None:
    layers = [promoe(num_experts=3)(6) for _ in range(2)]
    x, group, loss = torch.randn(12, 6, requires_grad=True), torch.arange(12), RoutingContrast(2.0)
    with MoERecorder() as recorder:
        for layer in layers:
            layer(x, group=group)
    total = loss(recorder.records)
    torch.testing.assert_close(total, 2.0 * sum(loss.compute(record) for record in recorder.records))
    assert sorted(loss.per_layer) == ["MoELayer", "MoELayer_1"]
    total.backward()
    assert all(layer.router.conditional.score.prototypes.grad.any() for layer in layers)
    assert x.grad.any()


def test_contrast_looks_at_conditional_tokens_only() -> None:
    layer, x = promoe(num_experts=3)(6), torch.randn(12, 6)
    group = torch.arange(12).where(torch.arange(12) % 2 > 0, -1)
    loss = RoutingContrast()
    before = loss(records_of(layer, x, group))
    torch.testing.assert_close(loss(records_of(layer, x.where(group[:, None] >= 0, 100.0), group)), before)
    assert loss(records_of(layer, x, torch.full((12,), -1))).item() == 0


def test_contrast_per_image_reads_the_groups_of_a_layer() -> None:
    layer = promoe(num_experts=2, by_expert=True)(6)
    x, group = torch.randn(16, 6), torch.tensor([4] * 8 + [-1] * 4 + [9] * 4)
    record = records_of(layer, x, group)[0]
    taken = record.routing.assignment()[:, :2] != 0
    expected = routing_contrast(layer.router.conditional.score.prototypes, x, taken, group_N=group)
    torch.testing.assert_close(RoutingContrast(per_image=True)([record]), expected)


def test_contrast_says_what_it_needs() -> None:
    layer = promoe(num_experts=3, router=random_router(num_experts=3, top_k=1))(6)
    with pytest.raises(ValueError, match="has no prototypes"):
        RoutingContrast()(records_of(layer, torch.randn(4, 6), torch.arange(4)))
    with pytest.raises(ValueError, match="tau=0"):
        RoutingContrast(tau=0.0)


def test_similarity_of_balanced_one_hot_routing_is_one_and_of_agreeing_experts_more() -> None:
    taken = one_hot([0, 1, 2, 0, 1, 2], 3)
    # P'_ii = 2, W_ii = E * 2 / 6: the sum over i is 6, over the 6 tokens 1.
    assert router_similarity(taken.double(), taken).item() == pytest.approx(1.0)
    both = torch.ones(6, 2, dtype=torch.bool)
    uniform = torch.full((6, 2), 0.5, dtype=torch.float64)
    assert router_similarity(uniform, both).item() == pytest.approx(1.0)
    slow, probs, pairs = 0.0, torch.rand(10, 3).softmax(-1), torch.rand(10, 3) < 0.5
    together, alike = pairs.float().T @ pairs.float(), probs.T @ probs
    cross = sum(together[i, j] for i in range(3) for j in range(3) if i != j)
    for i in range(3):
        for j in range(3):
            weight = 3 * together[i, i] / together.trace() if i == j else 6 * together[i, j] / cross
            slow += float(weight * alike[i, j]) / 10
    assert router_similarity(probs, pairs).item() == pytest.approx(slow, rel=1e-5)


def test_similarity_counts_pairs_exactly_under_bfloat16_too() -> None:
    probs, pairs = (3 * torch.randn(700, 4)).softmax(-1), torch.rand(700, 4) < 0.6
    with torch.autocast("cpu", torch.bfloat16):
        found = router_similarity(probs, pairs)
    p, m = probs.double(), pairs.double()
    together = [[float(m[:, i] @ m[:, j]) for j in range(4)] for i in range(4)]
    own = sum(together[i][i] for i in range(4))
    cross = sum(map(sum, together)) - own
    slow = 0.0
    for i in range(4):
        for j in range(4):
            weight = 4 * together[i][i] / own if i == j else 12 * together[i][j] / cross
            slow += weight * float(p[:, i] @ p[:, j]) / 700
    assert found.item() == pytest.approx(slow, rel=1e-5)


def test_similarity_trains_the_router_of_expert_race() -> None:
    router = routers.expert_race(num_experts=3)(6)
    layer = MoELayer(router, MLPExperts(3, 6, 8)).train()
    RouterSimilarity()(records_of(layer, torch.randn(20, 6), torch.arange(20))).backward()
    assert router.score.out.weight.grad.any()


def test_capacity_loss_trains_the_predictor_on_the_selection_and_nothing_else() -> None:
    router = routers.diffmoe(num_experts=2)(6)
    layer = MoELayer(router, MLPExperts(2, 6, 8)).train()
    x = torch.randn(12, 6, requires_grad=True)
    record = records_of(layer, x, torch.arange(12))[0]
    taken = (record.routing.assignment() != 0).float()
    loss = CapacityLoss()([record])
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(router.predictor(x.detach()), taken))
    loss.backward()
    assert x.grad is None
    assert router.score.weight.grad is None
    assert router.predictor[0].weight.grad.any()


def test_capacity_loss_counts_routed_tokens_only() -> None:
    layer = promoe(num_experts=2, router=routers.diffmoe(num_experts=2))(6).train()
    x, group = torch.randn(12, 6), torch.arange(12).where(torch.arange(12) % 3 > 0, -1)
    record = records_of(layer, x, group)[0]
    kept = group >= 0
    taken = (record.routing.assignment()[kept, :2] != 0).float()
    expected = F.binary_cross_entropy_with_logits(layer.router.conditional.predictor(x[kept]), taken)
    torch.testing.assert_close(CapacityLoss()([record]), expected)
    other = promoe(num_experts=2)(6)
    with pytest.raises(ValueError, match="no capacity predictor"):
        CapacityLoss()(records_of(other, x, group))


def test_superclass_loss_is_the_cross_entropy_of_images_with_a_class() -> None:
    layer = promoe(num_experts=2, router=routers.class_supervised(num_experts=2))(6)
    loss = SuperclassLoss()
    loss.use_superclasses([0, 1, 1, 0])
    x = torch.randn(3, 5, 6)
    group = torch.tensor([0 * 4 + 2, -2, 2 * 4 + 3]).unsqueeze(-1).expand(-1, 5)
    record = records_of(layer, x, group)[0]
    logits = layer.router.conditional.score.linear(x.mean(1))[[0, 2]]
    torch.testing.assert_close(loss([record]), F.cross_entropy(logits, torch.tensor([1, 0])))
    with pytest.raises(ValueError, match="no table of super-classes"):
        SuperclassLoss()([record])


def test_balance_loss_of_token_choice_is_its_weight_at_perfect_balance() -> None:
    layer = promoe(num_experts=4, conditional_split=False, router=routers.token_choice(num_experts=4, top_k=1))(4)
    with torch.no_grad():
        layer.router.score.weight.copy_(torch.eye(4))
    record = records_of(layer, torch.eye(4).repeat(5, 1), torch.arange(20))[0]
    assert SwitchBalance(0.01)([record]).item() == pytest.approx(0.01)
