# SPDX-License-Identifier: Apache-2.0
"""The step-cost benchmark of ProMoE measures what it says; no clock is trusted here."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks import promoe_speed as speed

TINY = ["--config", "configs/debug/tiny.yaml", "--config", "configs/debug/promoe.yaml", "--trainer.callbacks", "null"]


def test_every_part_of_a_step_is_found_once_per_call_and_changes_nothing() -> None:
    task, batch = speed.build(flags=TINY)
    parts = speed.captured_parts(task, batch)

    counts = {part: len(calls) for part, calls in parts.items()}
    assert counts == {
        "attention": 2,
        "mixtures": 1,
        "MLPs": 1,
        "modulations": 3,
        "patches and last layer": 2,
        "losses on the routing": 1,
        "optimizer": 1,
    }
    before = [p.detach().clone() for p in task.parameters()]
    for calls in parts.values():
        for work in calls:
            work()
            work()
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))


def test_parts_of_the_mixtures_are_named_and_the_report_is_whole() -> None:
    report = speed.measure(pairs=1, flags=TINY)

    assert set(report["mixtures_ms"]) == {"routing", "products of experts", "transport"}
    assert set(report["step_over"]) == {"dense", "dit"}
    assert report["step_over"]["dense"]["gate"] == speed.GATE == 1.15
    assert len(report["bf16_over_float32"]["pairs"]) == 1
    assert report["tokens"] == report["images"] * 16
    speed.show(report)


def test_the_readme_states_the_committed_step() -> None:
    report = json.loads(Path("benchmarks/results/promoe_speed.json").read_text(encoding="utf-8"))
    step, half = report["step_over"]["dense"], report["bf16_over_float32"]

    assert step["ok"]
    assert len(step["pairs"]) == 9
    told = " ".join(Path("tasks/image_diffusion/README.md").read_text(encoding="utf-8").split())
    assert f"costs {step['ratio']:.2f} times the dense twin's" in told
    assert f"one in bfloat16 costs {half['ratio']:.2f} of one in float32" in told
