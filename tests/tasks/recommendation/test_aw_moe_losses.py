# SPDX-License-Identifier: Apache-2.0
"""The losses of list ranking beside loops, and the contrast at its closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tasks.recommendation.losses import (
    RANKING_LOSSES,
    RankingLoss,
    Similarity,
    info_nce,
    list_softmax,
    pairwise,
    pointwise,
    random_mask,
    scorable_lists,
)


def lists(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Five lists: two of several positives, one without a positive, one without a negative, one of one candidate."""
    torch.manual_seed(seed)
    label = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    return torch.randn(5, 4).double().requires_grad_(), label, mask


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive(name: str, logits: Tensor, label: Tensor, mask: Tensor) -> float:
    terms: list[float] = []
    for s, y, m in zip(logits.tolist(), label.tolist(), mask.tolist(), strict=True):
        good = [v for v, t, real in zip(s, y, m, strict=True) if real and t]
        bad = [v for v, t, real in zip(s, y, m, strict=True) if real and not t]
        if name == "pointwise":
            terms += [-math.log(sigmoid(v)) for v in good] + [-math.log(1 - sigmoid(v)) for v in bad]
        elif name == "pairwise":
            terms += [-math.log(sigmoid(p - n)) for p in good for n in bad]
        elif bad:
            terms += [-math.log(math.exp(p) / (math.exp(p) + sum(math.exp(n) for n in bad))) for p in good]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_ranking_losses_are_their_loops_over_real_candidates(name: RankingLoss) -> None:
    logits, label, mask = lists()

    loss = RANKING_LOSSES[name](logits, label, mask)
    loss.backward()

    assert float(loss.detach()) == pytest.approx(naive(name, logits.detach(), label, mask), rel=1e-9)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[~mask].any()  # padding has no say
    scored = scorable_lists(name, label, mask)
    assert scored.tolist() == ([True] * 5 if name == "pointwise" else [True, True, False, False, False])
    assert not logits.grad[~scored].any()


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_lists_that_say_nothing_give_a_zero_with_a_graph(name: RankingLoss) -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    label, mask = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    loss = RANKING_LOSSES[name](logits, label, mask)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_one_negative_for_one_positive_makes_pairs_and_softmax_the_same() -> None:
    logits, label, mask = torch.randn(6, 2), torch.tensor([[1.0, 0.0]]).expand(6, 2), torch.ones(6, 2).bool()
    torch.testing.assert_close(list_softmax(logits, label, mask), pairwise(logits, label, mask))
    assert pointwise(torch.zeros(6, 2), label, mask).item() == pytest.approx(math.log(2))


# --- the contrast ---


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_info_nce_of_orthonormal_gates_and_of_equal_ones(similarity: str, temperature: float) -> None:
    options = {"temperature": temperature, "similarity": similarity}
    g, user = torch.eye(5).double(), torch.arange(5)
    closed = math.log(1 + 4 * math.exp(-1 / temperature))

    assert float(info_nce(g, g, user, **options)) == pytest.approx(closed)  # type: ignore[arg-type]
    same = torch.ones(7, 3).double() / 3**0.5
    assert float(info_nce(same, same, torch.arange(7), **options)) == pytest.approx(math.log(7))  # type: ignore[arg-type]
    assert float(info_nce(g[:1], g[:1], user[:1], **options)) == 0  # type: ignore[arg-type]
    assert float(info_nce(g[:0], g[:0], user[:0], **options)) == 0  # type: ignore[arg-type]


def test_info_nce_is_its_loop_and_leaves_the_same_user_out() -> None:
    g, h = (torch.randn(6, 3).double().requires_grad_() for _ in range(2))
    user = torch.tensor([4, 4, 7, 1, 7, 4])

    loss = info_nce(g, h, user, temperature=0.5)

    unit_g, unit_h = g / g.norm(dim=1, keepdim=True), h / h.norm(dim=1, keepdim=True)
    terms = []
    for i in range(6):
        allowed = [j for j in range(6) if j == i or user[j] != user[i]]
        weights = {j: torch.exp(unit_g[i] @ unit_h[j] / 0.5) for j in allowed}
        terms.append(-torch.log(weights[i] / sum(weights.values())))
    torch.testing.assert_close(loss, torch.stack(terms).mean())


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_info_nce_is_its_loop_under_bfloat16_too(similarity: Similarity) -> None:
    """Similarities rounded to bfloat16 would move the loss by half a per cent and its gradient by two."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(64, 8, generator=generator)
    h = g + 0.05 * torch.randn(64, 8, generator=generator)
    anchor = g.clone().requires_grad_()

    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(anchor, h, torch.arange(64), similarity=similarity)
    (slope,) = torch.autograd.grad(loss, anchor)

    exact = g.double().requires_grad_()
    terms = []
    for i in range(64):
        near = [exact[i] @ other / 0.1 for other in h.double()]
        if similarity == "cosine":
            near = [s / exact[i].norm() / other.norm() for s, other in zip(near, h.double(), strict=True)]
        terms.append(torch.logsumexp(torch.stack(near), 0) - near[i])
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (wanted,) = torch.autograd.grad(expected, exact)
    assert float((slope.double() - wanted).norm() / wanted.norm()) < 1e-4


def test_pairs_of_one_user_have_no_gradient() -> None:
    g, h = torch.randn(3, 4).double(), torch.randn(3, 4).double().requires_grad_()
    user = torch.tensor([5, 5, 5])
    info_nce(g, h, user).backward()  # every pair is of one user: each list is alone with its own view
    assert not h.grad.any()


@pytest.mark.parametrize(
    ("options", "text"), [({"temperature": 0.0}, "above 0"), ({"similarity": "l2"}, "cosine or dot")]
)
def test_the_contrast_refuses_what_it_cannot_use(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        info_nce(torch.eye(2), torch.eye(2), torch.arange(2), **options)  # type: ignore[arg-type]


# --- what is dropped ---


def test_masks_drop_at_their_rate_and_never_everything() -> None:
    lengths = torch.arange(4000) % 9
    mask = torch.arange(8) < lengths[:, None]
    kept = random_mask(mask, 0.3, torch.Generator().manual_seed(1))

    assert not (kept & ~mask).any()
    assert (kept.any(1) == mask.any(1)).all()
    long = lengths == 8
    assert float(kept[long].double().mean()) == pytest.approx(0.7, abs=0.03)
    assert (kept[lengths == 1].sum(1) == 1).all()
    heavy = random_mask(mask, 0.99, torch.Generator().manual_seed(1))
    assert (heavy.sum(1)[lengths > 0] >= 1).all()
    assert set(heavy[long].nonzero()[:, 1].tolist()) == set(range(8))  # the one that stays is not always the same


def test_masks_of_probability_zero_drop_nothing_and_draws_are_their_own() -> None:
    mask = torch.rand(20, 6) < 0.5
    state = torch.get_rng_state()
    assert torch.equal(random_mask(mask, 0.0, torch.Generator().manual_seed(3)), mask)
    assert torch.equal(torch.get_rng_state(), state)
    assert random_mask(mask[:, :0], 0.5, torch.Generator()).shape == (20, 0)
