# SPDX-License-Identifier: Apache-2.0
"""Where series come from: .ts files, CSV files of your own, control charts by formula."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from typing_extensions import override

from moeapps.data.archives import ArchiveError, fetch_package, package_named
from moeapps.files import absent, is_clutter
from tasks.dynamics.data.readers.arff_format import read_arff
from tasks.dynamics.data.readers.csv_format import CsvFile, read_csv
from tasks.dynamics.data.readers.ts_format import SeriesFormatError, read_ts
from tasks.dynamics.data.recordings import Missing, SeriesSource, Unequal, equal_lengths
from tasks.dynamics.data.source import EnvironmentSet, Floats, Kind
from tasks.dynamics.packages import PACKAGES

log = logging.getLogger("moeapps")

TABLES = (".csv", ".tsv")
NOTES = (".md", ".rst", ".json", ".yaml", ".yml", ".html", ".pdf", ".png", ".jpg", ".py", ".ipynb")
"""Endings of what people lay beside their series."""
_SAME_STEP = 1e-3
"""Largest relative difference of the steps of two files of one domain."""
NEW_VALIDATION, NEW = "new_for_choices", "new"
"""Domains of recordings that are not trained on: for choices, and for the test."""


class TsFiles(SeriesSource):
    """Series with class labels out of a pair of .ts or .arff files: a class is a hidden family and a domain.

    Every class of ``train_file`` is a domain (trained on, or an unseen family). The series of ``test_file`` are new
    recordings: those at even places are the domain ``new_for_choices``, the others ``new``. Files without classes
    (of regression, whose targets are not used) have one domain, ``series``.

    Args:
        train_file: .ts or .arff file of the recordings to train on.
        test_file: file of new recordings.
        package: name of a pinned package that holds the files (see ``moeapps data list``); None: ``root``.
        root: folder of the files, where they are your own.
        dt: seconds between samples.
        val_steps: samples for choices.
        test_steps: samples for the test, at the end.
        unequal: what to do with series of different lengths: error, cut or mask.
        missing: what to do with missing values: error or mask.
        channels: keep every channel (None) or these.

    Raises:
        ValueError: a count below 1, dt that is not positive, an unknown package, or files that cannot be read.
    """

    def __init__(
        self,
        *,
        train_file: str,
        test_file: str,
        package: str | None = None,
        root: Path | None = None,
        dt: float = 1.0,
        val_steps: int = 10,
        test_steps: int = 30,
        unequal: Unequal = "error",
        missing: Missing = "error",
        channels: list[int] | None = None,
    ) -> None:
        super().__init__(val_steps=val_steps, test_steps=test_steps, kind="sequence")
        if not dt > 0:
            raise ValueError(f"dt={dt} is not allowed; use positive seconds between samples")
        self.package = None if package is None else package_named(package, PACKAGES)
        self.train_file, self.test_file, self.root = train_file, test_file, root
        self.dt, self.unequal, self.missing, self.channels = dt, unequal, missing, channels
        self._files: dict[str, EnvironmentSet] = {}

    def _file(self, name: str) -> EnvironmentSet:
        """Read one file, all classes together."""
        if name not in self._files:
            path = self._folder() / name
            if not path.is_file():
                raise ValueError(f"{absent(path)}; correct root or the file name")
            found = read_arff(path) if path.suffix.lower() == ".arff" else read_ts(path)
            labels = _words(found.labels or ["series"] * len(found.series), name)
            series = [s if self.channels is None else s[:, self.channels] for s in found.series]
            names = [f"{Path(name).stem}-{i}" for i in range(len(series))]
            x = equal_lengths(series, names, self.unequal, self.missing)
            self._files[name] = EnvironmentSet(x[:, None], np.full(len(x), self.dt), names, labels)
        return self._files[name]

    def _folder(self) -> Path:
        if self.package is None:
            return self.root or Path()
        try:
            return fetch_package(self.package, root=self.cache)
        except ArchiveError as error:
            raise ValueError(str(error)) from error

    @property
    def default_seen(self) -> Sequence[str]:  # type: ignore[override]
        """The classes of the training file."""
        return list(dict.fromkeys(str(f) for f in self._file(self.train_file).families))

    default_validation = (NEW_VALIDATION,)
    default_unseen = (NEW,)

    def read(self, domain: str) -> EnvironmentSet:
        """Return a class, or half of the new recordings."""
        new = domain in (NEW_VALIDATION, NEW)
        data = self._file(self.test_file if new else self.train_file)
        places = range(len(data.names))
        chosen = (
            [i for i in places if i % 2 == (domain == NEW)]
            if new
            else [i for i in places if data.families[i] == domain]
        )
        if not chosen:
            classes = ", ".join(self.default_seen)
            raise ValueError(f"unknown domain {domain!r}; allowed: {classes}, {NEW_VALIDATION}, {NEW}")
        names, families = [data.names[i] for i in chosen], [data.families[i] for i in chosen]
        return EnvironmentSet(data.x[chosen], data.dt[chosen], names, families)

    @override
    def describe(self, domain: str) -> str:
        name = Path(self.test_file if domain in (NEW_VALIDATION, NEW) else self.train_file).name
        if self.package is None:
            return f"{name}, a file of the user's own"
        return f"{name} of {self.package.name} {self.package.version} (sha256 {self.package.sha256[:12]})"


class CsvSeries(SeriesSource):
    """Series of your own: ``<root>/<domain>/<environment>.csv``, one file per environment.

    The first line names the columns. A time column (``time``, ``timestamp``, ...: seconds or dates, evenly spaced) and
    ``trajectory`` (a number or word, for several recordings of one environment) are optional; all others are channels.
    An empty cell is a missing value. docs/series_formats.md says which spellings are read. A domain that is seen counts
    as a family, for metrics only, where there are two or more of them.

    Args:
        root: folder of the domains.
        seen: domains that are trained on if the data module names none.
        validation: domains for choices if the data module names none.
        unseen: domains for the test if the data module names none.
        dt: seconds between samples where there is no time column.
        val_steps: samples for choices.
        test_steps: samples for the test, at the end.
        unequal: what to do with series of different lengths: error, cut or mask.
        missing: what to do with missing values: error or mask.
        kind: ``sequence`` for models that are given the past, ``field`` for vector fields.

    Raises:
        ValueError: no seen domain, a count below 1, or files that cannot be read.
    """

    def __init__(
        self,
        *,
        root: Path,
        seen: list[str],
        validation: list[str] | None = None,
        unseen: list[str] | None = None,
        dt: float = 1.0,
        val_steps: int = 10,
        test_steps: int = 30,
        unequal: Unequal = "error",
        missing: Missing = "error",
        kind: Kind = "sequence",
    ) -> None:
        super().__init__(val_steps=val_steps, test_steps=test_steps, kind=kind)
        if not seen or not dt > 0:
            raise ValueError(f"seen={seen} must name a domain and dt={dt} must be positive seconds")
        self.root, self.dt, self.unequal, self.missing = root, dt, unequal, missing
        self._channels: tuple[str, tuple[str, ...]] | None = None
        self.default_seen, self.default_validation, self.default_unseen = seen, validation or [], unseen or []

    @override
    def read(self, domain: str) -> EnvironmentSet:
        folder = self.root / domain
        paths = table_files(folder, domain)
        files = [read_csv(path, self.dt) for path in paths]
        first = files[0]
        for path, file in zip(paths, files, strict=True):
            if file.channels != first.channels:
                raise SeriesFormatError(f"{path} has channels {file.channels}, {paths[0].name} {first.channels}")
            if len(file.series) != len(first.series):
                raise SeriesFormatError(
                    f"{path} has {len(file.series)} trajectories, {paths[0].name} {len(first.series)}; give all as many"
                )
        series = [s for file in files for s in file.series]
        names = [f"{path.name}, trajectory {n}" for path in paths for n in range(len(files[0].series))]
        whole = equal_lengths(series, names, self.unequal, self.missing)
        steps = [file.dt for file in files]
        if not np.allclose(steps, steps[0], rtol=_SAME_STEP, atol=0):
            raise SeriesFormatError(
                f"files of {folder} have steps of {min(steps):.6g} to {max(steps):.6g} seconds; a domain needs one"
            )
        self._compare(domain, files)
        x = whole.reshape(len(files), -1, *whole.shape[1:])
        family = domain if domain in self.default_seen and len(self.default_seen) > 1 else None
        dt = np.full(len(files), first.dt)
        return EnvironmentSet(x, dt, [path.stem for path in paths], [family] * len(files))

    def _compare(self, domain: str, files: list[CsvFile]) -> None:
        """Say what was read, and that all domains have the same channels."""
        channels = files[0].channels
        clock = "no time column" if files[0].time is None else f"time column {files[0].time!r}"
        log.info(
            "domain %s: %d files of %d series, channels %s, %s, a step of %.6g s",
            *(domain, len(files), len(files[0].series), ", ".join(channels), clock, files[0].dt),
        )
        self._channels = self._channels or (domain, channels)
        if channels != self._channels[1]:
            raise SeriesFormatError(
                f"domain {domain!r} has channels {channels}, {self._channels[0]!r} {self._channels[1]}; give all "
                "domains the same columns in the same order"
            )

    @override
    def describe(self, domain: str) -> str:
        return f"CSV files of the user's own, {len(self.recordings(domain).names)} environments"


def table_files(folder: Path, domain: str) -> list[Path]:
    """Find the tables of a domain, one per environment.

    Hidden files and notes are left out; anything else that is not read is an error, so that none is lost in silence.

    Raises:
        SeriesFormatError: no table, another file or folder, or two tables of one name.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if is_clutter(path):
            continue
        if path.is_dir() or path.suffix.lower() not in (*TABLES, *NOTES):
            raise SeriesFormatError(
                f"domain {domain!r}: {path} is not read; lay one {' or '.join(TABLES)} file per environment into "
                f"{folder}, and nothing else but notes"
            )
        if path.suffix.lower() in TABLES:
            found.append(path)
    if not found:
        raise SeriesFormatError(f"domain {domain!r}: {absent(folder / '*.csv')}; lay one file per environment there")
    twice = [path for path in found if sum(other.stem == path.stem for other in found) > 1]
    if twice:
        raise SeriesFormatError(f"domain {domain!r}: {twice[0].name} and {twice[1].name} have one name; rename one")
    return found


