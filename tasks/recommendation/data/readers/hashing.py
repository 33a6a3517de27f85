# SPDX-License-Identifier: Apache-2.0
"""Seeded hashes of integers and of text, the same on every machine and in every process, without a Python loop."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_UINT = np.uint64
_KEPT = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)  # masks of the first bytes of a word


def hash_integers(values: NDArray[Any], seed: int = 0) -> NDArray[np.uint64]:
    """Mix the bits of integers (splitmix64, Steele, Lea and Flood 2014): uint64, as shaped as ``values``."""
    start = _UINT((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % (1 << 64))
    x = np.asarray(values.astype(np.int64, copy=False).view(_UINT) + start)
    shifted = np.empty_like(x)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x ^= np.right_shift(x, _UINT(shift), out=shifted)
        if factor > 1:
            x *= _UINT(factor)
    return x


def hash_bytes(offsets: NDArray[np.int64], data: NDArray[np.uint8], seed: int = 0) -> NDArray[np.uint64]:
    """Hash words: their length, then eight bytes at a time, is mixed in by `hash_integers`.

    Args:
        offsets: int64 [n + 1], where each word begins in ``data``; the last is its end.
        data: the words' bytes.
        seed: another seed gives other collisions.

    Returns:
        uint64 [n].
    """
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    eight = np.ndarray((len(data) + 1,), "<u8", padded, strides=(1,))  # the eight bytes from each place on
    start, length = offsets[:-1], np.diff(offsets)
    hashed = hash_integers(~length, seed)
    for first in range(0, int(length.max(initial=0)), 8):
        rows = np.flatnonzero(length > first)
        piece = eight[start[rows] + first] & _KEPT[np.minimum(length[rows] - first, 8)]
        hashed[rows] = hash_integers((hashed[rows] ^ piece).view(np.int64), seed)
    return hashed


def to_ids(hashed: NDArray[np.uint64], cardinality: int) -> NDArray[np.int64]:
    """Map hashes to ids 1 .. cardinality - 1 (0 stays free for unknown)."""
    divisor = _UINT(cardinality - 1)
    # NumPy divides by a constant with multiplications, but has no such remainder.
    ids = hashed // divisor
    ids *= divisor
    np.subtract(hashed, ids, out=ids)
    ids += _UINT(1)
    return ids.view(np.int64)
