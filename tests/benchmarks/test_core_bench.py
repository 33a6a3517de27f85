# SPDX-License-Identifier: Apache-2.0
"""The core benchmark: what it gates, what it writes, and that its measures measure; no clock is trusted here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import core, core_figure, system_share
from benchmarks.core_cases import (
    EXPERT_KINDS,
    FIELDS,
    NORMALISED,
    DenseNetwork,
    Size,
    dense_step,
    make_bank,
    make_routing,
    moe_step,
    padded_step,
    paired_ratios,
    products_step,
)
from benchmarks.core_rows import BACKENDS, MODES, PEERS, REGIMES, Regime, Row, against_dense, all_rows, saved_row


def test_the_list_has_every_regime_kind_and_backend_and_gates_auto() -> None:
    rows = all_rows()

    assert len({row.name for row in rows}) == len(rows)
    names = [regime.name for regime in REGIMES]
    timed = {(r.regime, r.mode, r.expert, r.backend) for r in rows if r.regime in names}
    modes = (*MODES, "saved")
    assert timed == {(r, m, k, b) for r in names for m in modes for k in EXPERT_KINDS for b in BACKENDS}
    assert all(row.gated == (row.backend == "auto") for row in rows if row.regime in names and row.mode != "saved")
    assert {row.expert for row in rows} >= {"reglu", "swiglu", "gelu-mlp-bias", NORMALISED, FIELDS}
    peers = {row.regime.split(" / ")[1] for row in rows if " / " in row.regime}
    assert peers == set(PEERS)


def test_gates_of_time_are_those_that_were_set_beforehand() -> None:
    bounds = {regime.name: (*regime.gates.values(), regime.stretch) for regime in REGIMES}

    assert bounds == {
        "R=1024": (1.15, 1.15, 1.00),
        "R=128": (1.25, 1.40, 1.20),
        "R=64": (1.40, 1.70, 1.45),
        "R=64 small": (1.50, 1.60, 1.35),
        "R=16": (2.40, 2.60, 2.00),
    }


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_the_roof_has_the_flops_of_the_chosen_experts(kind: str) -> None:
    size = Size(16, 4, 2, 8)
    experts = make_bank(size, kind)
    network = DenseNetwork(kind, size.d, size.k * size.hidden)

    weights = sum(layer.weight.numel() for layer in (network.first, network.second))
    assert 2 * weights == size.k * experts.flops_per_row
    for mode in MODES:
        dense_step(size, kind, mode)()
        moe_step(size, kind, mode, "auto")()


def test_routings_are_as_described() -> None:
    size = Size(512, 8, 2)
    uniform, zipf, top_p = (make_routing(size, spread) for spread in ("uniform", "zipf", "top_p"))

    assert uniform.counts().sum() == zipf.counts().sum() == 1024
    assert zipf.counts()[0] > 2 * zipf.counts()[-1]
    assert top_p.expert_M.numel() == 8 * 512
    assert 900 < top_p.counts().sum() < 1150
    expert_NK = uniform.expert_M.view(512, 2)
    assert (expert_NK[:, 0] != expert_NK[:, 1]).all()


def test_ratios_are_near_one_for_equal_work() -> None:
    a = torch.randn(200, 200)

    ratios = paired_ratios(lambda: a @ a, lambda: a @ a, pairs=5)

    assert len(ratios) == 5
    assert all(0.05 < ratio < 20 for ratio in ratios)


def fixed_row(ratio: float, *, gated: bool) -> Row:
    return Row("R", Size(1, 1, 1), "forward", "auto", "none", 1.0, lambda pairs, backend: [ratio], gated=gated)


@pytest.mark.parametrize(("ratio", "gated", "code"), [(0.9, True, 0), (1.1, True, 1), (1.1, False, 0)])
def test_a_missed_gate_and_nothing_else_fails_the_command(
    ratio: float, gated: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = fixed_row(ratio, gated=gated)
    monkeypatch.setattr(core, "chosen_rows", lambda quick, pattern: [row])
    path = tmp_path / "core.json"

    assert core.main(["--json", str(path), "--quick"]) == code

    result: dict[str, Any] = json.loads(path.read_text())
    (written,) = result["rows"]
    assert written["ok"] == (ratio <= 1.0)
    assert {"regime", "n", "e", "k", "d", "dtype", "threads", "mode", "backend", "expert", "ratio", "gate"} <= set(
        written
    )


def test_rows_that_do_not_apply_say_why() -> None:
    row = Row("bf16", Size(1, 1, 1), "fwd+bwd", "auto", "none", 1.0, None, note="n/a: no bfloat16 unit")
    row.run(5)

    assert row.ok is None
    assert row.as_json()["note"].startswith("n/a")
    assert row.as_json()["ratio"] is None
    assert core.summary([row.as_json()])["gates"] == "0 of 0"


def test_an_unknown_row_is_an_error() -> None:
    with pytest.raises(SystemExit):
        core.main(["--rows", "no such row"])


def test_the_other_ways_that_are_tried_compute_the_same() -> None:
    size = Size(24, 4, 2, 8)
    ours, padded = moe_step(size, "swiglu", "fwd+bwd", "loop"), padded_step(size, "swiglu", "fwd+bwd")

    torch.testing.assert_close(padded(), ours(), rtol=1e-4, atol=1e-5)
    products_step(size, "swiglu", "fwd+bwd")()


@pytest.mark.parametrize("kind", [NORMALISED, FIELDS])
def test_layers_of_the_systems_run_beside_their_roof(kind: str) -> None:
    size = Size(24, 4, 1, 3, 5)
    for mode in MODES:
        moe_step(size, kind, mode, "auto")()
        dense_step(size, kind, mode)()


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_stored_bytes_are_exact_and_within_their_gates(kind: str) -> None:
    for backend in BACKENDS:
        row = saved_row(Regime("R", Size(256, 4, 2, 32), {}, 1.0), kind, backend)
        row.run(1)
        assert row.ratio is not None
        if row.gated:
            assert row.ok
    again = row.ratio
    row.run(1)
    assert row.ratio == again


def complete_report() -> dict[str, Any]:
    rows = []
    for row in all_rows():
        row.take([0.5 * (row.gate or 1.0)])
        rows.append(row.as_json())
    return {"machine": {"cpu": "any"}, "command": "make bench", "rows": json.loads(json.dumps(rows))}


def test_a_complete_result_has_every_row_its_gates_and_tries_for_each_miss() -> None:
    report = complete_report()
    assert core.complaints(report) == []
    assert core.summary(report["rows"])["gates"].split()[0] == core.summary(report["rows"])["gates"].split()[2]

    missing = {**report, "rows": report["rows"][1:]}
    assert core.complaints(missing) == [f"row is missing: {report['rows'][0]['name']}"]
    loosened = json.loads(json.dumps(report))
    loosened["rows"][0]["gate"] = 9.0
    assert "gate is not that of the list" in core.complaints(loosened)[0]
    missed = json.loads(json.dumps(report))
    missed["rows"][0].update(ratio=9.0, ok=False)
    assert "missed without 3 tries" in core.complaints(missed)[0]
    missed["rows"][0].update(tried=[{"way": w, "ratio": 9.0} for w in "abc"], reason="the products alone take longer")
    assert core.complaints(missed) == []
    assert core.complaints({**report, "machine": {}}) == ["machine is missing"]


def test_a_missed_row_lists_what_else_was_tried_and_what_stands_in_the_way() -> None:
    size = Size(16, 4, 2, 8)
    row = Row("R", size, "fwd+bwd", "auto", "reglu", 0.0, against_dense(size, "reglu", "fwd+bwd"), gated=True)
    row.run(1)
    core.explain(row, 1)

    assert [entry["way"] for entry in row.tried] == ["segments", "grouped_mm", "loop", "padded"]
    assert "products of 8 rows alone" in row.reason


def test_the_committed_results_are_complete_and_the_page_shows_them(tmp_path: Path) -> None:
    report = json.loads(core.RESULTS.read_text(encoding="utf-8"))
    shares = json.loads(core_figure.SHARES.read_text(encoding="utf-8"))
    assert core.complaints(report) == []
    assert report["summary"] == core.summary(report["rows"])
    assert set(shares["systems"]) == set(system_share.systems())
    page = tmp_path / "core.md"
    page.write_text(core_figure.PAGE.read_text())
    core_figure.write_page(report, shares, page)
    assert page.read_text() == core_figure.PAGE.read_text()


def test_the_page_and_the_figure_are_made_from_a_result(tmp_path: Path) -> None:
    report = complete_report()
    report["machine"] = core.machine()
    report["summary"] = core.summary(report["rows"])
    page = tmp_path / "core.md"
    page.write_text("a\n<!-- core:begin -->\nold\n<!-- core:end -->\nb\n")

    row = {"step_ms": 12.3, "moe_calls": 2, "moe_share": 0.25}
    shares = {"command": "any", "systems": {"a": {**row, "over_before": 0.987}, "b": row}}

    core_figure.write_page(report, shares, page)
    core_figure.draw(report, tmp_path / "core.png")

    text = page.read_text()
    assert text.startswith("a\n")
    assert text.endswith("<!-- core:end -->\nb\n")
    assert "| R=16 | 64, 8, 2 | 2.60 | 1.30 | 1.30 | 1.30 | 1.30 |" in text
    assert "| a | 12 | 2 | 25% | 0.99 |\n| b | 12 | 2 | 25% | not compared |" in text
    assert (tmp_path / "core.png").stat().st_size > 1000
