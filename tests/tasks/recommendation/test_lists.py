# SPDX-License-Identifier: Apache-2.0
"""Batches of lists: joined, taken, cut, checked; and the data module that gives them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from moeapps.data.gather import TableDataset
from tasks.recommendation.data.lists import Lists, ListSchema, truncated
from tasks.recommendation.datamodule import ListData
from tests.tasks.recommendation.list_common import make_lists, small_tastes
from tests.tasks.recommendation.rec_common import small_log

SCHEMA = ListSchema({"item": 9, "kind": 5}, {"category": 4}, {}, history=4, candidates=3)


def same(one: Lists, other: Lists) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)]
    return all(b is None if a is None else torch.equal(a, b) for a, b in pairs)


def test_joined_parts_are_taken_apart_again() -> None:
    one, two = make_lists(4), make_lists(5, seed=1)
    joined = Lists.cat([one, two])

    assert len(joined) == 9
    assert same(joined.take(torch.arange(4)), one)
    assert same(joined.take(torch.arange(4, 9)), two)
    with pytest.raises(ValueError, match="with and without an oracle"):
        Lists.cat([one, replace(two, oracle=two.label)])
    with pytest.raises(ValueError, match="at least one part"):
        Lists.cat([])


@pytest.mark.parametrize("keep", [0, 1, 3, 9])
def test_a_cut_history_holds_the_latest_items_and_nothing_else_changes(keep: int) -> None:
    lists = make_lists(20)
    cut = truncated(lists, keep)

    for b in range(20):
        real = [h for h in range(4) if lists.history_mask[b, h]][:keep]
        assert cut.history_mask[b].nonzero().flatten().tolist() == real
        assert cut.history_item[b].tolist() == [int(lists.history_item[b, h]) if h in real else -1 for h in range(4)]
        for h in range(4):
            assert cut.history[b, h].tolist() == (lists.history[b, h].tolist() if h in real else [0, 0])
    for name in ("candidates", "label", "user", "row"):
        assert getattr(cut, name) is getattr(lists, name)
    with pytest.raises(ValueError, match="keep=-1"):
        truncated(lists, -1)


def test_a_history_with_a_gap_is_cut_by_its_real_items() -> None:
    lists = make_lists(1)
    lists.history_mask[0] = torch.tensor([False, True, False, True])

    assert truncated(lists, 1).history_mask[0].tolist() == [False, True, False, False]


def test_lists_that_are_no_lists_are_told() -> None:
    lists = make_lists()
    SCHEMA.check(lists, "batch")

    wrong = replace(lists, candidate_item=lists.candidate_item.clone())
    wrong.candidate_item[3, 1] = wrong.history_item[3, 0]
    with pytest.raises(ValueError, match="batch: list 3 has a candidate that lies in its own history"):
        SCHEMA.check(wrong, "batch")
    with pytest.raises(ValueError, match="candidates field 'kind' holds id 7, allowed are 0 to 4"):
        SCHEMA.check(replace(lists, candidates=lists.candidates * 0 + 7), "batch")
    with pytest.raises(ValueError, match="labels must be 0 or 1, and 0 at padding"):
        SCHEMA.check(replace(lists, candidate_mask=lists.label == 0), "batch")
    none = lists.candidate_mask.clone()
    none[2] = False
    with pytest.raises(ValueError, match="list 2 has no candidate"):
        SCHEMA.check(replace(lists, candidate_mask=none, label=lists.label * none), "batch")
    twice = replace(lists, candidate_item=lists.candidate_item.clone())
    twice.candidate_item[4, 2] = twice.candidate_item[4, 0]
    with pytest.raises(ValueError, match="batch: list 4 has the same candidate twice; drop one of the two"):
        SCHEMA.check(twice, "batch")
    named = replace(SCHEMA, factors=("a",))
    with pytest.raises(ValueError, match="batch: list 1 has a factor that is neither -1 nor one of 1"):
        named.check(replace(lists, factor=torch.arange(6)), "batch")
    named.check(replace(lists, factor=torch.tensor([0, -1, 0, 0, -1, 0])), "batch")
    with pytest.raises(ValueError, match=r"oracle has shape \(6, 2\), expected \(6, 3\)"):
        SCHEMA.check(replace(lists, oracle=lists.label[:, :2]), "batch")
    with pytest.raises(ValueError, match=r"user has shape \(5,\), expected \(6,\)"):
        SCHEMA.check(replace(lists, user=lists.user[:5]), "batch")
    with pytest.raises(ValueError, match=r"history has shape \(6, 3, 2\), expected \(6, 4, 2\)"):
        SCHEMA.check(replace(lists, history=lists.history[:, :3]), "batch")


def test_lists_without_a_positive_or_with_one_candidate_are_lists() -> None:
    lists = make_lists()
    one = torch.tensor([True, False, False]).expand(6, 3)
    SCHEMA.check(replace(lists, label=torch.zeros(6, 3), candidate_mask=one), "batch")


def test_sizes_that_cannot_be_are_told() -> None:
    with pytest.raises(ValueError, match="item_fields is empty"):
        ListSchema({}, {}, {}, history=4, candidates=3)
    with pytest.raises(ValueError, match="field 'item' has cardinality 1"):
        ListSchema({"item": 1}, {}, {}, history=4, candidates=3)
    with pytest.raises(ValueError, match="candidates=0"):
        ListSchema({"item": 2}, {}, {}, history=4, candidates=0)


def test_loaders_give_whole_batches_in_the_order_of_the_sampler(tmp_path: Path) -> None:
    data = ListData(source=small_tastes(), batch_size=64, cache_dir=tmp_path, mixing="balanced")
    loader = data.train_dataloader()
    everything = Lists.cat([data.get_dataset(name, "train").table for name in data.roles["seen"]])  # type: ignore[attr-defined]

    for batch, rows in zip(loader, list(data._sampler or []), strict=True):
        assert same(batch, everything.take(torch.tensor(rows)))
    assert same(data.example_batch(3), everything.take(torch.arange(3)))
    assert data.facts["item_fields"]["item"] == 241
    for name, test in zip(data.eval_domains("test"), data.test_dataloader(), strict=True):
        assert torch.cat([batch.row for batch in test]).tolist() == list(range(200)), name


def test_a_source_whose_candidate_lies_in_its_own_history_is_told_by_domain_and_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ListData(source=small_tastes(), cache_dir=tmp_path)
    table = data.get_dataset(data.roles["unseen"][0], "test").table  # type: ignore[attr-defined]
    table.candidate_item[7, 1] = table.history_item[7, 0]
    monkeypatch.setattr(data.source, "dataset", lambda *_: TableDataset(table))

    with pytest.raises(ValueError, match=r", test: list 7 has a candidate that lies in its own history"):
        data.dataset(data.roles["unseen"][0], "test")


def test_a_log_of_impressions_is_refused() -> None:
    with pytest.raises(ValueError, match="MultitaskLog gives impressions"):
        ListData(source=small_log())
