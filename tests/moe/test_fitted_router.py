# SPDX-License-Identifier: Apache-2.0
"""The fitted router: the gate is the closed form of least squares on whatever partition it is given."""

from __future__ import annotations

import pytest
import torch

from moeapps.moe import FittedRouter, LowestLoss


def test_the_gate_is_the_closed_form_and_its_rows_sum_to_one() -> None:
    D, E = 8, 4
    features, truth = torch.randn(40, D).double(), torch.arange(40) % E
    router = FittedRouter(D, E, LowestLoss(), noise=0.0).double()
    router.fit(features, torch.rand(40, E) + (torch.arange(E) != truth[:, None]))

    A, Y = torch.cat([features, torch.ones(len(features), 1)], 1), torch.eye(E).double()[truth]
    W = torch.linalg.inv(A.T @ A) @ A.T @ Y
    torch.testing.assert_close(torch.cat([router.score.weight.T, router.score.bias[None]]), W)
    torch.testing.assert_close((A @ W).sum(1), torch.ones(len(A)).double())


def test_hard_em_may_leave_experts_idle_and_survives_losses_that_are_not_numbers() -> None:
    losses = torch.tensor([[1.0, 2.0, torch.nan], [1.0, torch.inf, 0.5], [0.0, 1.0, 1.0]])

    assert LowestLoss()(torch.zeros(3, 2), losses).tolist() == [0, 2, 0]


def test_wrong_use_is_told() -> None:
    with pytest.raises(ValueError, match="1 rows cannot be divided among 2 experts"):
        LowestLoss()(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="rows by experts"):
        FittedRouter(2, 2, LowestLoss()).fit(torch.zeros(3, 2), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="noise=-1"):
        FittedRouter(2, 2, LowestLoss(), noise=-1)
    with pytest.raises(ValueError, match="warmup=-1"):
        FittedRouter(2, 2, LowestLoss(), warmup=-1)
