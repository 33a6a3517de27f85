# SPDX-License-Identifier: Apache-2.0
"""Where environments come from, and the checks that hold for all of them.

S environments, N trajectories per environment, T samples, D state size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from moeapps.data.domain import Split
from tasks.dynamics.data.batch import Trajectories

Floats = npt.NDArray[np.floating]
Kind = Literal["field", "sequence"]

MIN_SCALE = 1e-6
"""Least root mean squared increment: trajectories that stand still are not divided by zero."""


@dataclass(frozen=True)
class EnvironmentSet:
    """The environments of one domain and split, in double precision, missing values as nan.

    Attributes:
        x: states [S, N, T, D], nan where missing.
        dt: seconds between samples [S].
        names: one name per environment.
        families: name of the hidden family of each environment, None where it is unknown.
        num_support: leading trajectories for fitting a context; 0 for trained environments.
        num_given: leading samples that a prediction may use.
        observed: trajectories the scale is taken from [S, N', T', D]; None: the support, or all where there is none.
    """

    x: Floats
    dt: Floats
    names: Sequence[str]
    families: Sequence[str | None]
    num_support: int = 0
    num_given: int = 1
    observed: Floats | None = None

    def __post_init__(self) -> None:
        S = len(self.x)
        if self.x.ndim != 4 or self.dt.shape != (S,) or len(self.names) != S or len(self.families) != S:
            raise ValueError(
                f"x has shape {self.x.shape}, dt {self.dt.shape}, with {len(self.names)} names and "
                f"{len(self.families)} families; they must be [S, N, T, D], [S], S and S"
            )
        if not (np.isfinite(self.dt) & (self.dt > 0)).all():
            raise ValueError(f"dt={self.dt.tolist()} must be positive seconds")
        if np.isinf(self.x).any():
            raise ValueError("x holds infinite values; mark missing ones as nan")

    def trajectories(self, env: Sequence[int], families: Sequence[str]) -> Trajectories:
        """Convert to single precision with a mask of what is there.

        Args:
            env: number of each environment among the trained ones, or -1.
            families: all family names, in the order of their labels.
        """
        present: npt.NDArray[np.bool_] = np.asarray(np.isfinite(self.x).all(axis=3))  # [S, N, T]
        labels = [-1 if name is None else list(families).index(name) for name in self.families]
        return Trajectories(
            x=torch.from_numpy(np.where(present[..., None], self.x, 0.0).astype(np.float32)),
            dt=torch.from_numpy(self.dt.astype(np.float32)),
            env=torch.tensor(list(env), dtype=torch.int64),
            family=torch.tensor(labels, dtype=torch.int64),
            mask=None if present.all() else torch.from_numpy(present),
            scale=torch.from_numpy(self._scale().astype(np.float32)),
            num_support=self.num_support,
            num_given=self.num_given,
        )

    def _scale(self) -> Floats:
        observed = self.observed
        if observed is None:
            observed = self.x[:, : self.num_support] if self.num_support else self.x
        return increment_scale(observed)

    def require_initial_conditions(self) -> EnvironmentSet:
        """Return self if every trajectory has its first sample, which an initial value problem starts from.

        Raises:
            ValueError: a first sample is missing.
        """
        bad = np.argwhere(np.isnan(self.x[:, :, 0].sum(axis=2)))
        if len(bad):
            e, n = bad[0]
            raise ValueError(
                f"trajectory {n} of environment {self.names[e]!r} has no first sample (and {len(bad) - 1} others); a "
                "vector field starts there: cut the leading gap, or use kind: sequence"
            )
        return self


def increment_scale(x: Floats) -> Floats:
    """Root mean squared increment of each environment, at least `MIN_SCALE`: [S] from [S, N, T, D]; nan is left out.

    Raises:
        ValueError: an environment has missing samples and no two observed ones in a row: nothing to learn from.
    """
    squares = np.diff(x, axis=2).reshape(len(x), -1) ** 2
    counts = (~np.isnan(squares)).sum(1)
    empty = np.flatnonzero((counts == 0) & np.isnan(x).reshape(len(x), -1).any(1))
    if len(empty):
        raise ValueError(
            f"environment {empty[0]} ({len(empty)} of {len(x)}) has no two observed samples in a row, so that nothing "
            "can be learned of it; leave it out or give it data"
        )
    counts = np.maximum(counts, 1)
    scale: Floats = np.maximum(np.sqrt(np.nansum(squares, axis=1) / counts), MIN_SCALE)
    return scale


class DynamicsSource(ABC):
    """Named domains of environments.

    A domain that is trained on gives trajectories of known environments; every other domain gives environments to
    adapt to, each with support and query trajectories.

    Attributes:
        kind: ``field`` (initial value problems) or ``sequence`` (series that are continued).
        state_dim: D.
        num_steps: T of the training trajectories.
        default_seen: domains trained on if none are named.
        default_validation: domains where choices are made if none are named.
        default_unseen: domains that only ``test`` touches if none are named.
        cache: root of the cache, set by the data module; None means the default.
    """

    kind: Kind
    state_dim: int
    num_steps: int
    default_seen: Sequence[str]
    default_validation: Sequence[str]
    default_unseen: Sequence[str]
    cache: Path | None = None

    @abstractmethod
    def families(self, seen: Sequence[str]) -> list[str]:
        """Return all family names, those of the seen domains first; their positions are the hidden labels."""

    @abstractmethod
    def environments(self, domain: str, seen: Sequence[str]) -> list[str]:
        """Return the names of a domain's environments.

        Raises:
            ValueError: unknown domain, or one that has no environment under these seen domains.
        """

    @abstractmethod
    def load(self, domain: str, split: Split, seen: Sequence[str]) -> EnvironmentSet:
        """Return the environments of one domain with the trajectories of one split.

        The splits of a domain share no trajectory. A domain that is not seen has no ``train`` split; its ``val`` and
        ``test`` splits share the support and nothing else.
        """

    @abstractmethod
    def describe(self, domain: str) -> str:
        """Say in a few words where the data comes from, for the results file."""

    def prepare(self, domains: Sequence[str], seen: Sequence[str]) -> None:
        """Generate or fetch what is not in the cache yet."""
        for domain in domains:
            self.load(domain, "test", seen)


def with_noise(data: EnvironmentSet, noise: float, seed: Sequence[int]) -> EnvironmentSet:
    """Add Gaussian noise to what is observed: the support trajectories, or all of a trained environment.

    Args:
        data: environments.
        noise: standard deviation, in units of the state; 0 changes nothing.
        seed: seed of the noise.
    """
    if not noise:
        return data
    x = data.x.copy()
    observed = x[:, : data.num_support] if data.num_support else x
    observed += noise * np.random.default_rng(list(seed)).standard_normal(observed.shape)
    return replace(data, x=x)
