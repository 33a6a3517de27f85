# SPDX-License-Identifier: Apache-2.0
"""Series as environments: one recording is one environment, its end is held out.

S series, N recordings per environment, T samples, D channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from typing_extensions import override

from moeapps.data.domain import Split
from tasks.dynamics.data.readers.ts_format import SeriesFormatError
from tasks.dynamics.data.source import DynamicsSource, EnvironmentSet, Floats, Kind

Unequal = Literal["error", "cut", "mask"]
Missing = Literal["error", "mask"]

_ROUNDING = 1e-12
"""A channel whose values differ by less, relative to the largest, is constant."""


class SeriesSource(DynamicsSource):
    """Recordings whose last samples are held out: first for choices, the very last for the test.

    Of T samples the first T - val_steps - test_steps are trained on, or are the support that a new recording's context
    is fitted to. ``val`` continues them by val_steps; ``test`` starts after those and continues to the end. All
    channels are centred and divided by their standard deviation in the training part of the seen domains.

    A model of kind ``sequence`` is given all samples before the part that is scored, one of kind ``field`` the last.

    Args:
        val_steps: samples for choices, at least 1.
        test_steps: samples for the test, at least 1.
        kind: ``sequence`` or ``field``.

    Raises:
        ValueError: a count below 1.
    """

    kind: Kind

    def __init__(self, *, val_steps: int, test_steps: int, kind: Kind) -> None:
        if val_steps < 1 or test_steps < 1:
            raise ValueError(f"val_steps={val_steps} and test_steps={test_steps} must be 1 or more")
        self.val_steps, self.test_steps, self.kind = val_steps, test_steps, kind
        self._read: dict[str, EnvironmentSet] = {}

    # What a subclass provides -------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, domain: str) -> EnvironmentSet:
        """Read one domain: one environment per recording, nan where a value is missing.

        Raises:
            ValueError: unknown domain, or damaged files.
        """

    # Facts --------------------------------------------------------------------------------------------------------

    def recordings(self, domain: str) -> EnvironmentSet:
        """Return one domain, read once and checked."""
        if domain not in self._read:
            data = self.read(domain)
            if data.x.shape[2] - self.val_steps - self.test_steps < 2:
                raise SeriesFormatError(
                    f"domain {domain!r} has series of {data.x.shape[2]} samples; val_steps={self.val_steps} and "
                    f"test_steps={self.test_steps} leave fewer than 2 for training"
                )
            counts = np.isfinite(data.x[:, :, : self._train_steps(data)]).all(axis=3).sum(axis=2)  # [S, N]
            if counts.min() < 2:
                raise SeriesFormatError(
                    f"recording {data.names[int(counts.min(axis=1).argmin())]!r} of domain {domain!r} has fewer than 2 "
                    "samples in its training part; leave it out, or set unequal: cut"
                )
            self._read[domain] = data
        return self._read[domain]

    @property
    @override
    def state_dim(self) -> int:  # type: ignore[override]
        return int(self.recordings(self.default_seen[0]).x.shape[3])

    @property
    @override
    def num_steps(self) -> int:  # type: ignore[override]
        return self._train_steps(self.recordings(self.default_seen[0]))

    def families(self, seen: Sequence[str]) -> list[str]:
        """Return the families of the seen domains, then the others'."""
        others = [d for d in (*self.default_seen, *self.default_validation, *self.default_unseen) if d not in seen]
        found = [f for domain in (*seen, *others) for f in self.recordings(domain).families if f is not None]
        return list(dict.fromkeys(found))

    def environments(self, domain: str, seen: Sequence[str]) -> list[str]:
        """Return the names of the recordings."""
        return list(self.recordings(domain).names)

    def _train_steps(self, data: EnvironmentSet) -> int:
        length: int = data.x.shape[2]
        return length - self.val_steps - self.test_steps

    # Splits -------------------------------------------------------------------------------------------------------

    def load(self, domain: str, split: Split, seen: Sequence[str]) -> EnvironmentSet:
        """Return the recordings of a domain, cut for one split and standardised."""
        data = self.recordings(domain)
        mean, deviation = self._standard(seen)
        x, train = (data.x - mean) / deviation, self._train_steps(data)
        if split == "train":
            if domain not in seen:
                raise ValueError(f"domain {domain!r} is not trained on and has no train split")
            return replace(data, x=x[:, :, :train])
        known = train if split == "val" else train + self.val_steps
        end = train + self.val_steps if split == "val" else x.shape[2]
        query, given = (x[:, :, :end], known) if self.kind == "sequence" else (x[:, :, known - 1 : end], 1)
        if domain in seen:
            return replace(data, x=query, num_given=given, observed=x[:, :, :train])
        length = max(query.shape[2], known)
        both = np.concatenate([_padded(x[:, :, :known], length), _padded(query, length)], axis=1)
        return replace(data, x=both, num_support=x.shape[1], num_given=given)

    def _standard(self, seen: Sequence[str]) -> tuple[Floats, Floats]:
        """Mean and standard deviation [D] of the training part of the seen domains; 1 for a constant channel."""
        parts = [self.recordings(domain) for domain in seen]
        values = np.concatenate([p.x[:, :, : self._train_steps(p)].reshape(-1, p.x.shape[3]) for p in parts])
        # The deviation of a constant is not 0 but a rounding error, which nothing may be divided by.
        span, largest = np.nanmax(values, axis=0) - np.nanmin(values, axis=0), np.nanmax(np.abs(values), axis=0)
        constant = span <= _ROUNDING * largest
        return np.nanmean(values, axis=0), np.where(constant, 1.0, np.nanstd(values, axis=0))


def _padded(x: Floats, length: int) -> Floats:
    """Lengthen [S, N, T, D] to ``length`` samples with missing ones."""
    return np.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)), constant_values=np.nan)


def equal_lengths(series: Sequence[Floats], names: Sequence[str], unequal: Unequal, missing: Missing) -> Floats:
    """Stack series of [T, D] to [S, T, D].

    Args:
        series: S arrays.
        names: what they are called in messages.
        unequal: what to do where T differs: error; cut all to the shortest; mask: lengthen to the longest with nan.
        missing: what to do with missing values: error, or mask (the whole sample counts as missing).

    Raises:
        SeriesFormatError: lengths differ or a value is missing, and that is an error here.
    """
    for name, values in zip(names, series, strict=True):
        gaps = np.flatnonzero(np.isnan(values).any(axis=1))
        if len(gaps) and missing == "error":
            raise SeriesFormatError(
                f"{name} misses a value at sample {gaps[0]} ({len(gaps)} samples in all); set missing: mask to leave "
                "such samples out"
            )
    lengths = [len(values) for values in series]
    if len(set(lengths)) > 1 and unequal == "error":
        short, long = names[int(np.argmin(lengths))], names[int(np.argmax(lengths))]
        raise SeriesFormatError(
            f"series differ in length: {short} has {min(lengths)} samples, {long} {max(lengths)}; set unequal: cut (to "
            "the shortest) or unequal: mask (missing samples at the end)"
        )
    if unequal == "cut":
        return np.stack([values[: min(lengths)] for values in series])
    length = max(lengths)
    return np.stack([np.pad(v, ((0, length - len(v)), (0, 0)), constant_values=np.nan) for v in series])
