# SPDX-License-Identifier: Apache-2.0
"""The objective of meta-training as a loop over domains and images, for a linear student: values and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moeapps.data.images.batch import ImageBatch
from tasks.adaptation.data.batch import Episode, EpisodeBatch
from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.module import MetaTask
from tasks.adaptation.nets.adapt import InnerStep
from tests.tasks.adaptation.meta_dmoe_common import K, LinearBackbone, facts, images

Floats = NDArray[np.float64]
RATE = 0.3
# Domain, support images, and the labels of the query images: domains of other sizes, one with unknown labels.
STEP = [(0, 4, [1, 2, 0, 3, 1, 1]), (2, 3, [2]), (1, 5, [3, -1, 0, -1])]


def batch(told: list[tuple[int, int, list[int]]], *, measured: bool) -> EpisodeBatch:
    made = []
    for domain, support, labels in told:
        x = images(support + len(labels), seed=domain).double()
        y = torch.tensor(labels).double().where(torch.tensor(labels) >= 0, torch.nan) if measured else labels
        parts = (x[:support], torch.full((support,), -1)), (x[support:], torch.as_tensor(y))
        rows = [
            ImageBatch(image=x, label=y, domain=torch.full((len(x),), domain), index=torch.arange(len(x)))
            for x, y in parts
        ]
        made.append(Episode(*rows, domain=domain))
    return EpisodeBatch(tuple(made))


def task(*, measured: bool) -> MetaTask:
    torch.manual_seed(0)
    told = facts(num_classes=1, target="regression") if measured else facts()

    def build(told: dict[str, Any]) -> MetaDMoE:
        return MetaDMoE(told, backbone=LinearBackbone, depth=0, heads=1, step=InnerStep(rate=RATE))

    return MetaTask(net=build, facts=told).double().train()


def by_hand(made: MetaTask, w: Floats, steps: EpisodeBatch, *, measured: bool) -> float:
    """Equations 1 to 4 of docs/papers/meta_dmoe.md, the aggregator being a mean."""
    experts = [expert.linear.weight.detach().numpy() for expert in made.net.experts]
    head = made.net.student.head
    h, c = head.weight.detach().numpy(), head.bias.detach().numpy()
    losses = []
    for episode in steps:
        x = episode.support.image.flatten(1).numpy()
        target = np.mean([x @ m.T for e, m in enumerate(experts) if e != episode.domain], axis=0)
        moved = w - RATE * 2 / target.size * (x @ w.T - target).T @ x
        terms = []
        for one, label in zip(episode.query.image.flatten(1).numpy(), episode.query.label.tolist(), strict=True):
            told = h @ (moved @ one) + c
            if measured and label == label:
                terms.append((told[0] - label) ** 2)
            elif not measured and label >= 0:
                terms.append(np.log(np.exp(told).sum()) - told[label])
        losses += [np.mean(terms)] if terms else []
    return float(np.mean(losses))


@pytest.mark.parametrize("measured", [False, True], ids=["classes", "values"])
def test_every_domain_of_a_step_weighs_the_same_however_many_images_answer_for_it(measured: bool) -> None:
    made, steps = task(measured=measured), batch(STEP, measured=measured)
    weight = made.net.student.backbone.linear.weight
    w = weight.detach().numpy().copy()

    loss = made.shared_step(steps, "train").loss
    loss.backward()

    assert loss.item() == pytest.approx(by_hand(made, w, steps, measured=measured), rel=1e-10)
    assert weight.grad is not None
    for place in [(0, 0), (2, 17), (4, 191)]:
        step = np.zeros_like(w)
        step[place] = 1e-5
        up, down = (by_hand(made, w + sign * step, steps, measured=measured) for sign in (1, -1))
        assert float(weight.grad[place]) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-9)


def test_processes_that_share_the_domains_of_a_step_have_the_loss_of_one_that_has_them_all() -> None:
    made, whole = task(measured=False), [*STEP, (1, 2, [0, 2, 2])]

    alone = made.shared_step(batch(whole, measured=False), "train").loss
    shared = [made.shared_step(batch(whole[rank::2], measured=False), "train").loss for rank in range(2)]

    torch.testing.assert_close(torch.stack(shared).mean(), alone, rtol=1e-12, atol=0)


def test_a_domain_without_a_known_label_has_no_say_and_a_step_without_any_no_loss() -> None:
    made, blind = task(measured=False), (1, 4, [-1, -1])

    with_it, without = (made.shared_step(batch(told, measured=False), "train") for told in ([*STEP, blind], STEP))
    none = made.shared_step(batch([blind], measured=False), "train")

    torch.testing.assert_close(with_it.loss, without.loss, rtol=1e-12, atol=0)
    assert (float(none.loss.detach()), none.labelled) == (0.0, 0)
    assert K == 4  # labels above are of four classes
