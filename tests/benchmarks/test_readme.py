# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md: what they say of seeds and of compute follows from the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme

HEADER = {"versions": {"torch": "2"}, "fit_seconds": 60.0, "main_metric": "miou"}
ROLES = {"a": "seen", "b": "seen", "v": "validation", "u": "unseen"}


def run(values: tuple[float, ...], seed: int = 0) -> dict[str, Any]:
    numbers = dict(zip(ROLES, (*values, 0.5, 0.4), strict=True))
    return {"header": {**HEADER, "seed": seed}, "metric": "miou", "roles": ROLES, "values": numbers}


def report(**seeds: tuple[tuple[float, ...], tuple[float, ...]]) -> dict[str, Any]:
    first, second = run((0.8, 0.7)), run((0.7, 0.7))
    found: dict[str, Any] = {"command": "make demo", "runs": {"point_moe": first, "dense": second}}
    if seeds:
        pairs = {name[1:]: pair for name, pair in seeds.items()}
        found["seeds"] = {
            seed: {"point_moe": run(moe, int(seed)), "dense": run(dense, int(seed))}
            for seed, (moe, dense) in pairs.items()
        }
    return found


def folder(path: Path, values: tuple[float, ...], seed: int) -> Path:
    numbers = dict(zip(ROLES, (*values, 0.5, 0.4), strict=True))
    rows = [
        {"domain": d, "role": r, "metric": "miou", "value": numbers[d], "n": 1, "direction": "max"}
        for d, r in ROLES.items()
    ]
    (path / "metrics").mkdir(parents=True)
    (path / "metrics" / "test.json").write_text(json.dumps({"header": {**HEADER, "seed": seed}, "rows": rows}))
    return path


def test_one_seed_has_a_table_and_no_line_of_seeds() -> None:
    text = readme.table(report())

    assert "| **mean seen** | | **0.750** | **0.700** |" in text
    assert "full trainings" not in text
    assert "One seed decides nothing." in text


def test_a_domain_without_a_score_is_left_out_of_both_means() -> None:
    found = report()
    found["runs"]["dense"]["values"]["a"] = None

    text = readme.table(found)

    assert "| a | seen | 0.800 | - |" in text
    assert "mean seen" not in text  # one domain is left, which is its own mean
    assert readme.seen_mean(found["runs"]["dense"]) == 0.7


def test_further_seeds_stand_below_the_table_with_the_means_of_both_models() -> None:
    text = readme.table(report(s1=((0.7, 0.7), (0.8, 0.76))))

    line = next(line for line in text.splitlines() if "full trainings" in line)
    assert "0.750 against 0.700 (seed 0), 0.700 against 0.780 (seed 1)" in line
    # Models: (0.05 - 0.08) / 2; seeds of one model: 0.05 and 0.08.
    assert "differ by −0.015 on average" in line
    assert "by up to 0.080: the seeds differ by more than the models." in line
    assert text.index("**mean seen**") < text.index("full trainings")
    assert "| **mean seen** | | **0.750** | **0.700** |" in text


def test_seeds_that_agree_are_said_to_agree() -> None:
    line = readme.full_trainings(report(s1=((0.8, 0.71), (0.7, 0.7)), s2=((0.8, 0.7), (0.7, 0.7))))

    assert line.endswith("the seeds differ by less than the models.")


def test_runs_of_another_seed_are_added_and_those_of_seed_0_replace_the_table(tmp_path: Path) -> None:
    zero = folder(tmp_path / "a", (0.9, 0.9), 0), folder(tmp_path / "b", (0.8, 0.8), 0)
    two = folder(tmp_path / "c", (0.1, 0.2), 2), folder(tmp_path / "d", (0.3, 0.4), 2)

    found = readme.collect(*zero, readme.collect(*two, report(s10=((0.7, 0.7), (0.8, 0.8)))))

    assert list(found["seeds"]) == ["2", "10"]
    assert found["seeds"]["2"]["dense"]["values"]["a"] == 0.3
    assert readme.seen_mean(found["runs"]["point_moe"]) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="two runs of one seed"):
        readme.collect(zero[0], two[1], found)
    with pytest.raises(ValueError, match="collect that one first"):
        readme.collect(*two)


def test_a_row_of_verdicts_says_what_the_comparison_cost() -> None:
    claim = {"train_flops_ratio": 3.9996, "flops_ratio": 1.0}

    assert readme.compute(claim) == "4.00"
    assert readme.compute({"flops_ratio": 1.2314}) == "1.23 a row"
    assert readme.compute({"flops_ratio": None}) == "not counted"
    assert readme.compute({"train_flops_ratio": 26691.2}) == "over 100"
    table, below = readme.verdicts().split("\n\n")
    legend = " ".join(below.split())
    header, _, *rows = table.splitlines()
    titles = [cell.strip() for cell in header.split("|")[1:-1]]
    assert titles == ["system", "claim", "difference", "compute", "runs", "holds"]
    assert len(rows) == len(readme.CLAIMS)
    shown = {row.split("|")[3].split("/")[1].split()[0] for row in rows}
    assert {name for name in shown if f"`{name}`: " in legend} == shown  # no score without its meaning


def test_a_row_of_verdicts_says_on_how_many_runs_it_rests_and_what_correction_leaves() -> None:
    assert readme.runs({"seeds": [[1, 1], [2, 2]]}) == "2"
    assert readme.runs({"seeds": [[1, 1], [2, 2], [3, 1]], "clusters": 2}) == "3 (2)"
    assert readme.holds({"verdict": "supported", "p_holm": 0.01}) == "**yes**"
    assert readme.holds({"verdict": "supported", "p_holm": 0.06}) == "yes, alone"
    assert readme.holds({"verdict": "not supported", "p_holm": 0.06}) == "no, alone"
    assert readme.holds({"verdict": "inconclusive", "p_holm": 0.9}) == "open"
    assert (
        readme.holds({"verdict": "supported", "p_holm": None}) == "**yes**"
    )  # exact: of these runs, no statement more
    assert "no longer when it is corrected for all claims of that system" in " ".join(
        (readme.ROOT / "README.md").read_text(encoding="utf-8").split()
    )


def test_the_closing_lines_of_the_demo_name_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert "full trainings" in readme.known_of_seeds(report(s1=((0.7, 0.7), (0.8, 0.8))))
    assert readme.main(["--seeds"]) == 0

    out = capsys.readouterr().out
    assert "seeds of a shorter training the difference to the dense twin is" in out
    assert readme.main(["--what"]) == 2
