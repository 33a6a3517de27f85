# SPDX-License-Identifier: Apache-2.0
"""Seeded hashes of ids: the same value gives the same number on every machine, in every process and file format."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_UINT = np.uint64


def hash_integers(values: NDArray[Any], seed: int = 0) -> NDArray[np.uint64]:
    """Mix the bits of integers (splitmix64, Steele, Lea and Flood 2014): uint64, as shaped as ``values``."""
    x = values.astype(np.int64).view(_UINT) + _UINT((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % (1 << 64))
    x = (x ^ (x >> _UINT(30))) * _UINT(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _UINT(27))) * _UINT(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> _UINT(31)))


def hash_values(values: NDArray[Any], seed: int = 0) -> NDArray[np.uint64]:
    """Hash integers, or text: text that spells an integer hashes as that integer, so CSV and Parquet agree.

    Args:
        values: integers, or an object array of str.
        seed: another seed gives other collisions.

    Returns:
        uint64, as shaped as ``values``.
    """
    if values.dtype.kind in "iub":
        return hash_integers(values, seed)
    unique, inverse = np.unique(values.astype(str), return_inverse=True)
    number = np.zeros(len(unique), np.int64)
    spelled = np.array([bool(_INTEGER.fullmatch(word)) for word in unique], bool)
    number[spelled] = [int(word) for word in unique[spelled]]
    hashed = hash_integers(number, seed)
    key = seed.to_bytes(8, "little", signed=True)
    for k in np.flatnonzero(~spelled):
        digest = hashlib.blake2b(str(unique[k]).encode(), digest_size=8, key=key).digest()
        hashed[k] = int.from_bytes(digest, "little")
    return np.asarray(hashed[inverse].reshape(values.shape))


def to_ids(hashed: NDArray[np.uint64], cardinality: int) -> NDArray[np.int64]:
    """Map hashes to ids 1 .. cardinality - 1 (0 stays free for unknown)."""
    return np.asarray(1 + (hashed % _UINT(cardinality - 1)), np.int64)
