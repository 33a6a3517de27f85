# SPDX-License-Identifier: Apache-2.0
"""How many there must be: experts, columns, choices per row, layers."""

from __future__ import annotations


def at_least_one(**counts: int | None) -> None:
    """Refuse counts below 1, by the names that the user gives them; None is for one that is not given.

    Raises:
        ValueError: one is below 1.

    Example:
        >>> at_least_one(num_experts=0)
        Traceback (most recent call last):
        ValueError: num_experts=0, but it must be at least 1.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count}, but it must be at least 1.")


def none_negative(**counts: float | None) -> None:
    """Refuse numbers below 0 where 0 leaves a part out, by the names that the user gives them; None is not given.

    Raises:
        ValueError: one is below 0.

    Example:
        >>> none_negative(shared_experts=-1)
        Traceback (most recent call last):
        ValueError: shared_experts=-1, but it must be at least 0.
    """
    for name, count in counts.items():
        if count is not None and count < 0:
            raise ValueError(f"{name}={count}, but it must be at least 0.")
