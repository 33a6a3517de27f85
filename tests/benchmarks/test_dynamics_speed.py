# SPDX-License-Identifier: Apache-2.0
"""The solver benchmark compares the same solves and counts unequal errors; no clock is trusted here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import dynamics_speed as speed


@pytest.mark.parametrize("name", speed.CASES)
def test_both_solvers_solve_the_same_problem_and_all_inputs_get_gradients(name: speed.Case) -> None:
    make_field, inputs, x0, dt = speed.CASES[name]()
    ours, theirs = speed.solve_ours(make_field(), x0, dt, 5), speed.their_rk4(make_field(), x0, dt, 5)

    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(theirs.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
        assert a.abs().sum() > 0


def test_mixture_uses_every_expert_equally_often() -> None:
    make_field, inputs, x0, _ = speed.mixture()
    make_field()(torch.zeros(speed.S), x0).square().sum().backward()
    grads = [p.grad.reshape(speed.E, -1).abs().sum(1) for p in inputs[1:] if p.grad is not None and len(p) == speed.E]

    assert all((grad > 0).all() for grad in grads)
    assert len(grads) >= 4


def test_the_error_ratio_is_one_of_solvers_of_equal_order() -> None:
    assert 0.2 < speed.error_ratio() < 5


@pytest.mark.parametrize(("ratios", "status"), [([0.9, 1.0, 1.05], 0), ([1.2, 1.3, 1.4], 1)])
def test_a_missed_gate_is_an_exit_status(
    ratios: list[float], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "paired_ratios", lambda *args, **kwargs: ratios)
    monkeypatch.setattr(speed, "median_ms", lambda *args, **kwargs: 1.0)
    monkeypatch.setattr(speed, "error_ratio", lambda: 1.1)

    assert speed.main(["--json", str(tmp_path / "a.json"), "--pairs", "3"]) == status
    rows = json.loads((tmp_path / "a.json").read_text())["over_torchdiffeq_rk4"]
    assert {row["at_equal_error"] for row in rows.values()} == {ratios[1] * 1.1**0.25}


def test_the_readme_states_the_committed_ratios() -> None:
    rows = json.loads(Path("benchmarks/results/dynamics_speed.json").read_text(encoding="utf-8"))[
        "over_torchdiffeq_rk4"
    ]
    text = " ".join(Path("tasks/dynamics/README.md").read_text(encoding="utf-8").split())

    assert f"takes {rows['mixture, forward']['at_equal_error']:.2f} of the CPU" in text
    assert f"{rows['mixture, fwd+bwd']['at_equal_error']:.2f} with the backward pass" in text
    assert all(row["ok"] and len(row["pairs"]) == 9 for row in rows.values())
