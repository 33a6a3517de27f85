# SPDX-License-Identifier: Apache-2.0
"""Trajectories in the npz layouts of the JAX examples of NCF and MixER (ddrous/ncflow, ddrous/MixER).

``X`` [S, N, T, D] with ``t`` [T], or by family ``X`` [F, S, N, T, D] with ``t`` [F, T]. Beside the latter may lie
``<stem>_bounds.npy`` [F, S, 1, 1, D], the largest absolute values, and ``<stem>_envs.json``, the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from moeapps.bounds import check_npz, read_json
from moeapps.data.domain import Split
from moeapps.files import absent, place_of
from tasks.dynamics.data.readers.ts_format import SeriesFormatError
from tasks.dynamics.data.source import DynamicsSource, EnvironmentSet, Floats

TRAINED, FOR_CHOICES, ADAPT = "trained", "for_choices", "adapt"


@dataclass(frozen=True)
class NpzFile:
    """One file, families laid one after another.

    Attributes:
        x: [S, N, T, D] over all families.
        dt: seconds between samples [S].
        family: number of the family [S]; all 0 in the layout without families.
        bounds: largest absolute values [S, D], or None.
        parameters: what the json says, or None.
    """

    x: Floats
    dt: Floats
    family: np.ndarray[Any, np.dtype[np.int64]]
    bounds: Floats | None = None
    parameters: Any = None


def read_npz(path: Path) -> NpzFile:
    """Read either layout.

    Raises:
        SeriesFormatError: no file, a damaged one, no X or t, shapes that do not agree, infinite values, times that are
            not evenly spaced and rising.
    """
    if not path.is_file():
        raise SeriesFormatError(f"{absent(path)}; correct root or the file name")
    with _readable(path):
        check_npz(path)
    with _readable(path), open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        if not isinstance(arrays, np.lib.npyio.NpzFile) or not {"X", "t"} <= set(arrays.files):
            held = sorted(arrays.files) if isinstance(arrays, np.lib.npyio.NpzFile) else "one array"
            raise SeriesFormatError(f"{place_of(path)} holds {held}; it must hold X and t")
        x, t = (_numbers(arrays[name], f"{place_of(path)}: {name}") for name in ("X", "t"))
        t = np.atleast_2d(t)
    if x.ndim == 4:
        x = x[None]
    if x.ndim != 5 or t.shape != (x.shape[0], x.shape[3]) or x.shape[3] < 2 or not x.size:
        raise SeriesFormatError(
            f"{place_of(path)}: X has shape {x.shape}, t {t.shape}; expected X [S, N, T, D] with t [T], or "
            "X [F, S, N, T, D] with t [F, T], T at least 2, nothing empty"
        )
    steps = np.diff(t)
    if not (steps > 0).all() or not np.allclose(steps, steps[:, :1], rtol=1e-3):
        raise SeriesFormatError(f"{place_of(path)}: t is not evenly spaced and rising; resample the trajectories")
    F, S = x.shape[:2]
    bounds_path, json_path = (path.with_name(path.stem + end) for end in ("_bounds.npy", "_envs.json"))
    bounds, parameters = None, None
    if bounds_path.is_file():
        with _readable(bounds_path), open(bounds_path, "rb") as stream:
            check_npz(bounds_path)
            bounds = _numbers(np.load(stream, allow_pickle=False), place_of(bounds_path))
    if json_path.is_file():
        with _readable(json_path):
            parameters = read_json(json_path)
    if bounds is not None and bounds.shape != (F, S, 1, 1, x.shape[4]):
        raise SeriesFormatError(
            f"{place_of(bounds_path)} has shape {bounds.shape}, expected {(F, S, 1, 1, x.shape[4])}"
        )
    return NpzFile(
        x=x.reshape(F * S, *x.shape[2:]),
        dt=np.repeat(steps.mean(1), S),
        family=np.repeat(np.arange(F), S),
        bounds=None if bounds is None else bounds.reshape(F * S, -1),
        parameters=parameters,
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what numpy and json answer a damaged file with into one sentence."""
    try:
        yield
    except SeriesFormatError:
        raise
    # numpy answers damage with nearly any error; an array larger than the memory is one too.
    except Exception as error:
        raise SeriesFormatError(f"{place_of(path)} cannot be read ({error}); it is damaged: write it again") from error


def _numbers(array: Any, where: str) -> Floats:
    """Return float64; anything but finite numbers and nan is an error."""
    if array.dtype.kind not in "fiu" or np.isinf(array).any():
        raise SeriesFormatError(f"{where} is {array.dtype} {array.shape}; give finite real numbers, nan where missing")
    values: Floats = array.astype(np.float64)
    return values


