# SPDX-License-Identifier: Apache-2.0
"""How trained networks bear one change at a time: ``python -m benchmarks.point_moe_shifts RUN [RUN ...]``.

Each knob (density, dropout, masking, noise, height, beams) is turned through several levels on the test scenes of one
seen sensor. Scene i is the same scene at every level and for every run, so that differences are due to the level
alone. Scores go to a JSON file, curves to a figure: one panel per knob, one line per run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeapps.files import write_json
from moeapps.reporting.figures import save_figure
from moeapps.training.folders import newest_version
from moeapps.training.run import git_commit, machine, versions
from tasks.point_cloud.data.dataset import ScanDataset, collate_scans
from tasks.point_cloud.data.labels import label_set
from tasks.point_cloud.data.scans import ScanArrays
from tasks.point_cloud.data.shifts import Shifted
from tasks.point_cloud.datamodule import PointCloudData
from tasks.point_cloud.metrics import confusion, per_class_iou, scores
from tasks.point_cloud.module import PointCloudTask

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "point_moe_shifts.json"
FIGURE = ROOT / "docs" / "figures" / "point_moe_shifts.png"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito


class ShiftError(ValueError):
    """A run that cannot be swept."""


@dataclass(frozen=True)
class Level:
    """One setting of a knob.

    Args:
        label: tick of the figure.
        shift: options of `Shifted` that make it; empty for the unchanged scene.
    """

    label: str
    shift: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Knob:
    """One thing that is changed.

    Args:
        name: what.
        axis: what the levels say, with unit.
        base: seen domain whose test scenes are used.
        levels: in the order of the figure; exactly one is unchanged.
    """

    name: str
    axis: str
    base: str
    levels: tuple[Level, ...]


def _levels(own: str, make: Callable[[str], dict[str, Any]], *labels: str) -> tuple[Level, ...]:
    return tuple(Level(label, {} if label == own else make(label)) for label in labels)


KNOBS = (
    Knob(
        "density",
        "share of points kept",
        "drive64",
        _levels("1", lambda x: {"keep": float(x)}, "1", "0.5", "0.2", "0.1", "0.05"),
    ),
    Knob(
        "dropout",
        "share of points removed",
        "tls_office",
        _levels("0", lambda x: {"keep": 1 - float(x)}, "0", "0.7", "0.9"),
    ),
    Knob(
        "masking",
        "share of 0.8 m blocks removed",
        "tls_office",
        _levels("0", lambda x: {"mask_ratio": float(x), "mask_size": 0.8}, "0", "0.25", "0.5", "0.8"),
    ),
    Knob(
        "noise",
        "sigma per coordinate, cm",
        "tls_office",
        _levels("0", lambda x: {"noise": float(x) / 100}, "0", "1", "2", "5"),
    ),
    Knob(
        "height",
        "sensor above the road, m",
        "drive64",
        _levels("1.73", lambda x: {"sensor": {"height": float(x)}}, "1.2", "1.73", "2.5", "3.5"),
    ),
    Knob(
        "beams",
        "beams of the LiDAR",
        "drive64",
        _levels("64", lambda x: {"sensor": {"beams": float(x)}}, "64", "32", "16", "8"),
    ),
)
"""Density and dropout both thin at random, one a street and one a room; the levels of dropout and masking are those of
STAR's study of Point-MoE, as reported there. The unchanged height and beams are those of ``drive64``."""


@dataclass(frozen=True)
class Trained:
    """A network to be tested.

    Args:
        name: ``name`` of its configuration.
        folder: its run folder.
        task: with the weights of its best checkpoint.
        data: the data module of its configuration: sizes, features and seeds.
    """

    name: str
    folder: Path
    task: PointCloudTask
    data: PointCloudData


def load_run(path: Path) -> Trained:
    """Build the network of a run folder and load its best (else its last) checkpoint.

    Raises:
        ShiftError: no such run, no checkpoint, or another task.
    """
    from moeapps.commands.checkpoints import checkpoint_of
    from moeapps.commands.messages import UsageError
    from moeapps.commands.trained import build, load_weights

    folder = newest_version(path, trained=True)
    try:
        checkpoint, cli = checkpoint_of(folder), build(folder)
    except UsageError as error:
        raise ShiftError(f"{folder} is not the folder of a finished run: {error}") from error
    if not isinstance(cli.model, PointCloudTask) or not isinstance(cli.datamodule, PointCloudData):
        raise ShiftError(f"{folder} is a run of {type(cli.model).__name__}; give runs of point clouds")
    load_weights(cli.model, checkpoint)
    return Trained(str(cli.config["name"]), folder, cli.model.eval(), cli.datamodule)


