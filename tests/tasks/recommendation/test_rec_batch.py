# SPDX-License-Identifier: Apache-2.0
"""Columns of impressions: gather, join, move, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from tasks.recommendation.data.batch import Interactions, Schema
from tests.tasks.recommendation.rec_common import make_batch

SCHEMA = Schema(("x", "y"), ("c", "c"), 3, {"a": 5, "b": 7}, {"bag": 9})


def assert_equal(one: Interactions, other: Interactions) -> None:
    for field in dataclasses.fields(Interactions):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            assert all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))
        else:
            assert (a is None and b is None) or torch.equal(a, b), field.name


def test_taking_rows_and_joining_them_gives_the_table() -> None:
    table = make_batch(11)

    pieces = [table.take(torch.tensor([3, 0])), table.take(torch.tensor([7])), table.take(torch.tensor([9, 9]))]

    assert_equal(Interactions.cat(pieces), table.take(torch.tensor([3, 0, 7, 9, 9])))
    assert len(table) == 11


def test_bags_of_different_lengths_are_padded() -> None:
    long, short = make_batch(3), make_batch(2, seed=1)
    short.bags["bag"] = tuple(part[:, :2] for part in short.bags["bag"])  # type: ignore[assignment]

    ids, weight = Interactions.cat([long, short]).bags["bag"]

    assert ids.shape == weight.shape == (5, 4)
    assert not ids[3:, 2:].any()
    assert not weight[3:, 2:].any()


def test_lightning_moves_every_column() -> None:
    moved = move_data_to_device(make_batch(), torch.device("meta"))

    assert moved.dense.device.type == moved.bags["bag"][1].device.type == moved.row.device.type == "meta"
    assert moved.oracle is None


def test_parts_of_different_sources_are_refused() -> None:
    known = dataclasses.replace(make_batch(), oracle=torch.rand(6, 2))
    with pytest.raises(ValueError, match="do not fit together"):
        Interactions.cat([make_batch(), known])
    with pytest.raises(ValueError, match="nothing to join"):
        Interactions.cat([])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ids": torch.full((6, 2), 5)}, r"field 'a' holds id 5, allowed are 0 to 4"),
        ({"ids": torch.full((6, 2), -1)}, r"field 'a' holds id -1"),
        ({"bags": {"bag": (torch.full((6, 4), 9), torch.ones(6, 4))}}, r"bag 'bag' holds id 9"),
        ({"bags": {}}, r"bags \[\], expected \['bag'\]"),
        ({"dense": torch.tensor([[0.0, 1.0, torch.nan]] * 6)}, "dense feature 2 of row 0 is not finite"),
        ({"dense": torch.zeros(6, 4)}, r"dense has shape \(6, 4\), expected \(6, 3\)"),
        ({"label": torch.full((6, 2), 0.5)}, "labels must be 0 or 1"),
    ],
)
def test_what_does_not_fit_the_schema_is_named(change: dict[str, Any], text: str) -> None:
    SCHEMA.check(make_batch(), "log")
    with pytest.raises(ValueError, match=text):
        SCHEMA.check(dataclasses.replace(make_batch(), **change), "log")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tasks": ()}, "no task"),
        ({"tasks": ("x", "x")}, "names must differ"),
        ({"tasks": ("x", "y/z")}, "letters, digits and _"),
        ({"categories": ("c",)}, "1 categories for 2 tasks"),
        ({"fields": {"a": 1}}, "'a' has cardinality 1"),
    ],
)
def test_wrong_schemas_are_told(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(SCHEMA, **options)
