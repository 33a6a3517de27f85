# SPDX-License-Identifier: Apache-2.0
"""Scores from the part of each test unit, so that an interval over units belongs to the very score of the table.

A score is a mean of ratios of sums: mean over groups g of sum_u n_ug / sum_u d_ug, over the groups that occur
(sum_u p_ug > 0). Groups are classes for the mean IoU (n intersection, d union, p targets); a plain mean over units is
the case of one group with d = p = 1. Units are whole (a scan, not its tiles): U units, G groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def plain_parts(values: Any) -> Floats:
    """Parts [U, 1, 3] of the mean of values [U]; a value that is not a number counts nothing."""
    found = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(found)
    return np.stack([np.where(there, found, 0.0), there, there], axis=1)[:, None, :]


def pooled_score(sums: Floats) -> Floats:
    """The score of summed parts.

    Args:
        sums: [..., G, 3] of numerators, denominators and what shows that a group occurs.

    Returns:
        [...]; NaN where no group occurs.
    """
    numerator, denominator, present = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    occurs = present > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(occurs, numerator / np.where(occurs, denominator, 1.0), 0.0)
        score: Floats = ratio.sum(-1) / occurs.sum(-1)
    return score


def score_draws(parts: Floats, *, resamples: int = 2000, seed: int = 0) -> Floats:
    """The score of bootstrap samples: whole units drawn with replacement.

    Two runs tested on the same units get the same samples from the same seed, so that draws subtract in pairs.

    Args:
        parts: [U, G, 3], at least two units.
        resamples: number of samples.
        seed: seed of the drawing.

    Returns:
        [resamples]; NaN for a sample that holds nothing to score.

    Raises:
        ValueError: fewer than two units.
    """
    num = len(parts)
    if num < 2:
        raise ValueError(f"{num} unit(s): a bootstrap over test units needs at least two")
    drawn = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=resamples)
    return pooled_score(np.tensordot(drawn.astype(np.float64), parts, axes=1))