def score_level(run: Trained, knob: Knob, scans: list[ScanArrays]) -> dict[str, Any]:
    """Score one run on the scans of one level, answered in the words of the knob's base.

    Returns:
        ``miou``, ``miou_all``, ``macc``, ``allacc`` at the raw points, ``points`` counted, and ``scenes``: the mIoU of
        each scene alone.
    """
    names = label_set(knob.base)
    spec = Shifted(base=knob.base)
    dataset = ScanDataset(
        scans,
        domain=knob.base,
        label_set=names,
        domain_index=run.task.domain_names.index(knob.base),
        voxel=spec.voxel,
        max_voxels=run.data.max_voxels,
        features=run.data.features,
        indoor=spec.indoor,
        voting=run.data.voting,
    )
    counts: dict[str, Tensor] = {scan.name: torch.zeros(len(names), len(names), dtype=torch.int64) for scan in scans}
    with torch.inference_mode():
        for index in range(len(dataset)):
            item = dataset[index]
            (answer,) = run.task.predict_step(collate_scans([item]))
            counts[item.name] += confusion(answer["label"], item.raw_y, len(names))
    total = torch.stack(list(counts.values())).sum(dim=0)
    return {
        **{name: float(value) for name, value in scores(total).items()},
        "points": int(total.sum()),
        "scenes": [float(per_class_iou(scene).nanmean()) for scene in counts.values()],
    }


def sweep(runs: Sequence[Trained], knobs: Sequence[Knob], scenes: int) -> dict[str, Any]:
    """Test every run on every level of every knob.

    Args:
        runs: networks that all know the bases of the knobs, trained on one data seed.
        knobs: what to change.
        scenes: test scenes per level.

    Raises:
        ShiftError: a run does not know a base, or the runs differ in their data seed.
    """
    from rich.progress import track

    for run in runs:
        unknown = sorted({knob.base for knob in knobs} - set(run.task.domain_names))
        if unknown:
            raise ShiftError(f"{run.folder} does not know {', '.join(unknown)}; leave out their knobs with --knobs")
    seeds = {run.data.data_seed for run in runs}
    if len(seeds) != 1:
        raise ShiftError(f"the runs were trained on the data seeds {sorted(seeds)}; compare runs of one")
    (data_seed,) = seeds
    work = [(knob, level) for knob in knobs for level in knob.levels]
    tables: dict[str, Any] = {run.name: {knob.name: [] for knob in knobs} for run in runs}
    for knob, level in track(work, "sweeping", transient=True):
        shifted = Shifted(base=knob.base, scenes=scenes, data_seed=data_seed, **level.shift)
        scans = shifted.scans("test", None)
        for run in runs:
            row = {"level": level.label, "shift": shifted.describe(), **score_level(run, knob, scans)}
            tables[run.name][knob.name].append(row)
    return tables


def report(runs: Sequence[Trained], knobs: Sequence[Knob], scenes: int) -> dict[str, Any]:
    """Sweep, and say what was swept with what."""
    if len({run.name for run in runs}) < len(runs):
        raise ShiftError(f"runs share a name ({', '.join(run.name for run in runs)}); give one run per name")
    tables = sweep(runs, knobs, scenes)
    about = [{"name": knob.name, "axis": knob.axis, "base": knob.base, "unchanged": _unchanged(knob)} for knob in knobs]
    header = {"scenes": scenes, "commit": git_commit(), "versions": versions(), "machine": machine()}
    known = {run.name: _known(run.folder) for run in runs}
    return {
        "command": "python -m benchmarks.point_moe_shifts",
        "header": header,
        "knobs": about,
        "runs": {name: {"run": known[name], "knobs": table} for name, table in tables.items()},
    }


def _unchanged(knob: Knob) -> str:
    return next(level.label for level in knob.levels if not level.shift)


def _known(folder: Path) -> dict[str, Any]:
    """Seed, commit and config hash of a run, from its run.json."""
    path = folder / "run.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: values.get(key) for key in ("seed", "commit", "config_hash")}


def draw(results: dict[str, Any]) -> Any:
    """Draw the curves: one panel per knob, one line per run, the unchanged level marked by a dotted line.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    knobs = results["knobs"]
    columns = min(3, len(knobs))
    rows = -(-len(knobs) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.4), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(knobs) :]:
        axis.set_axis_off()
    for axis, knob in zip(axes, knobs, strict=False):
        for colour, (name, run) in zip(COLOURS * len(results["runs"]), results["runs"].items(), strict=False):
            table = run["knobs"][knob["name"]]
            axis.plot([100 * row["miou"] for row in table], marker="o", markersize=4, color=colour, label=name)
        labels = [row["level"] for row in table]
        axis.set_xticks(range(len(labels)), labels)
        axis.axvline(labels.index(knob["unchanged"]), color="#9aa0a8", linewidth=1, linestyle=":", zorder=0)
        axis.set_title(f"{knob['name']} ({knob['base']})", fontsize=10, loc="left")
        axis.set_xlabel(knob["axis"], fontsize=9)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel("mIoU, percent", fontsize=9)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    names = [knob.name for knob in KNOBS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.point_moe_shifts", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, e.g. runs/point_moe/base")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="picture of the curves (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=10, help="test scenes per level (default: 10, as in a test)")
    parser.add_argument("--knobs", nargs="+", choices=names, default=names, help="what to change (default: all)")
    return parser


def main(args: list[str]) -> int:
    """Sweep the runs and write results and curves."""
    try:
        options = parser().parse_args(args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        runs = [load_run(path) for path in options.runs]
        results = report(runs, [knob for knob in KNOBS if knob.name in options.knobs], options.scenes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(options.out, results)
    save_figure(draw(results), options.figure)
    print(f"written: {options.out}, {options.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
