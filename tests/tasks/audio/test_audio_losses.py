# SPDX-License-Identifier: Apache-2.0
"""Loss and bits of codes, against loops that read like their definitions and numbers counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moeapps.evaluation.units import pooled_score
from tasks.audio.losses import code_nats, codec_loss
from tasks.audio.metrics import CodeBits, audio_metrics, code_bits, unit_parts
from tasks.audio.nets.language_model import IGNORED

V = 5


def case() -> tuple[torch.Tensor, torch.Tensor]:
    """Two clips of six steps, three books; the second book has few targets, the first an end."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 6, 3, V + 3, generator=generator)
    target = torch.randint(0, V, (2, 6, 3), generator=generator)
    target[0, 5, 0] = V
    target[:, 2:, 1] = IGNORED
    target[1, 4:] = IGNORED
    return logits, target


def naive(logits: torch.Tensor, target: torch.Tensor) -> list[list[float]]:
    """Nats of all targets of each book, one after the other."""
    books: list[list[float]] = [[], [], []]
    for clip in range(2):
        for step in range(6):
            for book in range(3):
                symbol = int(target[clip, step, book])
                if symbol != IGNORED:
                    row = logits[clip, step, book].double()
                    books[book].append(float(row.exp().sum().log() - row[symbol]))
    return books


def test_loss_is_the_sum_over_books_of_the_mean_over_their_targets() -> None:
    logits, target = case()
    means = [sum(book) / len(book) for book in naive(logits, target)]

    assert float(codec_loss(code_nats(logits, target), target)) == pytest.approx(sum(means), rel=1e-5)
    weighed = codec_loss(code_nats(logits, target), target, [1.0, 0.5, 0.25])
    assert float(weighed) == pytest.approx(means[0] + 0.5 * means[1] + 0.25 * means[2], rel=1e-5)


def test_equal_logits_cost_k_log_u_and_a_book_without_targets_costs_nothing() -> None:
    target = torch.zeros(1, 4, 3, dtype=torch.int64)
    nats = code_nats(torch.zeros(1, 4, 3, V + 3), target)
    assert float(codec_loss(nats, target)) == pytest.approx(3 * math.log(V + 3), rel=1e-6)

    target[:, :, 2] = IGNORED
    logits = torch.zeros(1, 4, 3, V + 3, requires_grad=True)
    loss = codec_loss(code_nats(logits, target), target)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(V + 3), rel=1e-6)
    assert logits.grad is not None
    assert torch.equal(logits.grad[:, :, 2], torch.zeros(1, 4, V + 3))


def test_bits_are_nats_over_log_two_of_real_codes_pooled_over_clips() -> None:
    logits, target = case()
    bits, counts = code_bits(code_nats(logits, target), target, V)
    metric = CodeBits(3)
    for row in range(2):  # in two batches, as an evaluation would
        metric.update(bits[row : row + 1], counts[row : row + 1])
    found = metric.compute()

    real = target.masked_fill(target == V, IGNORED)  # the end is no code
    wanted = [sum(book) / len(book) / math.log(2) for book in naive(logits, real)]
    assert counts.tolist() == [[5, 2, 6], [4, 2, 4]]
    assert [float(found[f"bits_{book}"]) for book in range(3)] == pytest.approx(wanted, rel=1e-5)
    assert float(found["bits"]) == pytest.approx(sum(wanted) / 3, rel=1e-5)


def test_a_uniform_guess_over_the_codes_costs_log2_v_bits() -> None:
    logits = torch.full((1, 4, 2, V + 3), -1e9)
    logits[..., :V] = 0.0
    target = torch.arange(4).view(1, 4, 1).expand(1, 4, 2)
    bits, counts = code_bits(code_nats(logits, target), target, V)

    assert (bits / counts).flatten().tolist() == pytest.approx([math.log2(V)] * 2, rel=1e-6)


def test_parts_of_clips_pool_to_the_scores_of_the_table() -> None:
    logits, target = case()
    bits, counts = code_bits(code_nats(logits, target), target, V)
    metric = audio_metrics(3)
    metric.update(bits, counts)
    scores = metric.compute()
    parts = unit_parts(torch.arange(2), bits, counts)

    assert set(parts) == set(scores)
    for name, (unit, added) in parts.items():
        assert unit.tolist() == [0, 1]
        pooled = float(pooled_score(np.asarray(added.sum(0))))
        assert pooled == pytest.approx(float(scores[name]), rel=1e-9)


def test_metric_says_that_less_is_better_and_how_many_clips_count() -> None:
    metric = CodeBits(2)
    metric.update(torch.tensor([[8.0, 8.0], [0.0, 0.0]]).double(), torch.tensor([[1.0, 1.0], [0.0, 0.0]]).double())

    metric.compute()

    assert metric.larger_is_better == {"bits": False, "bits_0": False, "bits_1": False}
    assert metric.scorable == 1
