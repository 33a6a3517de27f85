# SPDX-License-Identifier: Apache-2.0
"""The true logits of the generated log: random smooth functions, made uncorrelated, then mixed as tasks are related."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TASTE = 16
WIDTH = 3 * TASTE
UNITS = 6  # hidden units of a random function
LOGIT_STD = 1.6
REFERENCE = 20_000  # rows over which the functions are made uncorrelated


def stream(seed: int, *names: str) -> np.random.Generator:
    """Return the random numbers that belong to a seed and a purpose; another purpose never moves them."""
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in names)])


class FactorModel:
    """Logits q_t(x, phi) of T tasks in C categories; see `tasks.recommendation.data.multitask_log` for the equations.

    Args:
        categories: category of each task.
        weights: of what all tasks share, of what a category shares, of what a task has alone.
        rho: correlation between the factors of two categories, in [-1 / (C - 1), 1].
        seed: seed of the functions.

    Raises:
        ValueError: weights without a positive one, or a correlation that C categories cannot have.
    """

    def __init__(self, categories: Sequence[str], weights: tuple[float, float, float], rho: float, seed: int) -> None:
        self.categories, self.weights, self.rho, self.seed = list(categories), weights, rho, seed
        self.names = list(dict.fromkeys(categories))
        low = -1.0 / max(len(self.names) - 1, 1)
        if not low <= rho <= 1:
            raise ValueError(f"rho={rho} is impossible for {len(self.names)} categories; allowed is [{low:.3g}, 1]")
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"weights={weights}: give three numbers that are not negative, one of them above 0")

    @cached_property
    def _functions(self) -> tuple[Floats, Floats, Floats]:
        """W [48, K * 6], W' [48, K * 6] and a [K, 6] of the K = 1 + categories + tasks raw functions."""
        rng, count = stream(self.seed, "functions"), 1 + len(self.names) + len(self.categories)
        first, second = rng.standard_normal((2, WIDTH, count * UNITS))
        return first, second, rng.standard_normal((count, UNITS))

    def _raw(self, x: Floats, angle: Floats) -> Floats:
        """The random functions before they are made uncorrelated: [n, K]."""
        first, second, outer = self._functions
        turned = np.cos(angle)[:, None] * (x @ first) + np.sin(angle)[:, None] * (x @ second)
        hidden = np.tanh(2 * turned / math.sqrt(WIDTH)).reshape(len(x), -1, UNITS)
        return np.asarray(np.einsum("nku,ku->nk", hidden, outer))

    @cached_property
    def _whitening(self) -> tuple[Floats, Floats]:
        """Mean [K] and symmetric whitening matrix [K, K] over angles from 0 to 45 degrees.

        The symmetric root changes the functions least, so S, C and f keep their identity.
        """
        rng = stream(self.seed, "reference")
        z_u, z_i = rng.standard_normal((2, REFERENCE, TASTE))
        raw = self._raw(features(z_u, z_i), rng.uniform(0, math.pi / 4, REFERENCE))
        values, vectors = np.linalg.eigh(np.cov(raw, rowvar=False))
        return raw.mean(0), vectors / np.sqrt(values) @ vectors.T

    @cached_property
    def _mixing(self) -> Floats:
        """Weights of the K unit factors in each task's logit: [K, T]."""
        count, tasks = len(self.names), len(self.categories)
        values, vectors = np.linalg.eigh((1 - self.rho) * np.eye(count) + self.rho * np.ones((count, count)))
        root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
        shared, in_category, alone = self.weights
        mix = np.zeros((1 + count + tasks, tasks))
        for t, category in enumerate(self.categories):
            mix[0, t] = shared
            mix[1 : 1 + count, t] = in_category * root[self.names.index(category)]
            mix[1 + count + t, t] = alone
        return LOGIT_STD * mix / math.sqrt(sum(weight**2 for weight in self.weights))

    def logits(self, x: Floats, angle: Floats) -> Floats:
        """True logits without intercepts.

        Args:
            x: float64 [n, 48], unscaled.
            angle: float64 [n], radians.

        Returns:
            float64 [n, T]; over the reference population each column has standard deviation 1.6.
        """
        mean, white = self._whitening
        return np.asarray((self._raw(x, angle) - mean) @ white @ self._mixing)


def features(z_u: Floats, z_i: Floats) -> Floats:
    """Return x = [z_u, z_i, z_u * z_i] [n, 48] of tastes [n, 16]."""
    return np.concatenate([z_u, z_i, z_u * z_i], 1)


def sigmoid(x: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)), elementwise, without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def intercepts(logits: Floats, rates: Floats, steps: int = 45) -> Floats:
    """Intercepts b with mean(sigmoid(logits + b)) = rates, by bisection.

    Args:
        logits: float64 [n, T].
        rates: float64 [T] in (0, 1).
        steps: halvings of an interval that holds the answer.

    Returns:
        float64 [T].
    """
    low = np.log(rates / (1 - rates)) - np.abs(logits).max()
    high = np.log(rates / (1 - rates)) + np.abs(logits).max()
    for _ in range(steps):
        middle = (low + high) / 2
        above = sigmoid(logits + middle).mean(0) > rates
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.asarray((low + high) / 2)
