# SPDX-License-Identifier: Apache-2.0
"""Taste types: Bayes' rule by enumeration, rules as written down, and a ceiling that no ranking exceeds."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.recommendation.data.lists import Lists, truncated
from tasks.recommendation.data.taste_types import STYLES, TasteTypes, default_mixes, type_weights
from tasks.recommendation.datamodule import ListData
from tasks.recommendation.report.list_metrics import expected_list_auc, list_auc
from tests.tasks.recommendation.list_common import small_tastes
from tests.tasks.recommendation.test_lists import same


def lists(source: TasteTypes, cache: Path, domain: str = "even", split: Any = "test") -> Lists:
    return source.dataset(domain, split, cache).table


def test_posterior_is_bayes_rule_one_history_at_a_time(tmp_path: Path) -> None:
    source = small_tastes(reveal=0.5)
    table = lists(source, tmp_path, "mostly_0")
    found = source.posterior(table.history_item.numpy(), "mostly_0")

    for b in range(0, 60):
        joint = list(source.mixes["mostly_0"])
        for item in table.history_item[b][table.history_mask[b]].tolist():
            style = int(source.item_ids[item, 2]) - 1
            for k in range(4):
                joint[k] *= 0.5 / 3 * (style // STYLES == k) + 0.5 / 12
        np.testing.assert_allclose(found[b], np.array(joint) / sum(joint), atol=1e-12)


def test_oracle_is_the_choice_averaged_over_the_posterior(tmp_path: Path) -> None:
    source = small_tastes(strength=2.0, affinity=0.3)
    table = lists(source, tmp_path)
    posterior = source.posterior(table.history_item.numpy(), "even")

    for b in range(0, 40):
        wanted = np.zeros(5)
        for k in range(4):
            utility = []
            for item in table.candidate_item[b].tolist():
                own = (int(source.item_ids[item, 2]) - 1) // 3 == k
                love = (own - 0.25) / math.sqrt(0.25 * 0.75)
                rule = source.rules[k, int(table.profile[b, 0]) - 1, item]
                utility.append(2.0 * (math.sqrt(0.7) * rule + math.sqrt(0.3) * love))
            wanted += posterior[b, k] * np.exp(utility) / np.exp(utility).sum()
        np.testing.assert_allclose(table.oracle[b], wanted, atol=1e-6)  # type: ignore[index]


def test_histories_have_the_styles_and_labels_the_rates_that_the_truth_says(tmp_path: Path) -> None:
    source = small_tastes(test_lists=20_000, reveal=0.6)
    table = lists(source, tmp_path)
    assert table.oracle is not None

    style = torch.from_numpy(source.item_ids[table.history_item.clamp(min=0).numpy(), 2] - 1)
    own = (style // STYLES == table.factor.unsqueeze(1))[table.history_mask].double().mean()
    assert float(own) == pytest.approx(0.6 + 0.4 / 4, abs=0.01)
    for low in (0.0, 0.2, 0.5, 0.8):  # calibrated: of candidates with probability p, p are taken
        inside = (table.oracle >= low) & (table.oracle < low + 0.2)
        assert float(table.label[inside].mean()) == pytest.approx(float(table.oracle[inside].mean()), abs=0.015)


@pytest.mark.parametrize("conflict", [0.0, 0.3, 0.75, 1.0])
def test_rules_of_two_types_correlate_as_the_conflict_says(conflict: float) -> None:
    weights = type_weights(4, conflict)

    wanted = np.full((4, 4), 1 - conflict * 4 / 3)
    np.fill_diagonal(wanted, 1)
    np.testing.assert_allclose(weights @ weights.T, wanted, atol=1e-12)
    np.testing.assert_allclose(type_weights(4, 0.75), np.eye(4), atol=1e-12)
    rules = small_tastes(conflict=conflict, num_items=6000).rules
    np.testing.assert_allclose(np.corrcoef(rules.reshape(4, -1)), wanted, atol=0.06)


def test_crossed_effects_have_no_mean_over_groups() -> None:
    alone, joint = small_tastes(crossing=0.0).rules, small_tastes(crossing=1.0).rules

    assert np.ptp(alone, axis=1).max() < 1e-12
    np.testing.assert_allclose(joint.mean(1), 0, atol=1e-12)


def test_no_ranking_beats_the_oracle_and_who_knows_the_type_beats_it(tmp_path: Path) -> None:
    source = small_tastes(test_lists=4000)
    table = lists(source, tmp_path)
    assert table.oracle is not None
    ceiling = expected_list_auc(table.oracle, table.oracle, table.candidate_mask)

    choice = torch.from_numpy(source.choice(table.profile[:, 0].numpy() - 1, table.candidate_item.numpy()))
    noise = table.oracle + 0.1 * torch.rand(4000, 5, generator=torch.Generator().manual_seed(0))
    for score in (noise, choice.mean(0), -table.oracle, table.label):
        each = expected_list_auc(score, table.oracle, table.candidate_mask)
        assert (each <= ceiling + 1e-9).all()
    known = choice[table.factor, torch.arange(4000)]
    auc = {name: float(list_auc(score, table.label, table.candidate_mask).mean()) for name, score in
           (("known", known), ("oracle", table.oracle), ("mean", choice.mean(0)))}  # fmt: skip
    assert auc["known"] > auc["oracle"] > auc["mean"] > 0.6
    assert auc["oracle"] == pytest.approx(float(ceiling.mean()), abs=0.015)


def test_conflict_takes_from_who_does_not_know_the_type(tmp_path: Path) -> None:
    blind = {}
    for conflict in (0.0, 0.5, 1.0):
        source = small_tastes(conflict=conflict, affinity=0.0, test_lists=2000)
        table = lists(source, tmp_path)
        choice = source.choice(table.profile[:, 0].numpy() - 1, table.candidate_item.numpy())
        score = torch.from_numpy(source.rules.mean(0)[table.profile[:, :1].numpy() - 1, table.candidate_item.numpy()])
        blind[conflict] = float(list_auc(score.round(decimals=9), table.label, table.candidate_mask).mean())
        if conflict == 0:
            np.testing.assert_allclose(choice, np.broadcast_to(choice[0], choice.shape), atol=1e-12)
            torch.testing.assert_close(table.oracle, torch.from_numpy(choice[0]).float())
    assert blind[0.0] > blind[0.5] + 0.05 > blind[1.0] + 0.1
    assert blind[1.0] == 0.5  # the mean rule is zero: all candidates tie


def test_lists_are_lists_of_their_kind(tmp_path: Path) -> None:
    source = small_tastes(tail_share=0.3, cold_share=0.1, test_lists=4000)
    table = lists(source, tmp_path)
    source.schema.check(table, "even")
    length = table.history_mask.sum(1)

    users = Counter(table.user.tolist())
    assert set(users.values()) == {4}
    assert set(length.tolist()) == {0, 1, 2, *range(6, 21)}
    assert float((length == 0).double().mean()) == pytest.approx(0.1, abs=0.03)
    assert float(((length > 0) & (length < 3)).double().mean()) == pytest.approx(0.3, abs=0.05)
    assert (table.label.sum(1) == 1).all()
    assert (table.candidates[..., 1] == table.query).all()  # all of the request's category
    assert all(len(set(items)) == 5 for items in table.candidate_item.tolist())
    assert table.factor.bincount(minlength=4).double().div(4000).tolist() == pytest.approx([0.25] * 4, abs=0.05)
    assert (truncated(table, 0).history == 0).all()
    places = table.label.argmax(1).bincount(minlength=5) / 4000
    assert places.tolist() == pytest.approx([0.2] * 5, abs=0.03)


def test_users_of_two_domains_or_splits_are_others_and_a_seed_gives_one_log(tmp_path: Path) -> None:
    source = small_tastes()
    parts = [lists(source, tmp_path, d, s) for d, s in (("mostly_0", "train"), ("mostly_0", "test"), ("even", "test"))]

    users = [set(part.user.tolist()) for part in parts]
    assert not users[0] & users[1]
    assert not users[1] & users[2]
    assert same(parts[2], lists(small_tastes(), tmp_path / "again"))
    assert not torch.equal(parts[2].label, lists(small_tastes(data_seed=1), tmp_path).label)
    files = sorted((tmp_path / "recommendation").iterdir())
    lists(source, tmp_path)
    assert sorted((tmp_path / "recommendation").iterdir()) == files


def test_every_role_gets_the_splits_it_may_touch(tmp_path: Path) -> None:
    data = ListData(source=small_tastes(), cache_dir=tmp_path)
    data.prepare_data()

    names = [path.stem.rsplit("-", 1)[0] for path in (tmp_path / "recommendation").glob("*.npz")]
    assert {name for name in names if name.endswith("-train")} == {f"tastes-mostly_{k}-train" for k in range(3)}
    assert "tastes-halves-val" in names
    assert "tastes-even-test" in names
    assert "tastes-even-val" not in names


def test_mixes_are_shares_and_other_numbers_of_types_work(tmp_path: Path) -> None:
    for tastes in (2, 3, 7):
        mixes = default_mixes(tastes)
        assert all(math.isclose(sum(mix), 1) and len(mix) == tastes for mix in mixes.values())
        source = small_tastes(tastes=tastes, num_items=400)
        table = lists(source, tmp_path)
        source.schema.check(table, "even")
        assert set(table.factor.tolist()) == set(range(tastes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conflict": 1.5}, r"conflict=1.5 must lie in \[0, 1\]"),
        ({"tail_share": 0.8, "cold_share": 0.3}, r"tail_share \+ cold_share=1.1"),
        ({"tastes": 1}, "tastes=1"),
        ({"candidates": 0}, "candidates=0"),
        ({"history": 3}, "history=3 is too short"),
        ({"num_items": 60}, "without 5 candidates outside a history"),
        ({"mixes": {"a": [1.0, 0.0]}}, "domain 'a' has mix"),
    ],
)
def test_wrong_settings_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TasteTypes(**options)


def test_an_unknown_domain_is_told() -> None:
    with pytest.raises(ValueError, match="has no domain 'odd'; allowed: mostly_0"):
        ListData(source=small_tastes(), seen=["odd"])
