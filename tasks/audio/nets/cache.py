# SPDX-License-Identifier: Apache-2.0
"""What attention keeps of earlier rows, so that generation computes each row once.

Shape legend: B clips, G key-value heads, M room for rows, R rows so far, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer.

    Args:
        num_clips: B.
        num_heads: G.
        room: M; more rows than that are refused.
        head_dim: d.
        like: a tensor of the dtype and device to use.
    """

    def __init__(self, num_clips: int, num_heads: int, room: int, head_dim: int, like: Tensor) -> None:
        shape = (num_clips, num_heads, room, head_dim)
        self._key, self._value = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.length = 0

    def extend(self, key_BGRd: Tensor, value_BGRd: Tensor) -> tuple[Tensor, Tensor]:
        """Keep further rows and return all so far.

        Raises:
            ValueError: there is no room.
        """
        end = self.length + key_BGRd.shape[2]
        if end > self._key.shape[2]:
            raise ValueError(f"the cache has room for {self._key.shape[2]} rows, not for {end}; make a larger one")
        self._key[:, :, self.length : end] = key_BGRd
        self._value[:, :, self.length : end] = value_BGRd
        self.length = end
        return self._key[:, :, :end], self._value[:, :, :end]


class Cache:
    """Keys and values of all layers, and which rows are padding.

    Args:
        layers: one for each block.
        real_BR: bool, False for padding among the rows so far, to which no later row attends.
    """

    def __init__(self, layers: list[LayerCache], real_BR: Tensor) -> None:
        self.layers, self.real_BR = layers, real_BR

    @property
    def length(self) -> int:
        """R, rows so far."""
        return self.real_BR.shape[1]

    def extend(self, real_BR: Tensor) -> None:
        """Note which of some further rows are padding; the layers keep their own."""
        self.real_BR = torch.cat([self.real_BR, real_BR], dim=1)
