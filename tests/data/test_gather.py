# SPDX-License-Identifier: Apache-2.0
"""A batch fetched at once is the batch fetched row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from moeapps.data.gather import BatchDataset, GatherConcat


class Column(BatchDataset):
    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.calls = 0

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return self.values[rows]

    def join(self, parts: list[Any], order: Tensor) -> Tensor:
        return torch.cat(parts)[order]


def parts() -> list[Column]:
    return [Column(torch.arange(5)), Column(torch.arange(100, 101)), Column(torch.arange(200, 240))]


def test_rows_come_in_the_order_they_were_asked_in_and_each_part_is_asked_once() -> None:
    columns, rows = parts(), torch.randint(46, (60,)).tolist()

    batch = GatherConcat(columns).__getitems__(rows)

    everything = torch.cat([column.values for column in columns])
    assert torch.equal(batch, everything[rows])
    assert [column.calls for column in columns] == [1, 1, 1]


def test_single_rows_agree_with_batches() -> None:
    joined = GatherConcat(parts())

    assert [int(joined[i]) for i in range(46)] == joined.__getitems__(range(46)).tolist()


def test_other_data_sets_give_the_items_torch_would_give() -> None:
    plain = [TensorDataset(torch.arange(4)), TensorDataset(torch.arange(9, 12))]
    batches = [[6, 0, 3], [2, 2]]

    ours = DataLoader(GatherConcat(plain), batch_sampler=batches)
    torchs = DataLoader(ConcatDataset(plain), batch_sampler=batches)

    assert [b[0].tolist() for b in ours] == [b[0].tolist() for b in torchs]


def test_one_ordinary_part_makes_all_come_item_by_item() -> None:
    mixed = GatherConcat([Column(torch.arange(3)), TensorDataset(torch.arange(3))])

    assert len(mixed.__getitems__([0, 4, 5])) == 3


def test_loader_hands_the_batch_over_whole() -> None:
    columns = parts()
    loader = DataLoader(GatherConcat(columns), batch_sampler=[[0, 5, 6], [1, 45]], collate_fn=lambda batch: batch)

    assert [batch.tolist() for batch in loader] == [[0, 100, 200], [1, 239]]


@pytest.mark.parametrize("row", [-1, 46])
def test_row_outside_is_told(row: int) -> None:
    with pytest.raises(IndexError, match="of 46"):
        GatherConcat(parts()).__getitems__([0, row])
    with pytest.raises(IndexError, match="of 5"):
        parts()[0][row]