class SyntheticControl(SeriesSource):
    """Six classes of control charts by the formulas of Alcock and Manolopoulos (1999); one series is one environment.

    y_t = 30 + 2 r_t, r ~ U(-3, 3); cyclic: + a sin(2 pi t / P), a and P ~ U(10, 15); increasing and decreasing: +- g t,
    g ~ U(0.2, 0.5); upward and downward shift: +- s from t3 on, s ~ U(7.5, 20), t3 ~ U(n / 3, 2 n / 3). The public
    file is in no package and is not read.

    Args:
        series: series per class to train on.
        new_series: series per class of each domain of new recordings.
        num_samples: n, 60 in the public set.
        val_steps: samples for choices.
        test_steps: samples for the test, at the end.
        data_seed: seed of all draws.

    Raises:
        ValueError: a count below 1.
    """

    default_seen = ("normal", "cyclic", "increasing", "decreasing", "upward_shift", "downward_shift")
    default_validation = (NEW_VALIDATION,)
    default_unseen = (NEW,)

    def __init__(
        self,
        *,
        series: int = 100,
        new_series: int = 10,
        num_samples: int = 60,
        val_steps: int = 5,
        test_steps: int = 15,
        data_seed: int = 0,
    ) -> None:
        super().__init__(val_steps=val_steps, test_steps=test_steps, kind="sequence")
        if series < 1 or new_series < 1:
            raise ValueError(f"series={series} and new_series={new_series} must be 1 or more")
        self.series, self.new_series, self.num_samples, self.data_seed = series, new_series, num_samples, data_seed

    def read(self, domain: str) -> EnvironmentSet:
        """Draw one class, or new series of all classes."""
        domains = [*self.default_seen, NEW_VALIDATION, NEW]
        if domain not in domains:
            raise ValueError(f"unknown domain {domain!r}; allowed: {', '.join(domains)}")
        rng = np.random.default_rng([self.data_seed, domains.index(domain)])
        classes = [domain] if domain in self.default_seen else list(self.default_seen)
        count = self.series if domain in self.default_seen else self.new_series
        x = np.concatenate([control_charts(name, count, self.num_samples, rng) for name in classes])
        families = [name for name in classes for _ in range(count)]
        names = [f"{f}-{domain}-{i}" for i, f in enumerate(families)]
        return EnvironmentSet(x[:, None, :, None], np.ones(len(x)), names, families)

    @override
    def describe(self, domain: str) -> str:
        return f"control charts by formula, data_seed {self.data_seed}"


