# SPDX-License-Identifier: Apache-2.0
"""Who won where: hand-made results whose winner, gap and spread are known."""

from __future__ import annotations

import math

import pytest

from moeapps.evaluation.results import RunResults
from moeapps.evaluation.xeval import build_matrix
from moeapps.reporting.verdict import in_short, number, sentences, standings

ROLES = {"a": "seen", "b": "seen", "c": "unseen"}


def run(path, name, seed, values, direction="max"):
    header = {"system": "toy", "name": name, "seed": seed, "main_metric": "score", "variant_hash": name}
    header["seeds"] = {"seed_everything": seed}
    scores = {"score": dict(zip(ROLES, values, strict=True))}
    return RunResults(path / f"{name}-{seed}", header, ROLES, scores, dict.fromkeys(ROLES, 5), {"score": direction})


def test_one_variant_is_told_with_its_gap(tmp_path):
    matrix = build_matrix([run(tmp_path, "one", 0, (0.8, 0.6, 0.5))])
    assert sentences(matrix) == [
        "score (larger is better): 0.7 on seen domains, 0.5 on unseen domains. "
        "Unseen domains are worse than seen ones by 0.2."
    ]
    assert in_short(matrix) == "Unseen domains are worse than seen ones by 0.2."


def test_smaller_is_better_where_the_metric_says_so(tmp_path):
    matrix = build_matrix([run(tmp_path, n, 0, (v, v, v), "min") for n, v in (("one", 3.0), ("two", 2.0))])
    assert standings(matrix)[0].variants[0][0] == "toy/two"
    single = build_matrix([run(tmp_path, "one", 0, (3.0, 3.0, 2.0), "min")])
    assert in_short(single) == "Unseen domains are better than seen ones by 1."


def test_one_seed_never_decides(tmp_path):
    matrix = build_matrix([run(tmp_path, n, 0, (v, v, v)) for n, v in (("one", 0.1), ("two", 0.9))])
    assert (
        sentences(matrix)[0]
        == "On seen domains toy/two is best: score 0.9 against 0.1 of toy/one (one seed decides nothing)."
    )


@pytest.mark.parametrize(
    ("second", "words"),
    [((0.1, 0.11), "beyond the spread over seeds"), ((0.6, 0.95), "within the spread over seeds")],
)
def test_seeds_tell_luck_from_skill(tmp_path, second, words):
    runs = [run(tmp_path, "good", seed, (v, v, v)) for seed, v in enumerate((0.9, 0.91))]
    runs += [run(tmp_path, "other", seed, (v, v, v)) for seed, v in enumerate(second)]
    told = sentences(build_matrix(runs))[0]
    assert told.startswith("On seen domains toy/good is best: score 0.905 against")
    assert told.endswith(f"({words}).")


def test_a_tie_is_called_one(tmp_path):
    matrix = build_matrix([run(tmp_path, n, 0, (0.5, 0.5, 0.5)) for n in ("one", "two")])
    assert "(a tie)" in sentences(matrix)[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (1234.0, "1234"),
        (123456.0, "123,456"),
        (1.5e12, "1.5e+12"),
        (0.0, "0"),
        (math.nan, "-"),
        (2.5e-5, "2.5e-05"),
        (-0.25, "-0.25"),
    ],
)
def test_numbers_are_shown_short(value, text):
    assert number(value) == text
