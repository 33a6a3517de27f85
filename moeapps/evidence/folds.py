# SPDX-License-Identifier: Apache-2.0
"""Leave one domain out: as many trainings as domains, each tested on the one that it never saw.

The folds are an evidence grid like any other: its cells are kept, resumed and parted among machines as those are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moeapps.evaluation.statistics import Interval, paired_t_interval, t_interval
from moeapps.evidence.cells import CellResult
from moeapps.evidence.grid import Cell, Grid, GridError, Variant
from moeapps.evidence.reading import DATA_SEED_FLAGS, GridFile

MEAN, WORST = "mean", "worst"


@dataclass(frozen=True)
class Setting:
    """What a config says about domains and scores.

    Args:
        system: its name.
        seen: domains that are trained on, from which folds take one each.
        metric: the score.
        direction: ``max`` where larger is better, else ``min``.
    """

    system: str
    seen: tuple[str, ...]
    metric: str
    direction: Literal["max", "min"]


@dataclass(frozen=True)
class FoldRow:
    """One left-out domain, or the mean or the worst over all of them.

    Args:
        domain: its name, or `MEAN` or `WORST`.
        system: score over seeds; its interval is NaN where there is one seed.
        baseline: the same of the rival, if one was given.
        difference: system minus baseline, paired by seed.
    """

    domain: str
    system: Interval
    baseline: Interval | None = None
    difference: Interval | None = None


def fold_grid(
    setting: Setting, configs: Sequence[str], baseline: Sequence[str], seeds: Sequence[int], words: str
) -> GridFile:
    """Give the grid of all folds.

    Args:
        setting: what the configs say.
        configs: base config and overlays.
        baseline: further overlays that make the rival; none for no rival.
        seeds: of model and data.
        words: what to type to run it.

    Raises:
        GridError: fewer than two seen domains.
    """
    if len(setting.seen) < 2:
        raise GridError(
            f"{configs[0]} trains on {', '.join(setting.seen)} alone; leaving one domain out needs two seen ones"
        )
    if len({_slug(name) for name in setting.seen}) < len(setting.seen):
        raise GridError(f"domains {', '.join(setting.seen)} have names that no two files can have; rename one")
    variants = {}
    for side, overlays in (("system", configs[1:]), *((("baseline", (*configs[1:], *baseline)),) if baseline else ())):
        for domain in setting.seen:
            rest = ",".join(name for name in setting.seen if name != domain)
            flags = (f"--data.init_args.seen=[{rest}]", f"--data.init_args.unseen=[{domain}]")
            variants[f"{side}-without-{_slug(domain)}"] = Variant(tuple(overlays), flags, len(seeds))
    name = "-".join(_slug(Path(config).stem) for config in (*configs, *(("against", *baseline) if baseline else ())))
    grid = Grid(
        setting.system,
        configs[0],
        variants,
        claims=(),
        seeds=tuple((seed, seed) for seed in seeds),
        headline=tuple(variants),
        data_seed_flags=DATA_SEED_FLAGS,
        show=(f"unseen/{setting.metric}",),
    )
    results = Path("evidence")
    return GridFile(Path(f"{name}-leave-one-out.yaml"), grid, results, results / "evidence.md", words)


def fold_rows(
    setting: Setting, grid: Grid, done: Mapping[Cell, CellResult], stale: Collection[Cell] = ()
) -> list[FoldRow]:
    """Give one row per left-out domain, then the mean and the worst over domains, each seed by itself.

    Args:
        setting: what was run.
        grid: of `fold_grid`.
        done: finished cells.
        stale: those of them that were made with configs which have changed since.

    Raises:
        GridError: cells are missing or stale; the text says how many.
    """
    planned = grid.cells()
    missing = [cell.stem for cell in planned if cell not in done]
    if missing:
        raise GridError(f"{len(missing)} of {len(planned)} cells are not run ({', '.join(missing[:3])} ...)")
    old = [cell.stem for cell in planned if cell in stale]
    if old:
        raise GridError(
            f"{len(old)} of {len(planned)} cells were made with configs that have changed since "
            f"({', '.join(old[:3])} ...); the same command with --redo-stale makes them again"
        )
    scores = {
        side: {
            domain: [
                done[Cell(f"{side}-without-{_slug(domain)}", *pair)].value(f"{domain}/{setting.metric}")
                for pair in grid.seeds
            ]
            for domain in setting.seen
        }
        for side in ("system", "baseline")
        if any(name.startswith(f"{side}-without-") for name in grid.variants)
    }
    worst = min if setting.direction == "max" else max
    for table in scores.values():
        by_seed = list(zip(*table.values(), strict=True))
        table |= {MEAN: [math.fsum(row) / len(row) for row in by_seed], WORST: [worst(row) for row in by_seed]}
    return [_row(name, scores["system"][name], scores.get("baseline", {}).get(name)) for name in scores["system"]]


def fold_cells(
    setting: Setting, rows: Sequence[FoldRow], form: Callable[[Interval], str]
) -> tuple[list[str], list[list[str]]]:
    """Give head and lines of the table.

    Args:
        setting: what was run.
        rows: of `fold_rows`.
        form: how a number and its interval are written.
    """
    with_baseline = any(row.baseline is not None for row in rows)
    head = ["left out", setting.system, *(["baseline", "difference"] if with_baseline else [])]
    lines = []
    for row in rows:
        line = [row.domain, form(row.system)]
        if row.baseline is not None and row.difference is not None:
            difference = form(row.difference)
            line += [form(row.baseline), difference if difference.startswith("-") else f"+{difference}"]
        lines.append(line)
    return head, lines


def as_dict(setting: Setting, rows: Sequence[FoldRow]) -> dict[str, Any]:
    """Give plain values for JSON."""
    return {**asdict(setting), "rows": [asdict(row) for row in rows]}


def _row(domain: str, system: list[float], baseline: list[float] | None) -> FoldRow:
    if baseline is None:
        return FoldRow(domain, _interval(system))
    difference = (
        paired_t_interval(system, baseline)
        if len(system) > 1
        else Interval(system[0] - baseline[0], math.nan, math.nan, 1)
    )
    return FoldRow(domain, _interval(system), _interval(baseline), difference)


def _interval(values: list[float]) -> Interval:
    return t_interval(values) if len(values) > 1 else Interval(values[0], math.nan, math.nan, 1)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "_", name.lower()).strip("_.") or "domain"