class NpzTrajectories(DynamicsSource):
    """Trajectories in the npz files of the JAX examples.

    Domains: ``trained`` (train and test file), ``adapt`` (support and query file), and ``for_choices``: the first
    ``choice_environments`` of the adaptation files, which ``adapt`` then lacks. The first ``val_trajectories`` of the
    test file are for choices, the others for the test. Test trajectories that start where a training trajectory of
    their environment starts, as the public generator makes them, are left out.

    Args:
        root: folder of the files.
        train: training trajectories.
        test: other trajectories of the same environments.
        adapt_support: trajectories of new environments to fit contexts to; None for none.
        adapt_query: other trajectories of the new environments.
        val_trajectories: test trajectories that are for choices instead.
        choice_environments: new environments that are for choices.
        stride: keep every stride-th sample.

    Raises:
        ValueError: a count out of range, or files that are damaged or do not agree.
    """

    kind = "field"

    def __init__(
        self,
        *,
        root: Path,
        train: str = "train.npz",
        test: str = "test.npz",
        adapt_support: str | None = None,
        adapt_query: str | None = None,
        val_trajectories: int = 4,
        choice_environments: int = 1,
        stride: int = 1,
    ) -> None:
        if (adapt_support is None) != (adapt_query is None):
            raise ValueError(f"adapt_support={adapt_support} and adapt_query={adapt_query}: give both or none")
        if min(val_trajectories, choice_environments, stride) < 1:
            raise ValueError(
                f"val_trajectories={val_trajectories}, choice_environments={choice_environments} and stride={stride} "
                "must be 1 or more"
            )
        self.root, self.val_trajectories, self.stride = root, val_trajectories, stride
        self.choice_environments = choice_environments
        self.train, self.test = _same(read_npz(root / train), read_npz(root / test), train, test)
        self.state_dim, self.num_steps = self.train.x.shape[3], len(range(0, self.train.x.shape[2], stride))
        self.default_seen: Sequence[str] = (TRAINED,)
        self.default_validation: Sequence[str] = ()
        self.default_unseen: Sequence[str] = ()
        self.support = self.query = None
        if adapt_support is not None and adapt_query is not None:
            pair = read_npz(root / adapt_support), read_npz(root / adapt_query)
            self.support, self.query = _same(*pair, adapt_support, adapt_query)
            if choice_environments >= len(self.query.x):
                raise ValueError(
                    f"choice_environments={choice_environments} of {len(self.query.x)} new ones leaves none to test"
                )
            if val_trajectories >= self.query.x.shape[1]:
                raise ValueError(
                    f"val_trajectories={val_trajectories} of {self.query.x.shape[1]} queries leaves none to test"
                )
            self.default_validation, self.default_unseen = (FOR_CHOICES,), (ADAPT,)
        self._test = self._without_leak()

    def _without_leak(self) -> Floats:
        """Test trajectories [S, N, T, D] that start at no initial condition of training."""
        starts, seen = self.test.x[:, :, None, 0], self.train.x[:, None, :, 0]  # [S, N, 1, D], [S, 1, N', D]
        fresh = ~(np.abs(starts - seen) < 1e-6).all(-1).any(-1).any(0)  # a place that leaks anywhere is left out
        if fresh.sum() <= self.val_trajectories:
            raise ValueError(
                f"{int(fresh.sum())} test trajectories start at an unseen state; more than "
                f"val_trajectories={self.val_trajectories} are needed"
            )
        return self.test.x[:, fresh]

    def families(self, seen: Sequence[str]) -> list[str]:
        """Return ``family_0`` and so on."""
        return [f"family_{i}" for i in range(int(self.train.family.max()) + 1)]

    def environments(self, domain: str, seen: Sequence[str]) -> list[str]:
        """Return names such as ``adapt-3``."""
        return [f"{domain}-{i}" for i in self._rows(domain, seen)]

    def _rows(self, domain: str, seen: Sequence[str]) -> range:
        allowed = [*self.default_seen, *self.default_validation, *self.default_unseen]
        if domain not in allowed or (domain == TRAINED) != (domain in seen):
            raise ValueError(f"domain {domain!r} cannot have this role: of {allowed}, only {TRAINED} is a seen domain")
        if domain == TRAINED:
            return range(len(self.train.x))
        assert self.query is not None
        cut = self.choice_environments
        return range(cut) if domain == FOR_CHOICES else range(cut, len(self.query.x))

    @override
    def load(self, domain: str, split: Split, seen: Sequence[str]) -> EnvironmentSet:
        rows, names = self._rows(domain, seen), self.environments(domain, seen)
        part = slice(0, self.val_trajectories) if split == "val" else slice(self.val_trajectories, None)
        if domain == TRAINED:
            x = self.train.x if split == "train" else self._test[:, part]
            file, num_support, observed = self.train, 0, self.train.x[:, :, :: self.stride]
        else:
            assert self.support is not None
            assert self.query is not None
            if split == "train":
                raise ValueError(f"domain {domain!r} is not trained on and has no train split")
            x = np.concatenate([self.support.x, self.query.x[:, part]], axis=1)[rows]
            file, num_support, observed = self.query, self.support.x.shape[1], None
        families: list[str | None] = [f"family_{file.family[i]}" for i in rows]
        dt = file.dt[rows] * self.stride
        return EnvironmentSet(x[:, :, :: self.stride], dt, names, families, num_support, 1, observed)

    @override
    def describe(self, domain: str) -> str:
        return "npz files of the user's own"


def _same(first: NpzFile, second: NpzFile, name: str, other: str) -> tuple[NpzFile, NpzFile]:
    """Return both if they hold the same environments on the same times.

    Raises:
        SeriesFormatError: they do not.
    """
    shapes = [(len(file.x), *file.x.shape[2:]) for file in (first, second)]
    if shapes[0] != shapes[1] or not np.allclose(first.dt, second.dt):
        raise SeriesFormatError(
            f"{name} and {other} differ in (environments, samples, states), {shapes[0]} and {shapes[1]}, or in times"
        )
    if first.parameters is not None and second.parameters is not None and first.parameters != second.parameters:
        raise SeriesFormatError(f"{name} and {other} were made with different parameters; they must be one set")
    return first, second
