# SPDX-License-Identifier: Apache-2.0
"""Count the votes of tiles: probabilities summed over views and fragments at every raw point.

R raw points of all tiles, N voxels of one ballot, C classes. How a tile is seen is in ``data/voting.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch

from moeapps.moe import MoERecorder
from tasks.point_cloud.data.voting import TileVotes

Answers = dict[str, tuple[Tensor, Tensor]]


def tally(
    answer: Callable[[Batch], Answers], tiles: Sequence[TileVotes], num_classes: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Sum softmax probabilities over all votes.

    Routing is recorded apart and dropped, so that reports on experts count every voxel once.

    Args:
        answer: as `PointCloudTask.forward`, for each domain its voxels and their logits.
        tiles: what to vote on.
        num_classes: C, at least the largest label set.
        device: where the network is.

    Returns:
        Sums float64 [R, C] and numbers of votes int64 [R], on the CPU, tile after tile. Sums in float64 do not depend
        on the order of the votes beyond the last digits, and never tie where the logits of a single vote do not.
    """
    starts = np.cumsum([0, *(tile.num_points for tile in tiles)])
    sums_RC = torch.zeros(int(starts[-1]), num_classes, dtype=torch.float64)
    votes_R = torch.zeros(int(starts[-1]), dtype=torch.int64)
    for ballots in zip_longest(*(tile.ballots() for tile in tiles)):
        cast = [(int(start), *ballot) for start, ballot in zip(starts, ballots, strict=False) if ballot is not None]
        batch = Batch.from_data_list([data for _, data, _ in cast])
        prob_NC = torch.zeros(batch.num_nodes, num_classes, dtype=torch.float64)
        with MoERecorder():
            for rows, logits in answer(batch.to(device)).values():
                prob_NC[rows.cpu(), : logits.shape[1]] = logits.cpu().double().softmax(dim=1)
        for (start, _, part), first in zip(cast, batch.ptr.tolist(), strict=False):
            points = start + torch.from_numpy(part.voted)  # each at most once per fragment
            sums_RC[points] += prob_NC[first + torch.from_numpy(part.voter)]
            votes_R[points] += 1
    return sums_RC, votes_R
