# SPDX-License-Identifier: Apache-2.0
"""The step-cost benchmark of ProMoE measures what it says; no clock is trusted here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import promoe_speed as speed
from benchmarks.limits import check_parts, product_flops

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


def test_parts_multiply_no_more_than_the_step_and_parts_of_a_mixture_no_more_than_it() -> None:
    task, batch = speed.build(flags=TINY)
    step, parts = speed.train_step(task, batch), speed.captured_parts(task, batch)

    check_parts(step, parts)
    calls = speed.mixture_calls(task, batch)
    inner = {"routing": [speed.routing_alone(*call) for call in calls]}
    inner["products"] = [speed.products_alone(*call) for call in calls]
    check_parts(lambda: [work() for work in parts["mixtures"]], inner)


def test_losses_on_the_routing_stop_where_the_routers_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differentiated as far as the first router's features, they would run the backward of all later blocks too."""
    task, batch = speed.build(flags=[*TINY, "--model.net.init_args.depth", "4"])
    parts = speed.captured_parts(task, batch)

    assert len(parts["mixtures"]) == 2
    (losses,) = parts["losses on the routing"]
    assert product_flops(losses) < 0.1 * product_flops(parts["mixtures"][0])
    monkeypatch.setattr(speed, "fixed", lambda records: records)
    uncut = speed.routing_losses(task)
    assert product_flops(uncut) > product_flops(parts["mixtures"][1])


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
    assert abs(sum(part["share"] for part in report["parts"].values()) - 1) < 0.005  # the rest is what is left
    assert report["parts"]["losses on the routing"]["share"] < 0.05  # 2 ms of 500; 0.15 was another block's backward
    told = " ".join(Path("tasks/image_diffusion/README.md").read_text(encoding="utf-8").split())
    assert f"costs {step['ratio']:.2f} times the dense twin's" in told
    assert f"one in bfloat16 costs {half['ratio']:.2f} of one in float32" in told
