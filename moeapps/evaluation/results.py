# SPDX-License-Identifier: Apache-2.0
"""Read the results of a run's test: metrics/test.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from yaml import YAMLError

from moeapps.bounds import read_json, read_yaml
from moeapps.training.folders import newest_version
from moeapps.training.run import seeds_of, variant_hash

_ROLES = ("seen", "validation", "unseen")
Direction = Literal["max", "min"]


@dataclass(frozen=True)
class RunResults:
    """The test of one run.

    Args:
        path: the run folder.
        header: config hash, commit, seed, versions, sources, parameters ... as written.
        roles: domain -> role, in the order of the file.
        values: metric -> domain -> value (NaN where the file says null).
        counts: domain -> number of test items.
        directions: metric -> ``max`` (larger is better) or ``min``.
        units: metric -> domain -> values per test unit, where the task gives them.
        parts: metric -> domain -> [U, G, 3], what each test unit adds to the score (see `moeapps.evaluation.units`).
        config: the run's config.yaml where it lies beside; empty where not.
    """

    path: Path
    header: dict[str, Any]
    roles: dict[str, str]
    values: dict[str, dict[str, float]]
    counts: dict[str, int]
    directions: dict[str, Direction]
    units: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """``system/name``: what people call it."""
        return f"{self.header.get('system') or '?'}/{self.header.get('name') or '?'}"

    @property
    def identity(self) -> str:
        """Identity of what was run, without seeds: the hash in the header, else of the config, else the label."""
        known = self.header.get("variant_hash")
        return str(known) if known else variant_hash(self.config) if self.config else self.label

    @property
    def seeds(self) -> dict[str, int]:
        """All seeds of the run by their keys; only ``seed_everything`` where the file says no more."""
        known = self.header.get("seeds")
        if known is None and self.config:
            known = seeds_of({key: self.config.get(key) for key in ("seed_everything", "model", "data")})
        if known is None:
            known = {} if self.seed is None else {"seed_everything": self.seed}
        return dict(known)

    @property
    def data_seeds(self) -> dict[str, int]:
        """The seeds that other test data would come from; the order of training rows is none of them."""
        return {k: v for k, v in self.seeds.items() if k.startswith("data.") and k != "data.init_args.seed"}

    @property
    def continued_from(self) -> Path | None:
        """The run folder that this training continued, None for a training from the start."""
        found = self.header.get("continued_from", self.config.get("ckpt_path"))
        return continued_folder(str(found), self.path) if found else None

    @property
    def trained_before(self) -> list[Path]:
        """The run folders that this training went on from, the nearest first, as far as they are there to tell."""
        found: list[Path] = []
        before = self.continued_from
        while before is not None and before not in (*found, self.path.resolve()):
            found.append(before)
            before = _continued_by(before)
        return found

    @property
    def seed(self) -> int | None:
        """The seed of the run, None where the file does not say."""
        seed = self.header.get("seed")
        return seed if isinstance(seed, int) else None


def read_results(path: Path, stage: str = "test") -> RunResults:
    """Read metrics/<stage>.json of a run folder.

    Args:
        path: the run folder, runs/<system>/<name> for its newest version, or the file itself.
        stage: ``test`` or ``val``.

    Raises:
        ValueError: there is no such file, or it is not a results file.
    """
    file = path if path.suffix == ".json" else newest_version(path) / "metrics" / f"{stage}.json"
    folder = path.parent.parent if path.suffix == ".json" else file.parents[1]
    if not file.is_file():
        names = sorted({str(inside.parents[2]) for inside in path.glob(f"*/*/metrics/{stage}.json")})
        if names:
            raise ValueError(f"{path} is the folder of a system; give its runs: {' '.join(names)}")
        if not path.exists():
            raise ValueError(
                f"there is no run {path}; train and test it first: lightning fit --config FILE --name NAME"
            )
        raise ValueError(f"{folder} has no metrics/{stage}.json; make it with: moeapps test --run {folder}")
    try:
        raw = read_json(file)
        _check(raw)
        values: dict[str, dict[str, float]] = {}
        for row in raw["rows"]:
            value = math.nan if row["value"] is None else float(row["value"])
            values.setdefault(row["metric"], {})[row["domain"]] = value
        return RunResults(
            folder,
            raw["header"],
            {row["domain"]: row["role"] for row in raw["rows"]},
            values,
            {row["domain"]: int(row["n"]) for row in raw["rows"]},
            {row["metric"]: row["direction"] for row in raw["rows"]},
            _by_metric(raw.get("units", {}), lambda numbers: [math.nan if x is None else float(x) for x in numbers]),
            _by_metric(raw.get("parts", {}), lambda rows_of_units: rows_of_units),
            _config_beside(folder),
        )
    # What is no results file lacks keys or has other kinds of values; YAML is of the config beside it.
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, YAMLError) as error:
        raise ValueError(f"{file} is not a results file of moeapps ({error!r}); run the test again") from error


def _check(raw: Any) -> None:
    """Refuse values of other kinds than what `BaseTask` writes, before anything is computed with them.

    Raises:
        TypeError: one is of another kind; the text names it.
    """
    header, rows = raw["header"], raw["rows"]
    kinds: list[tuple[str, Any, type | tuple[type, ...]]] = [
        *(("header", header, dict), ("rows", rows, list)),
        *((key, raw.get(key, {}), dict) for key in ("units", "parts")),
        *((f"header.{key}", header.get(key, {}), dict) for key in ("seeds", "sources") if header.get(key) is not None),
        *((f"header.{key}", header.get(key, ""), str) for key in ("system", "name") if header.get(key) is not None),
        *((f"header.seeds.{key}", seed, int) for key, seed in dict(header.get("seeds") or {}).items()),
        *((f"{key}.{name}", table, dict) for key in ("units", "parts") for name, table in raw.get(key, {}).items()),
    ]
    for row in rows:
        kinds += [(key, row[key], str) for key in ("domain", "metric", "role", "direction")]
        kinds += [("value", row["value"], (int, float, type(None))), ("n", row["n"], (int, float))]
        if row["role"] not in _ROLES or row["direction"] not in ("max", "min"):
            raise TypeError(f"role {row['role']!r:.80}, direction {row['direction']!r:.80}")
    for name, value, kind in kinds:
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r:.80}")


def continued_folder(checkpoint: str, folder: Path) -> Path:
    """Return the run folder of a checkpoint that a run went on from.

    Args:
        checkpoint: as the run tells it: where it lay then, in early versions relative to the working directory.
        folder: of the run. Runs are moved together: what lay below one folder with it does so still.
    """
    run, here = Path(checkpoint).parent.parent, folder.resolve()
    if not run.parts:
        return Path(checkpoint).resolve().parent.parent
    near = (here, *here.parents)
    # The last levels are <system>/<name>/version_k: with fewer of them, other runs would be found.
    tails = [Path(*run.parts[first:]) for first in range(1, len(run.parts) - 2)]
    places = [*(above / run for above in near), run, *(above / tail for tail in tails for above in near)]
    return next((place for place in places if place.is_dir()), run).resolve()


def _continued_by(folder: Path) -> Path | None:
    """The run folder that an earlier training continued; None where it began anew, or does not say."""
    try:
        file = folder / "run.json"
        about = read_json(file) if file.is_file() else {}
        found = about["continued_from"] if "continued_from" in about else _config_beside(folder).get("ckpt_path")
    except (OSError, ValueError, TypeError, KeyError, YAMLError):  # a damaged run that is not itself compared
        return None
    return continued_folder(found, folder) if isinstance(found, str) and found else None


def _by_metric(table: dict[str, dict[str, Any]], read: Callable[[Any], Any]) -> dict[str, dict[str, Any]]:
    """Turn domain -> metric -> values into metric -> domain -> values."""
    found: dict[str, dict[str, Any]] = {}
    for domain, metrics in table.items():
        for metric, values in metrics.items():
            found.setdefault(metric, {})[domain] = read(values)
    return found


def _config_beside(folder: Path) -> dict[str, Any]:
    """The configuration of a run folder, for results written before they said what was run."""
    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    found = read_yaml(file)
    return found if isinstance(found, dict) else {}
