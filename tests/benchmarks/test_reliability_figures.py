# SPDX-License-Identifier: Apache-2.0
"""Figures of docs/reliability.md are those of its results; chains of faults are drawn and compared as told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.reliability.__main__ import RECORDS, RESULTS, Results, collect_fuzz, read
from benchmarks.reliability.faults import EPOCH, EPOCHS, Case, Fault, cases, compare, stages_of
from benchmarks.reliability.memory import BOUND_MIB, BOUND_TENSORS, growth
from benchmarks.reliability.page import measured, write_page
from benchmarks.reliability.witness import Strike, digest

PAGE = Path("docs/reliability.md")


def test_the_section_is_computed_from_the_committed_results(tmp_path: Path) -> None:
    copy = tmp_path / "reliability.md"
    shutil.copy(PAGE, copy)

    write_page(read(RESULTS), copy)

    assert copy.read_text() == PAGE.read_text()


def test_every_base_config_and_every_curriculum_is_struck() -> None:
    found = cases()

    bases = {path.stem for path in Path("configs").glob("*.yaml")}
    assert {case.system for case in found.values() if case.command == "fit"} == bases
    staged = {path for system in bases for path in stages_of(system)}
    assert staged == set(Path("configs/stages").glob("*.yaml"))
    assert [path.stem for path in stages_of("meta_dmoe")] == [
        f"meta_dmoe_{stage}" for stage in ("student", "experts", "aggregator", "meta")
    ]
    assert [path.stem[-1] for path in stages_of("unimoe_audio")] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("case", cases().values(), ids=cases())
def test_faults_are_drawn_where_the_page_says(case: Case) -> None:
    drawn = [case.strikes(seed) for seed in range(20)]

    assert len({str(strikes) for strikes in drawn}) > 5
    for strikes in drawn:
        inside = [strike for strike in strikes if strike.moment == "step"]
        assert all(strike.step % EPOCH and strike.step < EPOCHS * EPOCH for strike in inside)
        assert [Strike.of(str(strike)) for strike in strikes] == strikes
        killed = [strike for strike in inside if strike.signal == "SIGKILL"]
        if case.command == "curriculum":
            assert [strike.run for strike in killed] == list(case.runs)
        else:
            assert len(killed) == 3
            assert sorted(strike.signal for strike in strikes if strike not in killed) == [
                "SIGINT",
                "SIGKILL",
                "SIGTERM",
            ]
            assert [strike.step for strike in strikes] == sorted(strike.step for strike in strikes)


def line(step: int, state: str = "a", what: str = "step") -> dict[str, object]:
    return {"run": "base", "what": what, "step": step, "state": state}


def test_lines_that_differ_and_lines_that_never_came_are_named() -> None:
    whole = [line(1), line(2), line(2, what="validation"), line(3)]

    fine = compare([], whole, [line(1), line(2), line(2), line(2, what="validation"), line(3)])
    wrong = compare([], whole, [line(1), line(2, "b"), line(2), line(4)])

    assert (fine.compared, fine.differing, fine.missing) == (5, [], [])
    assert (wrong.differing, wrong.missing) == (["base step 2", "base step 4"], ["base step 3", "base validation 2"])


def test_digest_sees_every_bit_and_every_name() -> None:
    import torch

    one = {"a": torch.zeros(3), "b": [1, 2.0]}
    assert digest(one) == digest({"a": torch.zeros(3), "b": [1, 2.0]})
    for other in (
        {"a": torch.tensor([0.0, 0.0, 1e-45]), "b": [1, 2.0]},
        {"a": torch.tensor([0.0, 0.0, -0.0]), "b": [1, 2.0]},
        {"c": torch.zeros(3), "b": [1, 2.0]},
        {"a": torch.zeros(3), "b": [1, 2.0000000000000004]},
        {"a": torch.zeros(3, 1), "b": [1, 2.0]},
        {"a": torch.zeros(3, dtype=torch.int32), "b": [1, 2.0]},
    ):
        assert digest(other) != digest(one)


def test_growth_is_judged_by_both_bounds() -> None:
    def marks(rss: float, tensors: int) -> dict[str, dict[str, float]]:
        before = {"rss_mib": 90.0, "tensors": 10}  # the first validation, at step 500, leaves the state of its metrics
        return {
            "500": before,
            "1000": {"rss_mib": 100.0, "tensors": 40},
            "2000": {"rss_mib": rss, "tensors": tensors},
        }

    # 1,000 steps: a page of 4 KiB each are 3.91 MiB; one tensor in ten steps are 100.
    assert (round(BOUND_MIB, 2), BOUND_TENSORS) == (3.91, 100)
    assert growth(marks(103.9, 139)) == {"grown_mib": 3.9, "grown_tensors": 99, "within": True}
    assert not growth(marks(104.0, 40))["within"]
    assert not growth(marks(100.0, 140))["within"]


def test_results_go_on_where_they_stopped_and_the_page_counts_them(tmp_path: Path) -> None:
    file, records = tmp_path / "results.json", tmp_path / "records"
    fault = Fault("SIGKILL", "step", "struck", 6, -9, 4)
    chain = compare([fault], [line(1)], [line(1)])
    results = Results(file)
    results.add("faults", "home 0", chain.as_dict)
    results.add("faults", "home 1", chain.as_dict)
    records.mkdir()
    record = {"reader": "csv", "test": "t", "cases": 7, "read": 3, "refused": 3, "losses": [{"kind": "hang"}]}
    (records / "csv.json").write_text(json.dumps(record))
    collect_fuzz(Results(file), records)

    again = Results(file)
    again.add("faults", "home 0", lambda: pytest.fail("it is known"))
    text = " ".join(measured(read(file)).split())
    assert "2 faults (2 SIGKILL, 0 SIGINT, 0 SIGTERM) in 2 chains" in text
    assert "2 steps and scores compared, none not equal to the bit" in text
    assert "| home | 2 | 2 | 0 | 0 | 2 | 0 | 2 |" in text
    assert "| csv | 7 | 3 | 3 | 1 |" in text
    assert "Losses: 1." in text
    assert text.count("Not measured yet.") == 2
    assert str(RECORDS) == "runs/fuzz"  # where tests/fuzzing.py writes
