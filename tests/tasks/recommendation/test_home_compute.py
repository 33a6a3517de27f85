# SPDX-License-Identifier: Apache-2.0
"""HoME's compute by hand, from its equations and the layout its gates say they have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from moeapps.training.cost import count_flops
from tasks.recommendation.model import home

ROWS, DIM, WIDTH = 11, 40, 64
TASKS = (3, 4)  # per category
LOW, RANK, TOWER = 2, 8, 16


def feature_gates(views: int, width: int) -> int:
    """Down to all low-rank gates and their mix; up again as one block-diagonal matrix."""
    return 2 * views * (width * (LOW * RANK + LOW) + LOW * RANK * LOW * width)


def gates(states: int, width: int, slots: int, columns: int, num_gates: int, experts: int) -> int:
    """All columns (gates, then self-gates) as one product over all states; weights put in place, with and without
    self-gates; then the mixtures of the experts' outputs."""
    logits = 2 * states * width * slots * columns
    place = 2 * (2 * slots * columns * num_gates * experts)
    return logits + place + 2 * num_gates * experts * WIDTH


def by_hand() -> int:
    categories, tasks = len(TASKS), sum(TASKS)
    groups = categories + 1
    first = feature_gates(groups, DIM) + 2 * 3 * groups * DIM * WIDTH  # three experts of each group
    first += gates(groups, DIM, 3 * groups, 2 * groups, groups, 3 * groups)
    views = categories + tasks + 1  # one expert each
    second = feature_gates(views, WIDTH) + 2 * views * WIDTH * WIDTH
    second += gates(groups, WIDTH, 3, 2 * tasks, tasks, views)
    return ROWS * (first + second + 2 * tasks * (WIDTH * TOWER + TOWER))


@pytest.mark.parametrize("train", [False, True])
def test_home_costs_what_its_equations_say(train: bool) -> None:
    config = yaml.safe_load(Path("configs/home.yaml").read_text(encoding="utf-8"))
    options = config["model"]["init_args"]["net"]["init_args"]["bank"]["init_args"]
    names = ["watch"] * TASKS[0] + ["interaction"] * TASKS[1]
    net = home(**options)(DIM, {"tasks": [f"t{i}" for i in range(len(names))], "categories": names})

    assert count_flops(net.train(train), torch.randn(1, ROWS, DIM)) == pytest.approx(by_hand(), rel=0.01)
