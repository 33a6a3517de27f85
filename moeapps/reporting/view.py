# SPDX-License-Identifier: Apache-2.0
"""What a report page tells of each run and system, read from the files of run folders; nothing of a run is imported."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from yaml import YAMLError

from moeapps.bounds import read_json, read_text, read_yaml
from moeapps.commands.listing import systems
from moeapps.evaluation.results import RunResults, read_results
from moeapps.evaluation.xeval import Matrix, build_matrix
from moeapps.reporting.curves import Curves, read_curves
from moeapps.reporting.exhibits import Room
from moeapps.reporting.findings import RunFinding, describe_run, gallery_of, untold_gallery
from moeapps.text import plain
from moeapps.training.folders import newest_version

Read = TypeVar("Read")
UNREADABLE = (ValueError, OSError, KeyError, TypeError, IndexError, AttributeError, YAMLError, OverflowError)
"""What a file that is not what a run writes makes its reader raise."""
LARGEST_CONFIG = 400_000
LOSS = "what the training makes small, without its auxiliary losses"
"""What a loss is where the task's gallery does not say it."""
LONGEST_TITLE = 40
"""Characters of a published name; what is longer is a sentence with a colon."""


@dataclass
class RunView:
    """One run.

    Args:
        number: its place on the page.
        folder: of the run.
        system: its name.
        about: the first comment line of its base config: the published name, a colon, and what the system is.
        name: of the run.
        seed: of the run, None where no file says.
        results: of its test; None where there are none.
        finding: what its experts did; None without a test.
        curves: of its training.
        rooms: its gallery.
        facts: name and value of what it is and what it cost.
        sources: domain, role and where its data are from, with licences.
        config: config.yaml as text, empty where there is none.
        notes: what is missing or could not be read, a line each.
        metrics: name of a score -> what it is, as ``METRICS`` of the task's gallery has it.
    """

    number: int
    folder: Path
    system: str = "unknown"
    about: str = ""
    name: str = "?"
    seed: int | None = None
    results: RunResults | None = None
    finding: RunFinding | None = None
    curves: Curves = field(default_factory=Curves)
    rooms: list[Room] = field(default_factory=list)
    facts: list[tuple[str, str | float]] = field(default_factory=list)
    sources: list[tuple[str, str, str]] = field(default_factory=list)
    config: str = ""
    notes: list[str] = field(default_factory=list)
    metrics: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What people call it."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.name}{seed}"

    def tell(self, what: str, error: BaseException) -> None:
        """Note what could not be read."""
        self.notes.append(f"{what}: {plain(' '.join(str(error).split()), 400)}")

    def read(self, what: str, reader: Callable[[], Read], otherwise: Read) -> Read:
        """Read something, or note why it is left out."""
        try:
            return reader()
        except UNREADABLE as error:
            self.tell(f"{what} left out", error)
            return otherwise


