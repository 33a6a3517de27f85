# SPDX-License-Identifier: Apache-2.0
"""The step-cost benchmark of Point-MoE measures what it says; no clock is trusted here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import point_moe_speed as speed
from benchmarks.limits import check_parts
from tasks.point_cloud.nets.sparse_conv import neighbour_table, submanifold_conv

RESULTS = Path("benchmarks/results/point_moe_speed.json")
TINY = ["--config", "configs/debug/tiny.yaml", "--config", "configs/debug/point_moe.yaml"]


@pytest.mark.parametrize("name", speed.OTHER_CONVS)
def test_other_ways_to_convolve_give_the_shipped_numbers_and_gradients(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    cell = torch.randperm(10**3, generator=generator)[:300]
    grid = torch.stack([cell // 100, cell // 10 % 10, cell % 10], dim=1)
    table = neighbour_table(grid, torch.zeros(300, dtype=torch.int64), 3)
    x = torch.randn(300, 8, generator=generator, requires_grad=True)
    weight = torch.randn(27, 8, 12, generator=generator, requires_grad=True)

    expected, found = submanifold_conv(x, weight, table), speed.OTHER_CONVS[name](x, weight, table)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), [x, weight]),
        torch.autograd.grad(expected.square().sum(), [x, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-4)


def test_every_part_of_a_step_is_found_once_per_call() -> None:
    task, batch = speed.build(flags=TINY)
    parts = speed.captured_parts(task, batch)

    blocks = 6  # of configs/point_moe.yaml: 1 + 1 + 2 in the encoder, 1 + 1 in the decoder
    counts = {part: len(calls) for part, calls in parts.items()}
    assert counts == {
        "convolutions": blocks + 1,
        "attention": blocks,
        "mixtures": blocks,
        "MLPs": blocks,
        "curves and tables": 1,
        "head and loss": 1,
    }
    check_parts(speed.train_step(task, batch), parts)
    before = [p.detach().clone() for p in task.parameters()]
    for calls in parts.values():
        for work in calls:
            work()
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))


def test_the_committed_file_holds_the_gate_and_its_parts_add_up() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))

    row = report["step_over"]["dense"]
    assert len(row["pairs"]) >= 9
    assert row["ratio"] == sorted(row["pairs"])[len(row["pairs"]) // 2]
    assert row["gate"] == speed.GATE == 1.25
    assert row["ok"] is True
    assert row["ratio"] <= speed.GATE
    assert abs(sum(part["share"] for part in report["parts"].values()) - 1) < 0.15
    assert report["largest"] == max(report["parts"], key=lambda part: report["parts"][part]["share"])
    assert set(report["conv_tries"]) == set(speed.OTHER_CONVS)


def test_the_card_of_the_task_quotes_the_committed_file() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    readme = Path("tasks/point_cloud/README.md").read_text(encoding="utf-8")

    quoted = [f"{report['step_over'][name]['ratio']:.2f} times" for name in ("dense", "ptv3")]
    quoted += [f"{part} {100 * row['share']:.0f}%" for part, row in report["parts"].items()]
    tries = sorted(report["conv_tries"].values())
    quoted.append(f"{tries[0]:.2f} to {tries[-1]:.2f} times")
    assert [text for text in quoted if text not in readme] == []
