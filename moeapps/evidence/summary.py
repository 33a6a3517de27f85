# SPDX-License-Identifier: Apache-2.0
"""From cells to verdicts: the results file of a grid is computed here, from the grid and its cells alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moeapps.evaluation.statistics import holm, judge, paired_t_interval
from moeapps.evidence.cells import CellError, CellResult
from moeapps.evidence.grid import Cell, Claim, Grid, Pair

Results = Mapping[Cell, CellResult]
MATCH_TOLERANCE = 0.02
_RATIOS = {"flops_ratio": "flops_per_token", "train_flops_ratio": "train_flops", "params_ratio": "params_total"}
_DIGITS = 12  # Significant digits kept: beyond the rounding of different library builds nothing is lost.


def summarise(grid: Grid, results: Results, command: str = "", stale: Collection[Cell] = ()) -> dict[str, Any]:
    """Give the content of the results file.

    Args:
        grid: The grid with its claims.
        results: Finished cells; what is missing makes a claim "not tested (...)", never an error.
        command: What to type to run the grid.
        stale: Finished cells that were made with configs which have changed since.
    """
    planned = grid.cells()
    used = [results[cell] for cell in planned if cell in results]
    return {
        "system": grid.system,
        "command": command,
        "config": grid.config,
        "seeds": [list(pair) for pair in grid.seeds],
        "cells": len(used),
        "cells_planned": len(planned),
        "cpu_s": _rounded(math.fsum(result.cpu_s for result in used)),
        "machine": sorted({result.machine for result in used}),
        "commits": sorted({result.commit or "unknown" for result in used}),
        "settings_tried": grid.settings_tried,
        "choice": grid.choice,
        "missing_domains": _merged(result.missing_domains for result in used),
        "sources": _merged(result.sources for result in used),
        "claims": _corrected([_claim(grid, claim, results, stale) for claim in grid.claims]),
        "ladder": _ladder(grid, results, stale),
        "variants": {name: _variant(grid, name, results) for name in grid.variants},
    }


def _claim(grid: Grid, claim: Claim, results: Results, stale: Collection[Cell]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": claim.id,
        "kind": claim.kind,
        "rule": claim.rule + (f"({claim.margin:g})" if claim.margin else ""),
        "text": claim.text,
        "metric": claim.metric,
        "direction": claim.direction,
        "system_variant": claim.system or None,
        "baseline_variant": claim.baseline,
        "baseline_metric": claim.baseline_metric,
        "minus": list(claim.minus) if claim.minus else None,
        "match": claim.match,
        "scale": claim.scale,
        "seeds": [],
        "system": [],
        "baseline": [],
        "diff_mean": None,
        "ci95": None,
        "p": None,
        "p_holm": None,
        "flops_ratio": None,
        "train_flops_ratio": None,
        "params_ratio": None,
    }
    reason = claim.untested or _unusable(grid, claim.variants, results, claim.metric, stale)
    if not reason:
        try:
            reason = _fill(grid, claim, results, entry)
        except CellError as error:
            reason = str(error)
    if reason:
        entry["verdict"] = f"not tested ({reason})"
    return entry


def _corrected(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add what is left of every p when it is one of as many as the grid has tested (Holm)."""
    family = [claim for claim in claims if claim["p"] is not None and not claim["verdict"].startswith("not tested")]
    for claim, p in zip(family, holm([claim["p"] for claim in family]), strict=True):
        claim["p_holm"] = _rounded(p)
    return claims


def _fill(grid: Grid, claim: Claim, results: Results, entry: dict[str, Any]) -> str:
    """Complete a claim's entry from its cells; give the reason why it cannot be judged, or an empty text."""
    pairs = grid.pairs(*claim.variants)[claim.skip :]
    minus = claim.minus or (None, None)
    system = _values(results, claim.system, claim.metric, pairs, minus[0])
    if claim.baseline is None:
        baseline = [float(claim.baseline_value or 0.0)] * len(pairs)
    else:
        baseline = _values(results, claim.baseline, claim.baseline_metric or claim.metric, pairs, minus[1])
        for key, name in _RATIOS.items():
            entry[key] = _ratio(results, claim.system, claim.baseline, name, pairs)
    entry |= {"seeds": [list(pair) for pair in pairs], "system": system, "baseline": baseline}
    if claim.scale == "log10":
        if min(*system, *baseline) <= 0:
            return f"{claim.metric} is not positive in every cell, so it has no logarithm"
        system, baseline = ([math.log10(value) for value in side] for side in (system, baseline))
    clusters = _clusters(pairs) if claim.clustered else None
    result = judge(system, baseline, rule=claim.rule, direction=claim.direction, margin=claim.margin, clusters=clusters)
    if clusters is not None and claim.kind == "statistical":
        entry["clusters"] = len(set(clusters))
    entry["diff_mean"] = _rounded(result.diff_mean)
    if result.interval is not None:
        entry["ci95"] = [_rounded(result.interval.low), _rounded(result.interval.high)]
    entry["p"] = None if result.p is None else _rounded(result.p)
    entry["verdict"] = result.verdict
    return _unmatched(claim, entry)


def _clusters(pairs: Sequence[Pair]) -> list[int] | None:
    """The data seed of every pair, where one has several model seeds; None where all differ."""
    found = [data_seed for _, data_seed in pairs]
    return found if len(set(found)) < len(found) else None


