# SPDX-License-Identifier: Apache-2.0
"""Sentences on experts: hand-made tables whose meaning is known, and numbers counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moeapps.moe.metrics import load_cv, mutual_information
from moeapps.reporting.knowledge import LIMITS, ExpertTable, Limits, describe_layer, information, reachable

FOUR = ("north", "east", "south", "west")


def table(work, factor="domain", labels=FOUR, **options):
    return ExpertTable("net.layer", factor, labels, work, **options)


def test_uniform_routing_is_even():
    found = describe_layer([table([[100.0] * 4] * 4)])
    assert found.kinds == ("even",)
    assert found.factor == ""
    assert found.sentence.startswith("even: its 4 experts share the work alike")
    assert found.numbers["told_domain"] == 0.0
    assert found.load == (1.0, 1.0, 1.0, 1.0)


def test_one_expert_per_domain_is_specialised_by_domain():
    found = describe_layer([table((100 * np.eye(4)).tolist())])
    assert found.kinds == ("specialised",)
    assert found.factor == "domain"
    assert "specialised by domain: the expert tells 100 % of it" in found.sentence
    assert "expert 0 takes 100 % of north" in found.sentence
    assert "the load is even" in found.sentence


def test_an_expert_without_rows_is_dead():
    found = describe_layer([table([[50.0, 50.0, 0.0]] * 4)])
    assert "dead" in found.kinds
    assert found.numbers["dead"] == 1.0
    assert "1 of 3 experts is dead (2)" in found.sentence


def test_an_expert_with_few_rows_is_idle_and_not_dead():
    found = describe_layer([table([[100.0, 100.0, 4.0]] * 4)])
    assert found.load[2] == pytest.approx(3 * 4 / 204)
    assert "idle" in found.kinds
    assert "dead" not in found.kinds
    assert "1 of 3 experts is almost idle (2)" in found.sentence


def test_one_expert_that_takes_all_is_a_collapse_and_no_specialisation():
    found = describe_layer([table([[0.0, 9.0, 0.0], [0.0, 90.0, 0.0]], labels=("a", "b"))])
    assert found.kinds == ("collapsed", "dead")
    assert found.sentence == "collapsed: expert 1 does all the work, the other 2 are dead."


def test_the_factor_that_is_told_best_is_named():
    domain = table([[100.0, 100.0], [100.0, 100.0]], labels=("a", "b"))
    colour = table([[180.0, 20.0], [20.0, 180.0]], factor="colour", labels=("red", "blue"))
    found = describe_layer([domain, colour])
    assert found.factor == "colour"
    # By hand: 1 - H(0.9, 0.1) / log 2 = 1 - 0.46900 = 0.53100
    assert found.numbers["told_colour"] == pytest.approx(0.5310044064)
    assert "specialised by colour: the expert tells 53 % of it" in found.sentence
    assert "expert 0 takes 90 % of red, expert 1 takes 90 % of blue" in found.sentence


def test_a_weak_tie_is_a_leaning():
    found = describe_layer([table([[700.0, 300.0], [300.0, 700.0]], labels=("a", "b"))])
    # 1 - H(0.7, 0.3) / log 2 = 0.1187: between the limits.
    assert LIMITS.leaning < found.numbers["told_domain"] < LIMITS.specialised
    assert found.kinds == ("leaning",)
    assert found.sentence.startswith("leans by domain: the expert tells 12 % of it")


def test_uneven_work_that_follows_nothing_is_called_uneven():
    found = describe_layer([table([[700.0, 200.0, 100.0]] * 4)])
    assert found.kinds == ("uneven",)
    assert "expert 0 takes 70 % of the work" in found.sentence


def test_what_chance_tells_in_few_rows_is_no_specialisation():
    rng = np.random.default_rng(0)
    work = rng.multinomial(60, [1 / 120] * 120).reshape(30, 4).astype(float)  # 60 rows, 30 classes, drawn blindly
    classes = [str(k) for k in range(30)]
    assert information(work) > 0.1  # looks like much
    found = describe_layer([table(work.tolist(), labels=classes)])
    assert found.factor == ""


def test_next_to_no_rows_say_nothing():
    found = describe_layer([table([[3.0, 0.0], [0.0, 3.0]], labels=("a", "b"))])
    assert found.kinds == ("unknown",)
    assert "6 rows" in found.sentence


def test_few_experts_are_held_against_what_they_can_tell():
    # Two experts, sixteen classes, eight classes each: log 2 of log 16 is all that two experts can tell.
    work = np.zeros((16, 2))
    work[:8, 0] = work[8:, 1] = 50.0
    assert information(work) == pytest.approx(0.25)
    assert reachable(work) == pytest.approx(0.25)
    found = describe_layer([table(work.tolist(), factor="class", labels=[f"c{k}" for k in range(16)])])
    assert found.kinds == ("specialised",)
    assert "the expert tells 25 % of it, of at most 25 % that 2 experts can tell" in found.sentence


def test_shares_are_told_with_the_most_that_one_expert_can_take():
    pair = [[50.0, 50.0, 0.0], [0.0, 50.0, 50.0]]
    of_two = describe_layer([table(pair, labels=["north", "south"], per_row=2)]).sentence
    assert "expert 0 takes 50 % of north, expert 2 takes 50 % of south; 50 % is the most, as 2 experts work" in of_two
    uneven = describe_layer([table([[90.0, 60.0, 30.0]] * 4, per_row=2)]).sentence
    assert "expert 0 takes 50 % of the work (50 % is the most, as 2 experts work on each row)" in uneven
    for several in (None, 1):
        assert "the most" not in describe_layer([table(pair, labels=["north", "south"], per_row=several)]).sentence


def test_a_score_of_its_own_decides_where_weights_are_soft():
    soft = table([[30.0, 28.0], [28.0, 30.0]], factor="taste", labels=("a", "b"), score=("adjusted Rand index", 0.9))
    found = describe_layer([table([[30.0, 28.0], [28.0, 30.0]], labels=("a", "b")), soft], limits=Limits(noise=0.0))
    assert found.factor == "taste"
    assert "adjusted Rand index 0.90" in found.sentence


def test_what_a_mask_tells_is_no_specialisation():
    # Two gates that see two experts each weigh these evenly: all is told, nothing was learned.
    masked = table([[50.0, 50.0, 0.0, 0.0], [0.0, 0.0, 50.0, 50.0]], factor="gate", labels=("a", "b"), given=1.0)
    found = describe_layer([masked])
    assert found.numbers["told_gate"] == pytest.approx(1.0)
    assert found.kinds == ("even",)
    assert "(at most 0 % of gate told by the expert beyond what its gate may see)" in found.sentence
    half = table([[90.0, 10.0], [10.0, 90.0]], factor="gate", labels=("a", "b"), given=0.25)
    # (0.5310 - 0.25) / (1 - 0.25)
    assert half.strength() == pytest.approx(0.3746725)
    assert "the expert tells 53 % of it, 25 % by what its gate may see" in describe_layer([half]).sentence


def test_the_story_of_a_task_stands_in_place_of_nothing_known_and_beside_what_is_followed():
    even = [[50.0, 50.0], [50.0, 50.0]]
    told = {"labels": ("a", "b"), "story": "gates like both"}
    assert describe_layer([table(even, **told)]).sentence == "gates like both; the expert tells 0 % of the domain."
    always = describe_layer([table(even, **told, always=True)])
    assert always.kinds == ("always",)
    assert always.sentence == "all 2 experts work on every row; gates like both; the expert tells 0 % of the domain."
    followed = describe_layer([table([[90.0, 10.0], [10.0, 90.0]], **told)])
    assert followed.kinds == ("specialised",)
    assert followed.sentence.startswith("specialised by domain: the expert tells 53 % of it")
    assert "; gates like both; " in followed.sentence
    collapsed = describe_layer([table([[90.0, 0.0], [90.0, 0.0]], **told)])
    assert "gates" not in collapsed.sentence


def test_experts_named_by_one_table_are_named_in_the_load():
    first = table([[70.0, 20.0, 10.0]] * 4)
    named = table([[1.0, 1.0, 1.0]] * 2, factor="gate", labels=("x", "y"), experts=("shared", "click", "like"))
    assert "expert shared takes 70 % of the work" in describe_layer([first, named]).sentence


def test_names_of_experts_and_numbers_of_files_are_used():
    named = table([[80.0, 20.0], [20.0, 80.0]], labels=("a", "b"), experts=("click", "watch"), told=0.5)
    found = describe_layer([named], entropy=0.7)
    assert found.numbers["told_domain"] == 0.5
    assert found.numbers["entropy"] == 0.7
    assert "expert click takes 80 % of a" in found.sentence


@pytest.mark.parametrize("seed", range(5))
def test_numbers_are_those_of_the_core(seed):
    generator = torch.Generator().manual_seed(seed)
    work_SE = torch.randint(0, 50, (5, 6), generator=generator).double()
    work_SE[1] = 0.0
    found = describe_layer([table(work_SE.tolist(), labels=list("abcde"))])
    expected = mutual_information(work_SE, torch.arange(5))
    assert found.numbers["told_domain"] == pytest.approx(float(expected), abs=1e-12)
    assert found.numbers["load_cv"] == pytest.approx(float(load_cv(work_SE.sum(0))), abs=1e-12)


@pytest.mark.parametrize(
    ("work", "labels"),
    [
        ([[1.0, -1.0]], ("a",)),
        ([[1.0, math.nan]], ("a",)),
        ([], ()),
        ([[1.0, 2.0]], ("a", "b")),
    ],
)
def test_tables_that_are_none_are_refused(work, labels):
    with pytest.raises(ValueError, match=r"net\.layer by domain"):
        table(work, labels=labels)