def control_charts(name: str, count: int, num_samples: int, rng: np.random.Generator) -> Floats:
    """Draw ``count`` control charts of one class: [count, num_samples].

    Raises:
        ValueError: unknown class.
    """
    if name not in SyntheticControl.default_seen:
        raise ValueError(f"class {name!r} is unknown; use one of {', '.join(SyntheticControl.default_seen)}")
    t = np.arange(1, num_samples + 1)
    y = 30 + 2 * rng.uniform(-3, 3, (count, num_samples))
    if name == "cyclic":
        y += rng.uniform(10, 15, (count, 1)) * np.sin(2 * np.pi * t / rng.uniform(10, 15, (count, 1)))
    sign = -1 if name in ("decreasing", "downward_shift") else 1
    if name in ("increasing", "decreasing"):
        y += sign * rng.uniform(0.2, 0.5, (count, 1)) * t
    if name in ("upward_shift", "downward_shift"):
        start = rng.uniform(num_samples / 3, 2 * num_samples / 3, (count, 1))
        y += sign * rng.uniform(7.5, 20, (count, 1)) * (t >= start)
    return y


def _words(labels: Sequence[str], file: str) -> list[str]:
    """Labels as names of domains.

    Raises:
        SeriesFormatError: two classes would have one name.
    """
    words = {label: _word(label) for label in dict.fromkeys(labels)}
    label_of = {word: label for label, word in words.items()}
    for label, word in words.items():
        if label_of[word] != label:
            raise SeriesFormatError(
                f"{file}: classes {label!r} and {label_of[word]!r} would both be the domain {word!r}; rename one"
            )
    return [words[label] for label in labels]


def _word(label: str) -> str:
    """``Standing`` -> ``standing``, ``1`` -> ``class_1``, ``-1`` -> ``class_minus_1``."""
    word = re.sub(r"\W+", "_", label.lower()).strip("_")
    sign = "minus_" if re.match(r"-[\d.]", label) else ""
    return word if word[:1].isalpha() and word not in (NEW, NEW_VALIDATION) else f"class_{sign}{word}"