def _unmatched(claim: Claim, entry: Mapping[str, Any]) -> str:
    """Say why the two variants are not comparable; an empty text if they are, or need not be."""
    if claim.match == "none" or claim.baseline is None or claim.baseline == claim.system:
        return ""
    ratio = entry["train_flops_ratio" if claim.match == "flops" else "params_ratio"]
    what = "training FLOPs" if claim.match == "flops" else "parameters"
    if ratio is None:
        return f"the cells do not say their {what}"
    if abs(ratio - 1.0) > MATCH_TOLERANCE:
        return f"{what} differ by {100 * (ratio - 1.0):+.1f} per cent; at most {100 * MATCH_TOLERANCE:.0f} is fair"
    return ""


def _unusable(grid: Grid, names: Sequence[str], results: Results, metric: str, stale: Collection[Cell]) -> str:
    """Say why the cells of these variants cannot be compared; an empty text if they can."""
    wanted = [Cell(name, *pair) for name in names for pair in grid.pairs(*names)]
    missing = [cell for cell in wanted if cell not in results]
    if missing:
        return f"{len(missing)} of {len(wanted)} cells are not run"
    found = [results[cell] for cell in wanted]
    for name in names:
        if len({result.definition for result in found if result.variant == name}) > 1:
            return f"the cells of {name} were made with different configs"
    # Cells that are all stale were made by one state of the configs, as far as anybody can tell, and do compare.
    old = [name for name in names if any(cell in stale for cell in wanted if cell.variant == name)]
    if 0 < len(old) < len(names):
        return f"the cells of {', '.join(old)} were made with configs that have changed since, others with today's"
    if len({tuple(result.domains) for result in found}) > 1:
        return "the cells were tested on different domains"
    # A domain whose metric is not a number is left out of the mean of its role: such means are not comparable.
    ending = "/" + metric.rsplit("/", 1)[-1]
    if len({tuple(sorted(key for key in result.metrics if key.endswith(ending))) for result in found}) > 1:
        return f"{ending[1:]} is not a number for some domains of some cells"
    return ""


def _values(results: Results, variant: str, metric: str, pairs: Sequence[Pair], minus: str | None) -> list[float]:
    values = [results[Cell(variant, *pair)].value(metric) for pair in pairs]
    if minus is not None:
        less = [results[Cell(minus, *pair)].value(metric) for pair in pairs]
        values = [a - b for a, b in zip(values, less, strict=True)]
    return [_rounded(value) for value in values]


def _ratio(results: Results, system: str, baseline: str, name: str, pairs: Sequence[Pair]) -> float | None:
    """Ratio of a size of the two variants, of their means over seeds; None if unknown for some cell."""
    sizes = [[getattr(results[Cell(v, *pair)], name) for pair in pairs] for v in (system, baseline)]
    if any(not size for row in sizes for size in row):
        return None
    return _rounded(math.fsum(sizes[0]) / math.fsum(sizes[1]))


def _ladder(grid: Grid, results: Results, stale: Collection[Cell]) -> dict[str, Any] | None:
    ladder = grid.ladder
    if ladder is None:
        return None
    levels = []
    for level in ladder.levels:
        names = [ladder.variant_name(level, name) for name in (ladder.system, ladder.baseline)]
        entry: dict[str, Any] = {"level": level, "system": [], "baseline": [], "diff_mean": None, "ci95": None}
        reason = _unusable(grid, names, results, ladder.metric, stale)
        if reason:
            entry["note"] = f"not tested ({reason})"
        else:
            pairs = grid.pairs(*names)[: ladder.pairs]
            system, baseline = (_values(results, name, ladder.metric, pairs, None) for name in names)
            entry |= {"system": system, "baseline": baseline}
            if len(pairs) > 1:
                interval = paired_t_interval(system, baseline, clusters=_clusters(pairs))
                entry |= {
                    "diff_mean": _rounded(interval.mean),
                    "ci95": [_rounded(interval.low), _rounded(interval.high)],
                }
        levels.append(entry)
    return {
        "text": ladder.text,
        "metric": ladder.metric,
        "direction": ladder.direction,
        "system_variant": ladder.system,
        "baseline_variant": ladder.baseline,
        "levels": levels,
    }


def _variant(grid: Grid, name: str, results: Results) -> dict[str, Any]:
    """Sizes and the shown metrics of one variant, over those of the grid's shared pairs that it has run."""
    done = [pair for pair in grid.pairs(name) if Cell(name, *pair) in results]
    found = [results[Cell(name, *pair)] for pair in done if pair in grid.shared_pairs]
    entry: dict[str, Any] = {"cells": len(done), "cells_planned": len(grid.pairs(name)), "averaged": len(found)}
    for size in ("params_total", "params_active", "flops_per_token", "train_flops"):
        sizes = [getattr(result, size) for result in found]
        known = bool(sizes) and all(value is not None for value in sizes)
        entry[size] = _rounded(math.fsum(sizes) / len(sizes)) if known else None
    entry["mean"] = {
        metric: _rounded(math.fsum(result.value(metric) for result in found) / len(found))
        for metric in grid.show
        if found and all(result.has(metric) for result in found)
    }
    return entry


def _merged(parts: Any) -> dict[str, str]:
    merged: dict[str, str] = {}
    for part in parts:
        merged.update(part)
    return dict(sorted(merged.items()))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