@dataclass
class SystemView:
    """The runs of one system side by side.

    Args:
        name: of the system.
        runs: of it, in the order given.
        matrix: of the tested ones; None where there is none.
        notes: on the comparison.
    """

    name: str
    runs: list[RunView]
    matrix: Matrix | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What people call it: the published name where its config begins with one, else that of its folder."""
        name, colon, _ = self._comment.partition(": ")
        return name if colon and len(name) <= LONGEST_TITLE else self.name

    @property
    def about(self) -> str:
        """What it is, in a line; empty where its config does not say."""
        return self._comment.removeprefix(f"{self.title}: ")

    @property
    def meaning(self) -> str:
        """What the score is that the runs are compared by; empty where no gallery says it."""
        name = "" if self.matrix is None else self.matrix.metric
        told = (run.metrics[name] for run in self.runs if name in run.metrics)
        return next(told, LOSS if name == "loss" else "")

    @property
    def _comment(self) -> str:
        return next((run.about for run in self.runs if run.about), "").rstrip(".")


def read_run(path: Path, number: int = 0, packages: frozenset[str] | None = None) -> RunView:
    """Read one run folder, finished or not.

    Args:
        path: the run folder, or runs/<system>/<name> for its newest version.
        number: its place on the page.
        packages: of the user's own, whose galleries are imported; None: none, and a note says which there are.

    Raises:
        ValueError: no such folder, or a folder that is not of a run.
    """
    if not path.is_dir():
        raise ValueError(f"there is no run folder {path}; give runs/SYSTEM/NAME or one of its versions")
    folder = newest_version(path)
    if not any((folder / name).is_file() for name in ("config.yaml", "run.json", "metrics/test.json")):
        raise ValueError(
            f"{path} is not a run folder: it has no config.yaml, run.json or metrics/test.json; give runs/SYSTEM/NAME"
        )
    view = RunView(number, folder)
    nothing: dict[str, Any] = {}
    config = view.read("config.yaml", lambda: _config(view), nothing)
    about = view.read("run.json", lambda: _json_of(folder / "run.json"), nothing)
    if (folder / "metrics" / "test.json").is_file():
        view.results = view.read("results", lambda: read_results(folder / "metrics" / "test.json"), None)
    else:
        view.notes.append(
            "This run has no test results (interrupted, or not tested yet): go on with moeapps fit --run FOLDER, or "
            "test it with moeapps test --run FOLDER."
        )
    header = {**about, **({} if view.results is None else view.results.header)}
    view.system = str(header.get("system") or config.get("system") or "unknown")
    view.name = str(header.get("name") or config.get("name") or folder.parent.name)
    view.about = str(header.get("about") or packaged_comment(view.system))
    seed = header.get("seed", config.get("seed_everything"))
    view.seed = seed if isinstance(seed, int) else None
    view.facts = facts_of(header)
    view.sources = view.read("sources", lambda: _sources(view), [])
    metric = str(header.get("main_metric") or "loss")
    view.curves = view.read("training curves", lambda: read_curves(folder, metric), Curves())
    if view.results is not None:
        view.finding = view.read("experts", lambda: describe_run(folder, packages=packages or frozenset()), None)
        view.notes += [] if view.finding is None else view.finding.notes
        view.rooms = view.read("samples", lambda: _rooms(folder, packages or frozenset()), [])
        view.metrics = view.read("what scores are", lambda: _metrics(folder, packages or frozenset()), {})
        own = untold_gallery(folder)
        if packages is None and own is not None and gallery_of(folder) is None:
            view.notes.append(f"{own} has a gallery of its own for this run: moeapps report --trust {own} imports it.")
        failed = header.get("failed_reports")
        if isinstance(failed, dict):
            view.notes += [f"{name} failed in its test: {what}" for name, what in failed.items()]
    return view


def group(views: Sequence[RunView]) -> list[SystemView]:
    """Put runs of one system side by side, systems in order of appearance."""
    systems: dict[str, SystemView] = {}
    for view in views:
        systems.setdefault(view.system, SystemView(view.system, [])).runs.append(view)
    for system in systems.values():
        tested = [view.results for view in system.runs if view.results is not None]
        if tested:
            system.matrix = _matrix(system, tested)
    return list(systems.values())


def _matrix(system: SystemView, tested: list[RunResults]) -> Matrix | None:
    """The matrix of all tested runs; where they do not compare, that of the first, and why."""
    for runs in (tested, tested[:1]):
        try:
            matrix = build_matrix(runs)
        except UNREADABLE as error:
            system.notes.append(f"{len(runs)} runs are not compared: {plain(error, 400)}")
        else:
            system.notes += matrix.notes
            return matrix
    return None


def packaged_comment(system: str) -> str:
    """The first comment line of the config of a system at hand, for runs whose run.json has none; empty without one."""
    return next((one.summary for one in systems() if one.name == system), "")


# --- parts of a run ---------------------------------------------------------------------------------------------------


def _json_of(file: Path) -> dict[str, Any]:
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no names and values")
    return found


def _config(view: RunView) -> dict[str, Any]:
    file = view.folder / "config.yaml"
    if not file.is_file():
        return {}
    view.config = read_text(file, LARGEST_CONFIG)
    found = read_yaml(file)
    return found if isinstance(found, dict) else {}


def _rooms(folder: Path, packages: frozenset[str]) -> list[Room]:
    gallery = gallery_of(folder, packages)
    rooms: list[Room] = [] if gallery is None or not hasattr(gallery, "gallery") else gallery.gallery(folder)
    return [room for room in rooms if room.exhibits]


def _metrics(folder: Path, packages: frozenset[str]) -> dict[str, str]:
    gallery = gallery_of(folder, packages)
    return {str(name): str(told) for name, told in getattr(gallery, "METRICS", {}).items()}


def _sources(view: RunView) -> list[tuple[str, str, str]]:
    if view.results is None:
        return []
    told = view.results.header.get("sources") or {}
    rows = [(name, role, str(told.get(name, "not said"))) for name, role in view.results.roles.items()]
    missing = view.results.header.get("missing_domains") or {}
    return rows + [(str(name), "left out", str(why)) for name, why in missing.items()]


FACTS = {
    "params_total": "parameters",
    "params_active": "parameters that work on one token",
    "flops_per_token": "FLOPs for one token",
    "train_flops": "FLOPs of the training",
    "train_steps": "training steps",
    "fit_seconds": "seconds of training, validations included",
    "fit_cpu_seconds": "processor seconds of training",
    "epoch": "epoch that training had come to",
    "global_step": "step that training had come to",
    "tested_step": "step of the tested weights",
    "config_hash": "hash of the configuration",
    "variant_hash": "the same, seeds left out",
    "commit": "commit of the code",
    "continued_from": "continued from",
}


def facts_of(header: dict[str, Any]) -> list[tuple[str, str | float]]:
    """Return name and value of what a results file says about size, cost and origin of a run, in one order."""
    found: list[tuple[str, str | float]] = []
    for key, name in FACTS.items():
        value = header.get(key)
        if isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value)):
            found.append((name, value))
    for key, name in (("machine", "machine"), ("versions", "versions"), ("seeds", "seeds")):
        value = header.get(key)
        if isinstance(value, dict):
            found.append((name, ", ".join(f"{what} {number}" for what, number in value.items())))
    start = header.get("started_from")
    if isinstance(start, dict):
        found.append(("started from", ", ".join(map(str, start.get("path") or []))))
    return found
