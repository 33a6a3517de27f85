# SPDX-License-Identifier: Apache-2.0
"""The core benchmark: what it gates, what it writes, and that its measures measure; no clock is trusted here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import core
from benchmarks.core_cases import (
    EXPERT_KINDS,
    DenseNetwork,
    Size,
    dense_step,
    make_bank,
    make_routing,
    moe_step,
    paired_ratios,
)


def test_rows_have_unique_names_and_auto_is_gated_from_128_rows_per_expert() -> None:
    rows = [*core.regime_rows(quick=False), *core.special_rows()]

    assert len({row.name for row in rows}) == len(rows)
    regimes = [row for row in rows if row.regime.startswith("R=")]
    for row in regimes:
        assert row.gated == (row.backend == "auto" and row.size.rows_per_expert >= 128)
    gated = {(row.regime, row.mode, row.expert) for row in regimes if row.gated}
    assert gated == {(r, m, k) for r in ("R=1024", "R=128") for m in core.MODES for k in EXPERT_KINDS}


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_the_roof_has_the_flops_of_the_chosen_experts(kind: str) -> None:
    size = Size(16, 4, 2, 8)
    experts = make_bank(size, kind)
    network = DenseNetwork(kind, size.d, size.k * 4 * size.d)

    weights = sum(layer.weight.numel() for layer in (network.first, network.second))
    assert 2 * weights == size.k * experts.flops_per_row
    for mode in core.MODES:
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


def fixed_row(ratio: float, *, gated: bool) -> core.Row:
    return core.Row("R", Size(1, 1, 1), "forward", "auto", "none", 1.0, lambda _: [ratio], gated=gated)


@pytest.mark.parametrize(("ratio", "gated", "code"), [(0.9, True, 0), (1.1, True, 1), (1.1, False, 0)])
def test_a_missed_gate_and_nothing_else_fails_the_command(
    ratio: float, gated: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = fixed_row(ratio, gated=gated)
    monkeypatch.setattr(core, "regime_rows", lambda quick: iter([row]))
    monkeypatch.setattr(core, "special_rows", lambda: iter(()))
    path = tmp_path / "core.json"

    assert core.main(["--json", str(path), "--quick"]) == code

    result: dict[str, Any] = json.loads(path.read_text())
    (written,) = result["rows"]
    assert written["ok"] == (ratio <= 1.0)
    assert {"regime", "n", "e", "k", "d", "dtype", "threads", "mode", "backend", "expert", "ratio", "gate"} <= set(
        written
    )


def test_rows_that_do_not_apply_say_why() -> None:
    row = core.Row("bf16", Size(1, 1, 1), "fwd+bwd", "auto", "none", 1.0, None, note="n/a: no bfloat16 unit")
    row.run(5)

    assert row.ok is None
    assert row.as_json()["note"].startswith("n/a")


def test_an_unknown_row_is_an_error() -> None:
    with pytest.raises(SystemExit):
        core.main(["--rows", "no such row"])


def test_stored_bytes_row_is_exact() -> None:
    (row,) = (row for row in core.special_rows() if row.regime == "saved bytes")
    row.run(1)

    assert row.ratio is not None
    assert 0.45 < row.ratio < 0.5
