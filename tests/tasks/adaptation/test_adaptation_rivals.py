# SPDX-License-Identifier: Apache-2.0
"""Rivals in the harness, each against its method written out, and what none of them may do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.nets.adapt import InnerStep
from tasks.adaptation.nets.adapters import Adapter, Distil, Unadapted
from tasks.adaptation.rivals.entropy import Memo, Shot, Tent, entropy, nearest_centre
from tasks.adaptation.rivals.experts import BestExpert, Ensemble, ExpertByDomain, Teacher, expert_logits
from tasks.adaptation.rivals.prototypes import T3A
from tasks.adaptation.rivals.statistics import BatchStatistics
from tests.tasks.adaptation.meta_dmoe_common import LinearBackbone, facts, images, net

ALL: list[Adapter] = [
    *(Unadapted(), Distil(), Distil(form="batch", size=3), Distil(form="online", size=3)),
    *(BatchStatistics(size=3), BatchStatistics(form="support"), BatchStatistics(form="online", share=0.3, size=3)),
    *(Tent(size=3), Tent(form="support"), Shot(), Shot(form="batch", size=3), Memo(augmentations=3, chunk=2)),
    *(T3A(size=3), T3A(form="support"), Ensemble(), ExpertByDomain(), BestExpert(), Teacher()),
]
LABEL = torch.tensor([0, 1, 2, 3, 0])


def answered(adapter: Adapter, made: MetaDMoE, support: Tensor, query: Tensor, own: int = -1) -> Tensor:
    state = adapter.begin(made, support, own)
    return adapter.answer(made, state, query, own, LABEL[: len(query)])[0]


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: f"{type(a).__name__}-{a.form}")
def test_every_method_answers_and_leaves_the_network_as_it_was(adapter: Adapter) -> None:
    made, support, query = net(), images(6), images(5, seed=1)
    before = copy.deepcopy(made.state_dict())

    with torch.inference_mode():
        first = answered(adapter, made, images(6), images(5, seed=1))
    with torch.no_grad():
        answered(adapter, made, images(6, seed=5), images(3, seed=6))
        again = answered(adapter, made, support, query)

    assert first.shape == (5, 4)
    assert bool(first.isfinite().all())
    torch.testing.assert_close(again, first, atol=0, rtol=0)  # nothing is left of the domain between
    after = made.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module.training for module in made.modules())
    assert all(parameter.grad is None for parameter in made.parameters())


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: f"{type(a).__name__}-{a.form}")
def test_one_image_to_adapt_to_and_one_to_answer_will_do(adapter: Adapter) -> None:
    with torch.no_grad():
        assert answered(adapter, net(), images(1), images(1, seed=1)).shape == (1, 4)


def test_only_oracles_see_labels() -> None:
    class Told(Unadapted):
        def predict(self, net: MetaDMoE, state: object, image: Tensor, label: Tensor | None = None) -> Tensor:
            assert label is None
            return super().predict(net, state, image)

    for form in ("support", "batch", "online"):
        adapter = Told(form=form)
        answered(adapter, net(), images(6), images(5, seed=1))
    assert [type(each) for each in ALL if each.oracle] == [BestExpert]


def test_batch_statistics_are_those_of_the_batch() -> None:
    made, query = net(), images(5, seed=1)
    expected = copy.deepcopy(made).train()

    torch.testing.assert_close(answered(BatchStatistics(size=9), made, images(6), query), expected(query))
    halves = torch.cat([expected(query[:3]), expected(query[3:])])
    torch.testing.assert_close(answered(BatchStatistics(size=3), made, images(6), query), halves)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_statistics_of_the_support_are_mixed_with_those_of_training(share: float) -> None:
    made, support, query = net(), images(6), images(5, seed=1)
    expected = copy.deepcopy(made)
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = share
    expected.student.train()
    expected(support)
    expected.student.eval()

    found = answered(BatchStatistics(form="support", share=share), made, support, query)

    torch.testing.assert_close(found, expected(query))


def test_tent_is_adam_on_scale_and_shift_by_the_entropy_of_each_batch() -> None:
    made, query = net(), images(6, seed=1)
    by_hand = copy.deepcopy(made)
    own = [p for m in by_hand.student.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    found = answered(Tent(rate=0.05, size=6), made, images(1), query).detach()

    by_hand.student.train()
    logits = by_hand(query)
    loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    for p, g in zip(own, torch.autograd.grad(loss, own), strict=True):
        p.data -= 0.05 * g / (g.abs() + 1e-8)  # the first step of Adam

    torch.testing.assert_close(found, by_hand(query).detach(), atol=1e-5, rtol=1e-4)
    assert float(entropy(found.detach()).mean()) < float(entropy(logits.detach()).mean())


def test_tent_goes_on_from_batch_to_batch() -> None:
    made, query = net(), images(6, seed=1)

    found = answered(Tent(rate=0.05, size=3), made, images(1), query)

    one = answered(Tent(rate=0.05, size=3), made, images(1), query[:3])
    fresh = answered(Tent(rate=0.05, size=3), made, images(1), query[3:])
    torch.testing.assert_close(found[:3], one)
    assert not torch.allclose(found[3:], fresh)


def test_tent_needs_batch_normalisation() -> None:
    made = net(backbone=lambda facts: LinearBackbone(facts, dim=8))
    with pytest.raises(ValueError, match="TENT moves batch normalisation"):
        answered(Tent(), made, images(3), images(3))


def test_shot_lowers_what_it_says_and_keeps_the_head() -> None:
    made, support = net(), images(12)
    adapter = Shot(rate=1e-3, steps=10, pseudo=0.3)

    weights = adapter.adapt(made, support, None, -1)

    def objective(logits: Tensor, feature: Tensor) -> float:
        mean = logits.softmax(1).mean(0)
        label = nearest_centre(feature, logits.softmax(1))
        return float(entropy(logits).mean() + (mean * mean.log()).sum() + 0.3 * cross_entropy(logits, label))

    with torch.no_grad():
        feature, moved = made.student.backbone(support), weights.run(made.student.backbone, support)
        head = made.student.head
        assert objective(head(moved), moved) < objective(head(feature), feature)
    assert set(weights.parameters) == {name for name, _ in made.student.backbone.named_parameters()}


def test_pseudo_labels_are_those_of_the_nearest_centre_after_one_more_round() -> None:
    torch.manual_seed(0)
    feature, prob = torch.randn(9, 5), torch.randn(9, 3).softmax(1)
    unit = [row / row.norm() for row in feature]
    weights = prob.tolist()
    for _ in range(2):
        centres = [sum(weights[i][k] * unit[i] for i in range(9)) for k in range(3)]
        cosine = [[float(u @ c / c.norm()) if float(c.norm()) > 0 else -9.0 for c in centres] for u in unit]  # type: ignore[union-attr,operator]
        labels = [row.index(max(row)) for row in cosine]
        weights = [[float(k == label) for k in range(3)] for label in labels]

    assert nearest_centre(feature, prob).tolist() == labels


def test_memo_is_one_step_for_each_image_alone() -> None:
    made, query = net(), images(3, seed=1)
    adapter = Memo(rate=0.2, augmentations=3, chunk=2)
    found = answered(adapter, made, images(1), query)

    for number in range(3):
        alone = copy.deepcopy(made)
        part = query[:2] if number < 2 else query[2:]  # augmentations are drawn for a chunk
        copies = adapter.augment(part)[number % 2]
        mean = alone(copies).softmax(1).mean(0)
        params = list(alone.student.backbone.parameters())
        for p, g in zip(params, torch.autograd.grad(-(mean * mean.log()).sum(), params), strict=True):
            p.data -= 0.2 * g
        torch.testing.assert_close(found[number], alone(query[number : number + 1])[0].detach(), atol=1e-5, rtol=1e-4)
    assert torch.equal(adapter.augment(query)[:, 0], query)


def test_t3a_is_the_mean_of_the_surest_features_of_each_class() -> None:
    made, support, query = net(), images(12), images(5, seed=1)
    head = made.student.head
    found = answered(T3A(keep=2, form="support"), made, support, query)

    with torch.no_grad():
        feature = made.student.backbone(support)
        said, sure = head(feature).argmax(1).tolist(), entropy(head(feature)).tolist()
        rows = []
        for k in range(4):
            own = normalize(head.weight[k : k + 1], dim=1)
            kept = [(float(entropy(head.weight[k : k + 1] @ head.weight.T + head.bias)), own[0])]
            kept += [(sure[i], normalize(feature[i : i + 1], dim=1)[0]) for i in range(12) if said[i] == k]
            surest = sorted(kept, key=lambda pair: pair[0])[:2]
            rows.append(normalize(torch.stack([f for _, f in surest]).mean(0, keepdim=True), dim=1)[0])
        torch.testing.assert_close(found, made.student.backbone(query) @ torch.stack(rows).T)


def test_answers_of_experts() -> None:
    made, support, query = net(), images(6), images(5, seed=1)
    with torch.no_grad():
        each = torch.stack([h(e(query)) for h, e in zip(made.expert_heads, made.experts, strict=True)])
        on_support = torch.stack([h(e(support)) for h, e in zip(made.expert_heads, made.experts, strict=True)])
    surest = min(range(3), key=lambda e: float(entropy(on_support[e]).mean()))
    best = max(range(3), key=lambda e: int((each[e].argmax(1) == LABEL).sum()))

    with torch.no_grad():
        torch.testing.assert_close(expert_logits(made, query, 50), each)
        torch.testing.assert_close(answered(Ensemble(), made, support, query), each.mean(0))
        torch.testing.assert_close(answered(ExpertByDomain(), made, support, query, own=2), each[2])
        torch.testing.assert_close(answered(ExpertByDomain(), made, support, query), each[surest])
        torch.testing.assert_close(answered(BestExpert(), made, support, query), each[best])
        teacher = made.teacher_head(made.target(*made.tokens(query)))
        torch.testing.assert_close(answered(Teacher(), made, support, query), teacher)
    with pytest.raises(ValueError, match="chooses by labels"):
        BestExpert().predict(made, None, query)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Distil(form="all"), "form='all'"),  # type: ignore[arg-type]
        (lambda: Unadapted(size=0), "size=0"),
        (lambda: BatchStatistics(share=1.5), "share=1.5"),
        (lambda: Shot(steps=-1), "steps=-1"),
        (lambda: T3A(keep=0), "keep=0"),
        (lambda: Memo(augmentations=0), "augmentations=0"),
    ],
)
def test_options_out_of_range_are_told(make: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()  # type: ignore[operator]


def test_meta_training_makes_the_step_lower_the_loss_of_held_out_episodes() -> None:
    """Domains turn a picture's colours; the student is trained for the adapted loss alone, over three seen domains."""
    made = net(InnerStep(rate=0.3), told=facts(num_experts=3))
    generator = torch.Generator().manual_seed(0)
    shapes = torch.randn(4, 3, 8, 8, generator=generator)
    turns = torch.randn(3, 3, 3, generator=generator)

    def episode(domain: int) -> tuple[Tensor, Tensor, Tensor]:
        label = torch.randint(4, (24,), generator=generator)
        image = shapes[label] + 0.5 * torch.randn(24, 3, 8, 8, generator=generator)
        image = torch.einsum("nchw,dc->ndhw", image, turns[domain])
        return image[:8], image[8:], label[8:]

    parameters = [*made.student.parameters(), *made.aggregator.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    for step in range(60):
        x, query, label = episode(step % 3)
        own = torch.full((8,), step % 3)
        cross_entropy(made(query, made.adapt(x, made.tokens(x, own), train=True)), label).backward()
        optimizer.step()
        optimizer.zero_grad()

    gains = []
    for number in range(12):
        x, query, label = episode(number % 3)
        own = torch.full((8,), number % 3)
        with torch.no_grad():
            adapted = cross_entropy(made(query, made.adapt(x, made.tokens(x, own))), label)
            gains.append(float(cross_entropy(made(query), label) - adapted))
    assert sum(gains) / len(gains) > 0.05
    assert min(gains) > -0.05
