# SPDX-License-Identifier: Apache-2.0
"""A generated log with known truth: how related the tasks are, how rare, and how domains differ are settings.

A user u has taste z_u ~ N(0, I_16) and an angle phi_u; an item i has z_i ~ N(0, I_16). A row reads
x = [z_u, z_i, z_u * z_i] (48 numbers) and two context numbers that show the angle with noise. Random smooth functions
g(x, phi) = a . tanh(2 x W(phi) / sqrt(48)), W(phi) = cos(phi) W + sin(phi) W', are made uncorrelated and of unit
variance, and mixed:

    q_t = 1.6 (w_S S + w_C C_cat(t) + w_f f_t) / sqrt(w_S^2 + w_C^2 + w_f^2),    y_t ~ Bernoulli(sigmoid(q_t + b_t))

with one S for all tasks, one C per category (correlation ``rho`` between categories), one f per task, and b_t such that
the mean probability is the task's rate. So tasks of one category share (w_S^2 + w_C^2) / sum of their logits' variance,
tasks of two share (w_S^2 + rho w_C^2) / sum. Domains differ by the mean angle of their users (rotated preferences), by
where their tastes lie and by their rates. The true probabilities come with every row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from moeapps.data.domain import Role, Split
from moeapps.data.gather import TableDataset
from moeapps.moe.counts import none_negative
from tasks.recommendation.data.batch import Interactions, Schema
from tasks.recommendation.data.factors import (
    REFERENCE,
    TASTE,
    WIDTH,
    FactorModel,
    Floats,
    features,
    intercepts,
    sigmoid,
    stream,
)
from tasks.recommendation.data.source import GeneratedLog

GENERATOR_VERSION = 1
CONTEXT_NOISE = 0.1  # standard deviation of the noise on the two context numbers


@dataclass
class Population:
    """The users of one domain.

    Args:
        angle: mean of the users' angles, degrees: preferences rotate with it.
        spread: standard deviation of the users' angles, degrees.
        taste_shift: how far the users' mean taste lies from the origin, in standard deviations.
        rate_factors: category -> factor on the rates of its tasks; a category left out has 1.
    """

    angle: float = 0.0
    spread: float = 5.0
    taste_shift: float = 0.0
    rate_factors: dict[str, float] = field(default_factory=dict)


def default_populations() -> dict[str, Population]:
    """Four training populations, one for choices, one with an angle beyond them all, and one with another task mix."""
    seen = {f"angle_{angle:02d}": Population(float(angle)) for angle in (0, 15, 30, 45)}
    mix = Population(22.5, taste_shift=1.5, rate_factors={"watch": 0.5, "interaction": 3.0})
    return {**seen, "angle_22": Population(22.5), "rotated": Population(70.0), "other_mix": mix}


def default_rates() -> dict[str, dict[str, float]]:
    """Six tasks in two categories; the last three are rare."""
    return {
        "watch": {"click": 0.30, "eview": 0.20, "lview": 0.12},
        "interaction": {"like": 0.04, "comment": 0.01, "follow": 0.005},
    }


class MultitaskLog(GeneratedLog):
    """A generated log of six tasks in two categories, three of them rare, in seven domains.

    Args:
        data_seed: seed of everything; another one gives other functions, users, items and labels.
        rates: category -> task -> mean probability, in (0, 1).
        weights: weights of what all tasks share, of what a category shares, of what a task has alone.
        rho: correlation between the factors of two categories, in [-1 / (C - 1), 1]; negative = categories conflict.
        label_noise: share of labels drawn from the base rate alone, in [0, 1).
        missing_labels: share of labels hidden at random, in [0, 1).
        num_users: users per domain.
        num_items: items, shared by all domains.
        zipf: activity of the k-th user is k ** -zipf; 0 = all equally active.
        train_rows: training rows per seen domain.
        val_rows: validation rows per seen and validation domain.
        test_rows: test rows per domain.
        scale_spread: standard deviation of the log of the dense columns' scales.
        heavy_tails: h > 0 makes a dense feature (exp(h x) - 1) / h before scaling: log-normal like raw counts; 0 is x.
        segments: add two id fields, the user's and the item's coarse segment (16 each).
        populations: domains by name; None means the seven of `default_populations`.

    Raises:
        ValueError: a rate, share or correlation outside its range, a count below 1, or a factor that lifts a rate to 1.
    """

    stem = "multitask"
    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": ["angle_00", "angle_15", "angle_30", "angle_45"],
        "validation": ["angle_22"],
        "unseen": ["rotated", "other_mix"],
    }

    def __init__(
        self,
        *,
        data_seed: int = 0,
        rates: dict[str, dict[str, float]] | None = None,
        weights: tuple[float, float, float] = (0.5, 0.7, 0.5),
        rho: float = 0.0,
        label_noise: float = 0.0,
        missing_labels: float = 0.0,
        num_users: int = 600,
        num_items: int = 4000,
        zipf: float = 0.0,
        train_rows: int = 15_000,
        val_rows: int = 15_000,
        test_rows: int = 40_000,
        scale_spread: float = 0.8,
        heavy_tails: float = 0.0,
        segments: bool = True,
        populations: dict[str, Population] | None = None,
    ) -> None:
        self.data_seed = data_seed
        self.rates = default_rates() if rates is None else rates
        self.weights = (float(weights[0]), float(weights[1]), float(weights[2]))
        self.rho, self.label_noise, self.missing_labels = rho, label_noise, missing_labels
        self.num_users, self.num_items, self.zipf = num_users, num_items, zipf
        self.rows: dict[Split, int] = {"train": train_rows, "val": val_rows, "test": test_rows}
        none_negative(scale_spread=scale_spread)
        self.scale_spread, self.heavy_tails, self.segments = scale_spread, heavy_tails, segments
        self.domains = self.populations = default_populations() if populations is None else populations
        self._known_intercepts: dict[str, Floats] = {}
        self.truth = FactorModel(self.schema.categories, self.weights, rho, data_seed)
        self._check()

    def _check(self) -> None:
        for name, share in (("label_noise", self.label_noise), ("missing_labels", self.missing_labels)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}={share} must lie in [0, 1)")
        counts = {"num_users": self.num_users, "num_items": self.num_items}
        for name, value in {**counts, **{f"{split}_rows": rows for split, rows in self.rows.items()}}.items():
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed; use 1 or more")
        if self.zipf < 0 or self.heavy_tails < 0:
            raise ValueError(f"zipf={self.zipf}, heavy_tails={self.heavy_tails}: neither may be negative")
        for domain, population in self.populations.items():
            self._check_population(domain, population)

    def _check_population(self, domain: str, population: Population) -> None:
        unknown = set(population.rate_factors) - set(self.rates)
        if unknown:
            raise ValueError(
                f"domain {domain!r} scales the rates of unknown category {sorted(unknown)[0]!r}; "
                f"categories: {', '.join(self.rates)}"
            )
        for task, rate in zip(self.schema.tasks, self._domain_rates(population), strict=True):
            if not 0 < rate < 1:
                raise ValueError(f"task {task!r} has rate {rate:.3g} in domain {domain!r}; rates lie in (0, 1)")

    # What a source provides ---------------------------------------------------------------------------------------

    @cached_property
    def schema(self) -> Schema:
        """Columns: 48 + 2 dense features, two segments, the tasks in the order of ``rates``."""
        return Schema(
            tasks=tuple(task for tasks in self.rates.values() for task in tasks),
            categories=tuple(category for category, tasks in self.rates.items() for _ in tasks),
            dense_dim=WIDTH + 2,
            fields={"user_segment": 17, "item_segment": 17} if self.segments else {},
            bags={},
        )

    def dataset(self, domain: str, split: Split, cache: Path | None) -> TableDataset:
        """Return the rows of one domain and split."""
        return TableDataset(self._table(domain, self.drawn(domain, split, cache)))

    def made_of(self, domain: str, split: Split) -> list[Any]:
        """Return what users, items, labels and probabilities depend on; features are recomputed from them."""
        drawn = [self.data_seed, self.rates, self.weights, self.rho, self.label_noise, self.missing_labels]
        sizes = [self.num_users, self.num_items, self.zipf, self.rows[split], asdict(self.populations[domain])]
        return [GENERATOR_VERSION, drawn, sizes, domain, split]

    # Generation ---------------------------------------------------------------------------------------------------

    def _rng(self, *names: str) -> np.random.Generator:
        return stream(self.data_seed, *names)

    @cached_property
    def _items(self) -> Floats:
        return self._rng("items").standard_normal((self.num_items, TASTE))

    def _users(self, domain: str) -> tuple[Floats, Floats, Floats]:
        """Tastes [U, 16], angles [U] in radians and their noisy appearance [U, 2] of a domain's users."""
        rng, population = self._rng("users", domain), self.populations[domain]
        direction = self._rng("shift").standard_normal(TASTE)
        taste = rng.standard_normal((self.num_users, TASTE))
        taste += population.taste_shift * direction / np.linalg.norm(direction)
        angle = np.radians(population.angle + population.spread * rng.standard_normal(self.num_users))
        shown = np.stack([np.cos(angle), np.sin(angle)], 1) + CONTEXT_NOISE * rng.standard_normal((self.num_users, 2))
        return taste, angle, shown

    def _domain_rates(self, population: Population) -> Floats:
        factors = [population.rate_factors.get(category, 1.0) for category in self.schema.categories]
        rates = [rate for tasks in self.rates.values() for rate in tasks.values()]
        return np.asarray(np.array(rates) * np.array(factors), np.float64)

    def _impressions(self, domain: str, rng: np.random.Generator, rows: int) -> tuple[Any, Any, Floats]:
        """Draw who was shown what: users [n], items [n] and the true logits without intercepts [n, T]."""
        taste, angle, _ = self._users(domain)
        activity = np.arange(1, self.num_users + 1) ** -self.zipf
        user = rng.choice(self.num_users, rows, p=activity / activity.sum())
        item = rng.integers(self.num_items, size=rows)
        return user, item, self.truth.logits(features(taste[user], self._items[item]), angle[user])

    def _intercepts(self, domain: str) -> Floats:
        """Intercepts [T] of a domain, the same in all its splits."""
        if domain not in self._known_intercepts:
            logits = self._impressions(domain, self._rng("intercepts", domain), REFERENCE)[2]
            self._known_intercepts[domain] = intercepts(logits, self._domain_rates(self.populations[domain]))
        return self._known_intercepts[domain]

    def draw(self, domain: str, split: Split) -> dict[str, NDArray[Any]]:
        """Draw rows; features are twenty times as large and not kept."""
        rates = self._domain_rates(self.populations[domain])
        rng = self._rng("rows", domain, split)
        user, item, logits = self._impressions(domain, rng, self.rows[split])
        clean = sigmoid(logits + self._intercepts(domain))
        oracle = (1 - self.label_noise) * clean + self.label_noise * rates
        label = rng.random(oracle.shape) < oracle
        mask = rng.random(oracle.shape) >= self.missing_labels
        return {
            "user": user.astype(np.int32),
            "item": item.astype(np.int32),
            "label": label & mask,
            "mask": mask,
            "oracle": oracle.astype(np.float32),
        }

    def _table(self, domain: str, drawn: dict[str, NDArray[Any]]) -> Interactions:
        taste, _, shown = self._users(domain)
        user, item = drawn["user"], drawn["item"]
        x = np.concatenate([features(taste[user], self._items[item]), shown[user]], 1)
        if self.heavy_tails > 0:
            x = np.expm1(self.heavy_tails * x) / self.heavy_tails
        x *= np.exp(self.scale_spread * self._rng("scales").standard_normal(WIDTH + 2))
        ids = np.stack([_segment(taste)[user], _segment(self._items)[item]], 1) if self.segments else None
        return Interactions(
            dense=torch.from_numpy(x.astype(np.float32)),
            ids=torch.zeros(len(user), 0, dtype=torch.int64) if ids is None else torch.from_numpy(ids),
            bags={},
            label=torch.from_numpy(drawn["label"].astype(np.float32)),
            mask=torch.from_numpy(drawn["mask"]),
            user=torch.from_numpy(user.astype(np.int64)),
            row=torch.arange(len(user)),
            oracle=torch.from_numpy(drawn["oracle"]),
        )


def _segment(taste: Floats) -> NDArray[np.int64]:
    """1 to 16: the signs of the first four tastes."""
    return np.asarray(1 + (taste[:, :4] > 0) @ np.array([1, 2, 4, 8]), np.int64)
