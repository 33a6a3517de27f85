# SPDX-License-Identifier: Apache-2.0
"""Numbers that are handed over as raw inputs: taken for what they are, or told; never cast to something else."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_EXACT = 2.0**53
"""Whole numbers up to here are themselves as floats."""


def real_numbers(values: Any, what: str) -> NDArray[Any]:
    """Return an array of real numbers as it was given; nan and infinity may be among them.

    Args:
        values: an array or a tensor on the CPU, or lists of one length.
        what: begins the error.

    Raises:
        ValueError: words, truth values, complex numbers, objects, or lists of several lengths.
    """
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # uneven lists; a tensor of another device or with gradients
        raise ValueError(f"{what} is no array of numbers ({str(error)[:120]}); give one") from error
    if found.dtype.kind not in "iuf":
        raise ValueError(f"{what} is of type {found.dtype}; give real numbers")
    return found


def whole_numbers(values: Any, what: str) -> NDArray[np.int64]:
    """Return whole numbers as int64; floats are taken where they are whole, as tables write ids beside missing ones.

    Args:
        values: an array or a tensor on the CPU, or lists of one length.
        what: begins the error.

    Raises:
        ValueError: no real numbers, a fraction, nan, infinity, or a number beyond int64 (floats: beyond 2^53).
    """
    found = real_numbers(values, what)
    wrong = np.zeros(found.shape, bool)
    if found.dtype.kind == "f":
        wide = found.astype(np.float64)
        wrong = ~((wide == np.rint(wide)) & (np.abs(wide) <= _EXACT))  # nan equals nothing
    elif found.dtype == np.uint64:
        wrong = found > np.uint64(np.iinfo(np.int64).max)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        shown = place[0] if len(place) == 1 else place
        raise ValueError(f"{what} holds {found[place]} at {shown}; give whole numbers, 0 for unknown ones")
    return found.astype(np.int64)
