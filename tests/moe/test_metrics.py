# SPDX-License-Identifier: Apache-2.0
"""Routing metrics against numpy, scipy and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from moeapps.moe import metrics
from moeapps.moe.routing import Routing


@pytest.fixture
def choices() -> tuple[torch.Tensor, torch.Tensor]:
    """First choices of 300 rows and their labels, dependent but not equal."""
    generator = torch.Generator().manual_seed(0)
    label_N = torch.randint(0, 3, (300,), generator=generator)
    noise_N = torch.randint(0, 5, (300,), generator=generator)
    return torch.where(torch.rand(300, generator=generator) < 0.6, label_N, noise_N), label_N


def one_hot(expert_N: torch.Tensor, num_experts: int = 5) -> torch.Tensor:
    return torch.nn.functional.one_hot(expert_N, num_experts)


def test_balanced_load() -> None:
    counts = torch.tensor([7, 7, 7, 7])
    assert metrics.load(counts).tolist() == [1.0] * 4
    assert [f(counts).item() for f in (metrics.max_violation, metrics.load_cv, metrics.dead_fraction)] == [
        0.0,
        0.0,
        0.0,
    ]


def test_all_on_one_expert() -> None:
    counts = torch.tensor([0, 12, 0, 0])
    assert metrics.max_violation(counts).item() == 3.0
    assert metrics.load_cv(counts).item() == pytest.approx(math.sqrt(3))
    assert metrics.dead_fraction(counts).item() == 0.75


def test_no_work_is_zero_load_everywhere() -> None:
    counts = torch.zeros(3, dtype=torch.int64)
    assert metrics.load(counts).tolist() == [0.0, 0.0, 0.0]
    assert metrics.max_violation(counts).item() == 0.0
    assert metrics.load_cv(counts).item() == 0.0
    assert metrics.dead_fraction(counts).item() == 1.0


def test_load_statistics_equal_numpy() -> None:
    counts = np.array([5, 0, 17, 3, 1000, 40])
    ours = torch.from_numpy(counts)
    assert metrics.load_cv(ours).item() == pytest.approx(counts.std() / counts.mean())
    assert metrics.max_violation(ours).item() == pytest.approx(counts.max() / counts.mean() - 1)
    assert metrics.dead_fraction(ours).item() == pytest.approx(np.mean(counts < 0.01 * counts.mean()))


def routing() -> Routing:
    # Row 0 works twice, row 1 once, row 2 not at all, row 3 (masked) not at all.
    return Routing(
        torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([0, 1, 2, 3, 3, 3, 3, 3]), torch.ones(8), 4, 3, top_k=2
    )


def test_mean_k_counts_work_only() -> None:
    mask = torch.tensor([True, True, True, False])
    assert metrics.mean_k(routing()).item() == 0.75
    assert metrics.mean_k(routing(), mask).item() == 1.0
    assert metrics.mean_k(routing(), torch.zeros(4, dtype=torch.bool)).item() == 0.0


def test_token_entropy_equals_scipy_and_normalises() -> None:
    probs = np.random.default_rng(0).random((20, 6))
    probs[3] = [0, 0, 1, 0, 0, 0]
    mask = torch.arange(20) % 2 == 0
    assert metrics.token_entropy(torch.from_numpy(probs)).item() == pytest.approx(entropy(probs, axis=1).mean())
    assert metrics.token_entropy(torch.from_numpy(probs), mask).item() == pytest.approx(
        entropy(probs[::2], axis=1).mean()
    )
    assert metrics.token_entropy(torch.zeros(0, 4)).item() == 0.0


def test_mutual_information_equals_scikit_learn(choices) -> None:
    expert_N, label_N = choices
    expected = mutual_info_score(label_N, expert_N) / entropy(np.bincount(label_N))
    assert metrics.mutual_information(one_hot(expert_N), label_N).item() == pytest.approx(expected)


def test_one_label_leaves_nothing_to_tell_whatever_rounding_does() -> None:
    for seed in range(50):
        table_LE = torch.zeros(4, 7, dtype=torch.float64)  # experts by label, of which only one was met
        table_LE[2] = 1000 * torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert metrics.mutual_information(table_LE, torch.arange(4)).item() == 0.0


def test_mutual_information_is_one_if_the_expert_tells_the_label_and_zero_if_it_ignores_it() -> None:
    label_N = torch.arange(60) % 3
    assert metrics.mutual_information(one_hot(label_N), label_N).item() == pytest.approx(1.0)
    # Two experts to a label still tell it.
    assert metrics.mutual_information(
        one_hot(label_N + 3 * (torch.arange(60) % 2), 6), label_N
    ).item() == pytest.approx(1.0)
    assert metrics.mutual_information(one_hot(torch.arange(60) // 3 % 2), label_N).item() == pytest.approx(
        0.0, abs=1e-12
    )
    assert metrics.mutual_information(torch.ones(60, 4), label_N).item() == pytest.approx(0.0, abs=1e-12)


def test_mutual_information_of_one_label_is_zero() -> None:
    assert metrics.mutual_information(one_hot(torch.arange(5)), torch.zeros(5, dtype=torch.int64)).item() == 0.0


def test_rows_without_label_are_left_out(choices) -> None:
    expert_N, label_N = choices
    ignored = label_N.clone()
    ignored[::4] = -1
    kept = ignored >= 0
    a = metrics.mutual_information(one_hot(expert_N), ignored)
    torch.testing.assert_close(a, metrics.mutual_information(one_hot(expert_N[kept]), label_N[kept]))


def test_information_does_not_change_when_experts_are_renumbered_or_split_over_rows(choices) -> None:
    expert_N, label_N = choices
    assign = one_hot(expert_N)
    value = metrics.mutual_information(assign, label_N)
    torch.testing.assert_close(metrics.mutual_information(assign[:, [3, 1, 4, 0, 2]], label_N), value)
    torch.testing.assert_close(metrics.mutual_information(assign.repeat(2, 1), label_N.repeat(2)), value)


def test_expert_domain_matrix_equals_numpy(choices) -> None:
    expert_N, label_N = choices
    matrix = metrics.expert_domain_matrix(one_hot(expert_N), label_N, num_domains=4)
    for s in range(3):
        expected = np.bincount(expert_N[label_N == s], minlength=5) / (label_N == s).sum().item()
        np.testing.assert_allclose(matrix[s], expected)
    assert matrix[3].tolist() == [0.0] * 5


def test_jensen_shannon_distance_equals_scipy() -> None:
    table = np.random.default_rng(0).random((4, 6))
    table[1, 2:] = 0
    ours = metrics.jensen_shannon_distance(torch.from_numpy(table))
    expected = [[jensenshannon(a, b, base=2) for b in table] for a in table]
    np.testing.assert_allclose(ours, np.nan_to_num(expected), atol=1e-7)
    assert ours.diagonal().tolist() == [0.0] * 4


def test_jensen_shannon_distance_of_disjoint_rows_is_one_and_of_an_empty_row_unknown() -> None:
    distance = metrics.jensen_shannon_distance(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    assert distance[0, 1].item() == 1.0
    assert distance[2].isnan().all()
    assert distance[0, 0].item() == 0.0


def test_coactivation_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    assign = torch.rand(30, 4, generator=generator) * (torch.rand(30, 4, generator=generator) < 0.5)
    ours = metrics.coactivation(assign)
    for i in range(4):
        for j in range(4):
            assert ours[i, j].item() == sum(bool(row[i] != 0 and row[j] != 0) for row in assign)


def test_path_consistency_equals_scikit_learn(choices) -> None:
    first, second = choices
    third = (second + first) % 5
    expected = np.mean([normalized_mutual_info_score(first, second), normalized_mutual_info_score(second, third)])
    assert metrics.path_consistency([first, second, third], 5).item() == pytest.approx(expected)


def test_path_consistency_ignores_the_numbering_of_experts(choices) -> None:
    first, _ = choices
    relabelled = torch.tensor([4, 2, 0, 1, 3])[first]
    assert metrics.path_consistency([first, relabelled, first], 5).item() == pytest.approx(1.0)
    constant = torch.zeros(10, dtype=torch.int64)
    assert metrics.path_consistency([constant, constant], 5).item() == 1.0


def test_path_consistency_leaves_dropped_rows_out(choices) -> None:
    first, second = choices
    dropped = second.clone()
    dropped[:50] = 5
    a = metrics.path_consistency([first, dropped], 5)
    torch.testing.assert_close(a, metrics.path_consistency([first[50:], second[50:]], 5))


def test_path_consistency_without_rows_is_unknown(choices) -> None:
    first, second = choices
    none, dropped = torch.zeros(0, dtype=torch.int64), torch.full_like(first, 5)
    assert metrics.path_consistency([none, none], 5).isnan()
    assert metrics.path_consistency([first, dropped], 5).isnan()
    known = metrics.path_consistency([first, second], 5)
    torch.testing.assert_close(metrics.path_consistency([first, second, dropped], 5), known)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.load(torch.ones(2, 2)), "one count per expert"),
        (lambda: metrics.contingency(torch.ones(3, 2), torch.zeros(2, dtype=torch.int64)), "one label per row"),
        (lambda: metrics.path_consistency([torch.zeros(3, dtype=torch.int64)], 2), "at least two"),
    ],
)
def test_errors_say_what_to_do(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
