# SPDX-License-Identifier: Apache-2.0
"""Splits of labelled images, class by class."""

from __future__ import annotations

import torch
from torch import Tensor

from moeapps.data.domain import Split


def split_rows(label: Tensor, parts: dict[Split, float], seed: int) -> dict[Split, Tensor]:
    """Split rows class by class.

    Args:
        label: int64 [N].
        parts: share of each class that goes into every split but ``train``, which gets the rest.
        seed: seed of the choice; the same rows for the same labels and seed.

    Returns:
        split -> sorted int64 rows. A class of which there is little gives ``train`` first.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[Split, list[Tensor]] = {"train": [], "val": [], "test": []}
    for value in label.unique().tolist():
        rows = torch.nonzero(label == value).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        start = 0
        for split, share in parts.items():
            count = min(round(share * len(rows)), len(rows) - 1 - start)
            chosen[split].append(rows[start : start + max(count, 0)])
            start += max(count, 0)
        chosen["train"].append(rows[start:])
    none = torch.empty(0, dtype=torch.int64)
    return {split: torch.cat([none, *rows]).sort().values for split, rows in chosen.items()}
