# SPDX-License-Identifier: Apache-2.0
"""The encoder against one that is written out, and the tables behind it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from tasks.recommendation.nets.embeddings import FeatureEncoder, HashTable, PlainTable, TableFactory
from tests.tasks.recommendation.rec_common import FACTS, make_batch


def naive(encoder: FeatureEncoder, batch: Any) -> Tensor:
    """Row by row, entry by entry."""
    table, rows = encoder.table, []
    assert table is not None
    weight = table.table.weight
    for k in range(len(batch)):
        parts = [batch.dense[k]]
        for j, name in enumerate(encoder.fields):
            parts.append(weight[table.rows(encoder.place[name], batch.ids[k, j])])
        for name in encoder.bags:
            ids, factor = (part[k] for part in batch.bags[name])
            filled = [i for i in range(len(ids)) if ids[i] != 0]
            total = torch.zeros(encoder.dim, dtype=weight.dtype)
            for i in filled:
                total = total + factor[i] * weight[table.rows(encoder.place[name], ids[i])]
            parts.append(total / max(1, len(filled)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", [PlainTable, HashTable])
def test_output_is_that_of_a_loop(kind: Any, sparse: bool) -> None:
    options = {"num_rows": 17} if kind is HashTable else {}
    encoder = FeatureEncoder(
        FACTS, dim=4, normalise=False, table=lambda sizes, dim: kind(sizes, dim, sparse=sparse, **options)
    )
    batch = make_batch(20)
    batch.bags["bag"] = (batch.bags["bag"][0], torch.randn(20, 4))

    out = encoder(batch)

    assert out.shape == (20, encoder.out_dim) == (20, 3 + 4 * 3)
    torch.testing.assert_close(out, naive(encoder, batch), atol=1e-6, rtol=1e-6)


def test_sparse_and_dense_gradients_are_the_same_numbers() -> None:
    grads = []
    for sparse in (False, True):
        torch.manual_seed(0)
        encoder = FeatureEncoder(FACTS, table=lambda sizes, dim, s=sparse: PlainTable(sizes, dim, sparse=s))
        encoder(make_batch(9)).square().sum().backward()
        assert encoder.table is not None
        grad = encoder.table.table.weight.grad
        assert grad is not None
        assert grad.is_sparse == sparse
        grads.append(grad.to_dense())

    torch.testing.assert_close(grads[0], grads[1])


def test_unknown_ids_begin_at_zero_and_padding_has_no_gradient() -> None:
    encoder = FeatureEncoder({**FACTS, "fields": {}, "dense_dim": 0})
    batch = make_batch(4)
    batch.bags["bag"] = (torch.tensor([[0, 0, 0, 0]] * 4), torch.ones(4, 4))

    out = encoder(batch)
    out.sum().backward()

    assert encoder.table is not None
    assert not out.any()
    assert not encoder.table.table.weight.grad.any()  # type: ignore[union-attr]
    assert not FeatureEncoder(FACTS).table.table.weight[[0, 5, 12]].any()  # type: ignore[union-attr]


def test_shared_bag_reads_the_rows_of_its_field() -> None:
    facts = {"dense_dim": 0, "fields": {"item": 9}, "bags": {"bag": 9}}
    batch = dataclasses.replace(make_batch(5), ids=torch.full((5, 1), 4))
    batch.bags["bag"] = (torch.tensor([[4, 0, 0, 0]] * 5), torch.ones(5, 4))

    item, bag = FeatureEncoder(facts, shared={"bag": "item"})(batch).split(8, dim=1)
    own_item, own_bag = FeatureEncoder(facts)(batch).split(8, dim=1)

    assert torch.equal(item, bag)
    assert not torch.equal(own_item, own_bag)


def test_normalised_numbers_have_mean_0_and_variance_1_and_keep_running_values_for_later() -> None:
    encoder = FeatureEncoder({"dense_dim": 3, "fields": {}, "bags": {}})
    batch = dataclasses.replace(make_batch(500), dense=torch.randn(500, 3) * 50 + 7)
    for _ in range(100):
        out = encoder(batch)

    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0), torch.ones(3), atol=1e-2, rtol=0)
    encoder.eval()
    torch.testing.assert_close(encoder(batch), out, atol=0.01, rtol=0.01)
    assert torch.equal(encoder(batch.take(torch.tensor([3]))), encoder(batch)[3:4])


def test_hash_spreads_ids_evenly_apart_by_field_and_seed_and_takes_any_id() -> None:
    ids = torch.arange(1, 50_001)
    table = HashTable([2, 2], 1, num_rows=11)
    counts = table.rows(0, ids).bincount(minlength=11)

    assert counts[0] == 0
    assert (counts[1:] - 5000).abs().max() < 400
    assert table.rows(0, torch.tensor([0, 2**62])).tolist()[0] == 0
    agree = (table.rows(0, ids) == table.rows(1, ids)).float().mean()
    other = (table.rows(0, ids) == HashTable([2, 2], 1, num_rows=11, seed=1).rows(0, ids)).float().mean()
    assert abs(float(agree) - 0.1) < 0.01
    assert abs(float(other) - 0.1) < 0.01


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ids": torch.full((6, 2), 6)}, r"field 'a' holds id 6, its table has rows for 0 to 4; raise"),
        ({"bags": {"bag": (torch.full((6, 4), 9), torch.ones(6, 4))}}, "field 'bag' holds id 9"),
        ({"ids": torch.full((6, 2), -2)}, "field 'a' holds id -2"),
    ],
)
def test_ids_beyond_their_table_are_told(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FeatureEncoder(FACTS)(dataclasses.replace(make_batch(), **change))


def test_a_training_batch_of_one_is_told() -> None:
    encoder = FeatureEncoder(FACTS)
    with pytest.raises(ValueError, match="batch of one row"):
        encoder(make_batch(1))
    encoder.eval()
    assert encoder(make_batch(1)).shape == (1, encoder.out_dim)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: FeatureEncoder({"dense_dim": 1}), r"facts lacks \['bags', 'fields'\]"),
        (lambda: FeatureEncoder({"dense_dim": 0, "fields": {}, "bags": {}}), "the data has no feature"),
        (lambda: FeatureEncoder(FACTS, shared={"bag": "a"}), "bag has cardinality 9, a 5; they must be equal"),
        (lambda: FeatureEncoder(FACTS, shared={"a": "b"}), "shared: a -> b is not possible"),
        (lambda: PlainTable([3], 0), "dim=0"),
        (lambda: HashTable([3], 4, num_rows=1), "num_rows=1"),
    ],
)
def test_wrong_settings_are_told(build: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()


def test_tables_are_chosen_in_yaml_by_class_path() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--table", type=TableFactory)
    value = {
        "class_path": "tasks.recommendation.nets.embeddings.HashTable",
        "init_args": {"num_rows": 5, "sparse": True},
    }

    made = parser.instantiate(parser.parse_object({"table": value})).table([3, 4], 2)

    assert isinstance(made, HashTable)
    assert made.table.weight.shape == (5, 2)
    assert made.table.sparse
