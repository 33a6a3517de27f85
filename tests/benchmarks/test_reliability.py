# SPDX-License-Identifier: Apache-2.0
"""docs/reliability.md promises what tests hold and figures show; chains of faults are drawn and compared as told."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.reliability.__main__ import RECORDS, RESULTS, Results, collect_fuzz, read
from benchmarks.reliability.faults import EPOCH, EPOCHS, Case, Fault, cases, compare, stages_of
from benchmarks.reliability.memory import BOUND_MIB, BOUND_TENSORS, growth
from benchmarks.reliability.page import measured, write_page
from benchmarks.reliability.witness import Strike, digest

PAGE = Path("docs/reliability.md")
READMES = [Path("README.md"), *sorted(Path("tasks").glob("*/README.md"))]
# Words that promise something about faults, strangers' files or errors: a README may use one that the page has.
PROMISES = (
    *("resum", "goes on after an interruption", "goes on where", "bit-equal", "to the bit", "crash", "is lost"),
    *("half-written", "whole or not at all", "damaged", "malicious", "untrusted", "trusted", "pickle", "sandbox"),
    *("traceback", "one sentence", "clear error", "exit code", "out of memory", "memory leak"),
)


def test_the_section_is_computed_from_the_committed_results(tmp_path: Path) -> None:
    copy = tmp_path / "reliability.md"
    shutil.copy(PAGE, copy)

    write_page(read(RESULTS), copy)

    assert copy.read_text() == PAGE.read_text()


def test_every_test_that_the_page_names_is_there() -> None:
    text = PAGE.read_text()
    files = {str(path): path.read_text() for path in Path("tests").rglob("*.py")}
    known = {name for held in files.values() for name in re.findall(r"^ *def (test_\w+)\(", held, flags=re.MULTILINE)}
    named = set(re.findall(r"\b(test_\w+)\b(?!\.py)", text))
    paths = set(re.findall(r"tests/[\w/]+\.py", text))

    assert "test_a_chain_of_killed_and_interrupted_processes_takes_every_step_to_the_bit" in named
    assert sorted(named - known) == []
    assert sorted(paths - set(files)) == []
    # A name beside its file, as pytest writes it, is in that file.
    pairs = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", text)
    assert [pair for pair in pairs if f"def {pair[1]}(" not in files[pair[0]]] == []


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_a_readme_promises_nothing_that_the_page_lacks(readme: Path) -> None:
    said, page = (" ".join(path.read_text().lower().split()) for path in (readme, PAGE))

    assert [word for word in PROMISES if word in said and word not in page] == []


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
        return {"500": {"rss_mib": 100.0, "tensors": 40}, "2000": {"rss_mib": rss, "tensors": tensors}}

    # 1,500 steps: a page of 4 KiB each are 5.86 MiB; one tensor in ten steps are 150.
    assert (round(BOUND_MIB, 2), BOUND_TENSORS) == (5.86, 150)
    assert growth(marks(105.8, 189)) == {"grown_mib": 5.8, "grown_tensors": 149, "within": True}
    assert not growth(marks(105.9, 40))["within"]
    assert not growth(marks(100.0, 190))["within"]


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
