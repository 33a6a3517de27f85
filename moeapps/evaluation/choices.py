# SPDX-License-Identifier: Apache-2.0
"""What rules of choosing come to: the runs given are candidates, and each rule takes one of every seed.

Which setting is best on domains never seen depends on what a choice may look at. ``seen`` looks at the validation parts
of the domains that were trained on, ``validation`` at the domains that are kept for choices, ``oracle`` at the unseen
domains themselves: nobody may choose so, it bounds what choosing can give.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeapps.evaluation.results import RunResults, read_results
from moeapps.evaluation.statistics import Interval, t_interval
from moeapps.evaluation.variants import pair_keys, variants_of

RULES = ("seen", "validation", "oracle")
_LARGEST = 1 << 26  # bytes of a metrics.csv that are read


@dataclass(frozen=True)
class Choice:
    """What one rule came to.

    Args:
        rule: of `RULES`.
        chosen: variant -> of how many seeds.
        unseen: mean over the unseen domains of what was chosen, with its t interval over seeds (NaN where one).
        worst: the same of the worst unseen domain.
        note: why the rule cannot be followed; the rest is then empty.
    """

    rule: str
    chosen: dict[str, int]
    unseen: Interval | None
    worst: Interval | None
    note: str = ""


def choices(runs: Sequence[RunResults], metric: str, cells: Mapping[Path, Mapping[str, float]]) -> list[Choice]:
    """Follow every rule.

    Args:
        runs: candidates, two or more of some seed.
        metric: which score.
        cells: run -> column of the matrix -> value.

    Raises:
        ValueError: no seed has two candidates, or two of one setting.
    """
    variants = variants_of(runs)
    keys, names = pair_keys(variants), {run.path: variant.name for variant in variants for run in variant.runs}
    seeds: dict[Hashable, list[RunResults]] = {}
    for run in runs:
        seeds.setdefault(keys[run.path], []).append(run)
    if max(map(len, seeds.values())) < 2:
        raise ValueError("nothing to choose between: no seed has two runs; give runs of several settings with one seed")
    return [_choice(rule, list(seeds.values()), metric, cells, names) for rule in RULES]


def _choice(
    rule: str,
    seeds: Sequence[Sequence[RunResults]],
    metric: str,
    cells: Mapping[Path, Mapping[str, float]],
    names: Mapping[Path, str],
) -> Choice:
    taken: list[RunResults] = []
    for candidates in seeds:
        scores = {}
        for run in candidates:
            score = _score(rule, run, metric, cells[run.path])
            if score is None:
                return Choice(rule, {}, None, None, _unknown(rule, run, metric))
            scores[run.path] = score if run.directions[metric] == "max" else -score
        taken.append(max(candidates, key=lambda run: scores[run.path]))
    chosen: dict[str, int] = {}
    for run in taken:
        chosen[names[run.path]] = chosen.get(names[run.path], 0) + 1
    unseen, worst = (
        _over_seeds([cells[run.path].get(column, math.nan) for run in taken])
        for column in ("mean unseen", "worst unseen")
    )
    return Choice(rule, chosen, unseen, worst)


def _over_seeds(values: list[float]) -> Interval | None:
    if any(math.isnan(value) for value in values):
        return None
    return t_interval(values) if len(values) > 1 else Interval(values[0], math.nan, math.nan, 1)


def _score(rule: str, run: RunResults, metric: str, row: Mapping[str, float]) -> float | None:
    """What a rule judges a run by; None where the run does not say it."""
    if rule == "oracle":
        return row.get("mean unseen")
    found = _of_results(rule, run, metric)
    if found is None:
        found = _of_curves(rule, run, metric)
    # The test parts of the domains kept for choices are theirs as well; those of seen domains are not for choosing.
    return row.get("mean validation") if found is None and rule == "validation" else found


def _of_results(rule: str, run: RunResults, metric: str) -> float | None:
    if not (run.path / "metrics" / "val.json").is_file():
        return None
    found = read_results(run.path, "val")
    steps = [results.header.get("tested_step") for results in (run, found)]
    if None not in steps and steps[0] != steps[1]:  # the validation of another checkpoint
        return None
    values = [v for d, v in found.values.get(metric, {}).items() if found.roles[d] == rule and not math.isnan(v)]
    return math.fsum(values) / len(values) if values else None


def _of_curves(rule: str, run: RunResults, metric: str) -> float | None:
    """The validation of the weights that were tested; of results that do not tell them, that of the end of training."""
    file, until = run.path / "metrics.csv", run.header.get("global_step")
    tested = run.header.get("tested_step")
    if isinstance(tested, int):
        until = tested - 1  # a validation after n steps is logged with the step before, counted from 0
    if not file.is_file() or file.stat().st_size > _LARGEST:
        return None
    found = None
    with file.open(encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            told, step = line.get(f"val/{rule}/{metric}"), line.get("step")
            try:
                if told and step and (not isinstance(until, int) or int(step) <= until):
                    found = float(told)
            except ValueError as error:
                raise ValueError(f"{file} is damaged ({error}); leave the run out, or train it again") from error
    return found if found is not None and math.isfinite(found) else None


def _unknown(rule: str, run: RunResults, metric: str) -> str:
    if rule == "seen":
        return f"{run.path} does not say val/seen/{metric}; make it with: moeapps validate --run {run.path}"
    return f"{run.path} was tested on no {rule if rule == 'validation' else 'unseen'} domain"
