# SPDX-License-Identifier: Apache-2.0
"""Small lists for tests."""

from __future__ import annotations

from typing import Any

import torch

from tasks.recommendation.data.lists import Lists
from tasks.recommendation.data.taste_types import TasteTypes


def small_tastes(**options: Any) -> TasteTypes:
    """A log of some hundred lists."""
    sizes = {"num_items": 240, "train_lists": 300, "val_lists": 120, "test_lists": 200}
    return TasteTypes(**{**sizes, **options})


def make_lists(rows: int = 6, past: int = 4, num: int = 3, seed: int = 0) -> Lists:
    """Random lists: items of two fields (9 and 5 ids), a request of one, no profile; the first has no history."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(past) < torch.randint(1, past + 1, (rows, 1), generator=g)
    mask[0] = False
    ids = torch.randint(1, 5, (rows, past + num, 2), generator=g)
    item = torch.stack([torch.randperm(20, generator=g)[: past + num] for _ in range(rows)])
    label = torch.zeros(rows, num)
    label[torch.arange(rows), torch.randint(0, num, (rows,), generator=g)] = 1
    return Lists(
        history=ids[:, :past] * mask.unsqueeze(2),
        history_mask=mask,
        history_item=item[:, :past].where(mask, -1),
        candidates=ids[:, past:],
        candidate_mask=torch.ones(rows, num, dtype=torch.bool),
        candidate_item=item[:, past:],
        label=label,
        query=torch.randint(0, 4, (rows, 1), generator=g),
        profile=torch.zeros(rows, 0, dtype=torch.int64),
        user=torch.randint(0, 3, (rows,), generator=g),
        row=torch.arange(rows),
        factor=torch.randint(-1, 2, (rows,), generator=g),
    )
