# SPDX-License-Identifier: Apache-2.0
"""Families of ordinary differential equations as domains: generated in double precision, kept in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from typing_extensions import override

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import SPLITS, Split
from tasks.dynamics.data import fields
from tasks.dynamics.data.fields import Family, check_likeness, integrate
from tasks.dynamics.data.source import DynamicsSource, EnvironmentSet, Floats, Kind, with_noise

GENERATOR_VERSION = 1
"""Part of the cache key; raise it when a formula or a draw changes."""


class OdeFamilies(DynamicsSource):
    """Families of differential equations -> environments (parameters) -> trajectories (initial conditions).

    A family's name is a domain: trained on where it is seen, else an unseen family to adapt to. Other domains are
    groups of new environments of all seen families: ``between`` (for choices) and ``inside`` within the trained range
    of the parameters and off its grid, ``outside`` beyond it.

    The splits have initial conditions of their own: each environment draws them from its own seed. Environments to
    adapt to give one support trajectory and ``val`` or ``test`` queries.

    Args:
        catalogue: the families; None means the set's own (harmonic, lotka_volterra, double_well, van_der_pol, damped,
            pendulum, selkov, brusselator).
        num_samples: T, samples of a trajectory, at least 2; None means the set's own (20).
        train_trajectories: initial conditions per training environment.
        val_trajectories: initial conditions for choices.
        test_trajectories: initial conditions for the test.
        support_trajectories: trajectories a new environment's context is fitted to; at most train_trajectories.
        noise: standard deviation of Gaussian noise on training and support trajectories, in units of the state.
        likeness: share of one common oscillator mixed into every family, in [0, 1); the families must be oscillators.
        data_seed: seed of initial conditions and noise.
        num_given: leading samples that a prediction may use; None means the set's own (1).

    Raises:
        ValueError: a count below 1, more support than training trajectories, families of different state sizes, or
            likeness where it does not apply.
    """

    kind: Kind = "field"
    catalogue_of_set: ClassVar[Sequence[Family]] = fields.ODEFAM
    samples_of_set: ClassVar[int] = 20
    given_of_set: ClassVar[int] = 1
    default_seen: Sequence[str] = ("harmonic", "lotka_volterra", "double_well", "van_der_pol")
    default_validation: Sequence[str] = ("between", "damped")
    default_unseen: Sequence[str] = ("inside", "outside", "pendulum")

    def __init__(
        self,
        *,
        catalogue: Sequence[Family] | None = None,
        num_samples: int | None = None,
        train_trajectories: int = 4,
        val_trajectories: int = 4,
        test_trajectories: int = 16,
        support_trajectories: int = 1,
        noise: float = 0.0,
        likeness: float = 0.0,
        data_seed: int = 0,
        num_given: int | None = None,
    ) -> None:
        chosen = self.catalogue_of_set if catalogue is None else catalogue
        self.catalogue = {family.name: family for family in chosen}
        num_samples = self.samples_of_set if num_samples is None else num_samples
        num_given = self.given_of_set if num_given is None else num_given
        self.counts: dict[Split, int] = {
            "train": train_trajectories,
            "val": val_trajectories,
            "test": test_trajectories,
        }
        sizes = {f"{split}_trajectories": count for split, count in self.counts.items()}
        sizes |= {"support_trajectories": support_trajectories, "num_given": num_given}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed; use 1 or more")
        if support_trajectories > train_trajectories:
            raise ValueError(
                f"support_trajectories={support_trajectories} exceeds train_trajectories={train_trajectories}"
            )
        if num_samples < 2 or num_given >= num_samples:
            raise ValueError(f"num_samples={num_samples} must be 2 or more, and more than num_given={num_given}")
        if noise < 0:
            raise ValueError(f"noise={noise} is not allowed; use 0 or more")
        dims = {name: len(family.low) for name, family in self.catalogue.items()}
        if len(set(dims.values())) != 1:
            raise ValueError(f"families of one source must have one state size, not {dims}")
        (self.state_dim,) = set(dims.values())
        self.num_steps, self.num_support, self.num_given = num_samples, support_trajectories, num_given
        self.noise, self.likeness, self.data_seed = noise, likeness, data_seed

    def families(self, seen: Sequence[str]) -> list[str]:
        """Return the seen families, then the others."""
        return [*seen, *(name for name in self.catalogue if name not in seen)]

    def environments(self, domain: str, seen: Sequence[str]) -> list[str]:
        """Return names such as ``harmonic(1.68)``."""
        return [f"{f.name}({', '.join(f'{v:.4g}' for v in s)})" for f, _, s in self._members(domain, seen)]

    def _members(self, domain: str, seen: Sequence[str]) -> list[tuple[Family, int, fields.Setting]]:
        """The environments of a domain: family, place among all settings of the family, and setting."""
        for name in seen:
            if name not in self.catalogue:
                raise ValueError(f"domain {name!r} cannot be trained on; the families are {', '.join(self.catalogue)}")
        group = "train" if domain in self.catalogue else domain
        chosen = [domain] if domain in self.catalogue else list(seen)
        found = []
        for family in (self.catalogue[name] for name in chosen):
            check_likeness(family, self.likeness)
            places = enumerate((key, setting) for key, settings in family.settings.items() for setting in settings)
            found += [(family, place, setting) for place, (key, setting) in places if key == group]
        if not found:
            groups = dict.fromkeys(g for f in self.catalogue.values() for g in f.settings if g != "train")
            raise ValueError(
                f"unknown domain {domain!r}; allowed: families {', '.join(self.catalogue)}; groups {', '.join(groups)}"
            )
        return found

    def load(self, domain: str, split: Split, seen: Sequence[str]) -> EnvironmentSet:
        """Return the trajectories of one domain and split; generated on first use."""
        members = self._members(domain, seen)
        whole = np.stack([self._family(family)[place] for family, place, _ in members])  # [S, N, T, D]
        start = sum(self.counts[earlier] for earlier in SPLITS[: SPLITS.index(split)])
        own, training = whole[:, start : start + self.counts[split]], whole[:, : self.counts["train"]]
        names, families = self.environments(domain, seen), [family.name for family, _, _ in members]
        dt = np.array([family.horizon / (self.num_steps - 1) for family, _, _ in members])
        seed = [self.data_seed, _number(domain)]
        observed = with_noise(EnvironmentSet(training, dt, names, families), self.noise, seed).x
        if domain in seen:
            x = observed if split == "train" else own
            return EnvironmentSet(x, dt, names, families, 0, self.num_given, observed)
        if split == "train":
            raise ValueError(f"domain {domain!r} is not trained on and has no train split")
        support = observed[:, : self.num_support]
        return EnvironmentSet(np.concatenate([support, own], 1), dt, names, families, self.num_support, self.num_given)

    @override
    def describe(self, domain: str) -> str:
        return (
            f"generated in double precision, data_seed {self.data_seed}, noise {self.noise}, likeness {self.likeness}"
        )

    def prepare(self, domains: Sequence[str], seen: Sequence[str]) -> None:
        """Generate the families that are not in the cache yet, with a progress bar."""
        names = dict.fromkeys(f.name for domain in domains for f, _, _ in self._members(domain, seen))
        wanted = [self.catalogue[name] for name in names if not self._path(self.catalogue[name]).exists()]
        if not wanted:
            return
        from rich.progress import track

        for family in track(wanted, description="integrating families", transient=True):
            self._family(family)

    # Generation ---------------------------------------------------------------------------------------------------

    def _path(self, family: Family) -> Path:
        about: dict[str, Any] = {**asdict(family), "settings": {g: list(s) for g, s in family.settings.items()}}
        key = config_hash(
            [GENERATOR_VERSION, about, self.num_steps, list(self.counts.items()), self.likeness, self.data_seed]
        )
        return cache_dir("dynamics", root=self.cache) / f"{family.name}-{key}.npz"

    def _family(self, family: Family) -> Floats:
        """All environments of a family, every group, train then val then test: float64 [S, N, T, D]."""

        def write(path: Path) -> None:
            np.savez(path, x=self.generate(family).astype(np.float32))

        with np.load(build_once(self._path(family), write)) as arrays:
            x: Floats = arrays["x"].astype(np.float64)
        return x

    def generate(self, family: Family) -> Floats:
        """Integrate all environments of a family: float64 [S, N, T, D], N = train + val + test.

        Raises:
            ValueError: a trajectory leaves the finite range.
        """
        settings = torch.tensor([s for group in family.settings.values() for s in group], dtype=torch.float64)
        x0 = torch.from_numpy(np.stack([self._initial(family, e) for e in range(len(settings))]))
        x = integrate(family, settings, x0, self.num_steps, likeness=self.likeness)
        if not x.isfinite().all():
            raise ValueError(
                f"a trajectory of family {family.name!r} becomes infinite; narrow its box, shorten its horizon or take "
                "more substeps"
            )
        return x.numpy()

    def _initial(self, family: Family, environment: int) -> Floats:
        """Initial conditions [N, D] of one environment, from a seed of its own: none is shared between splits.

        Only the training split begins with the family's reference conditions.
        """
        rng = np.random.default_rng([self.data_seed, _number(family.name), environment])
        x0 = rng.uniform(family.low, family.high, (sum(self.counts.values()), len(family.low)))
        first = family.first[: self.counts["train"]]
        x0[: len(first)] = np.array(first).reshape(len(first), -1) if first else x0[:0]
        return x0


def _number(name: str) -> int:
    return int.from_bytes(name.encode()[:8], "little")


# --- published sets ---------------------------------------------------------------------------------------------------


class OdeBench10(OdeFamilies):
    """Ten planar textbook families (ODEBench 24, 25, 28, 32, 34, 35, 37, 38, 39, 40) with 5 environments each (10A).

    Two pairs cannot be told apart in full: duffing has the field of van_der_pol, and harmonic is damped without
    friction; scores of recovered families should merge them (`fields.ODEBENCH_ALIKE`). The reference initial
    conditions are in the training split only. The public code tests on 32 initial conditions.
    """

    catalogue_of_set: ClassVar[Sequence[Family]] = fields.odebench(5)
    default_seen = tuple(family.name for family in catalogue_of_set)
    default_validation = ("between",)
    default_unseen = ("inside", "outside")


class OdeBench10B(OdeBench10):
    """The ten families of `OdeBench10` with 16 environments each."""

    catalogue_of_set = fields.odebench(16)


class LotkaVolterra(OdeFamilies):
    """One family: predators and prey on a 3 x 3 grid of (b, d), new environments inside and outside it."""

    catalogue_of_set = fields.LOTKA_VOLTERRA
    default_seen = ("lotka_volterra",)
    default_validation = ("between",)
    default_unseen = ("adapt",)


class Glycolytic(OdeFamilies):
    """One stiff family of seven states: glycolysis of yeast on a 3 x 3 grid of (k1, K1)."""

    catalogue_of_set = fields.GLYCOLYTIC
    default_seen = ("glycolytic",)
    default_validation = ("between",)
    default_unseen = ("adapt",)


class Selkov(OdeFamilies):
    """Sel'kov's oscillator in three ranges of b with different behaviour; 11 samples."""

    catalogue_of_set = fields.SELKOV
    samples_of_set = 11
    default_seen = tuple(family.name for family in fields.SELKOV)
    default_validation = ("between",)
    default_unseen = ("adapt",)


class Lorenz(OdeFamilies):
    """Two chaotic families of ten states as series to continue, 64 + 20 environments; set ``noise: 0.01``.

    Our definition: Lorenz 1996 on a ring, and its mirror image. How the authors made their set of this size is unknown.
    """

    catalogue_of_set = fields.LORENZ
    samples_of_set = 61
    given_of_set = 31
    kind = "sequence"
    default_seen = tuple(family.name for family in fields.LORENZ)
    default_validation = ("between",)
    default_unseen = ("inside", "outside")
