# SPDX-License-Identifier: Apache-2.0
"""Remarks on a comparison of runs: other test data, means over other domains, what one seed cannot show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeapps.evaluation.results import RunResults

if TYPE_CHECKING:
    from moeapps.evaluation.xeval import Difference


def different_data(runs: Sequence[RunResults]) -> list[str]:
    """Say which runs were tested on other data: another seed of the data, or another source of a domain."""
    notes = []
    seeds = {key: [run.data_seeds.get(key) for run in runs] for run in runs for key in run.data_seeds}
    for key, values in seeds.items():
        if len(set(values)) > 1:
            shown = ", ".join(f"{run.label} {run.path.name}: {v}" for run, v in zip(runs, values, strict=True))
            notes.append(f"Not all runs are tested on the same data: {key} differs ({shown}).")
    if not notes:
        sources = {domain for run in runs for domain in run.header.get("sources", {})}
        differ = sorted(
            d
            for d in sources
            if len({run.header["sources"][d] for run in runs if d in run.header.get("sources", {})}) > 1
        )
        if differ:
            notes.append(f"Not all runs are tested on the same data: the sources of {', '.join(differ)} differ.")
    return notes


def different_domains(runs: Sequence[RunResults], metric: str) -> list[str]:
    """Say which domains some runs have a score of and others have not: their means over roles do not compare."""
    defined = [{d for d, v in run.values[metric].items() if not math.isnan(v)} for run in runs]
    partly = sorted(d for d in set().union(*defined) if not all(d in own for own in defined))
    if not partly:
        return []
    return [
        f"Not every run has {metric} of {', '.join(partly)}: means over roles are over what each run has, "
        "differences over what both have."
    ]


def conclusion(metric: str, differences: Sequence[Difference]) -> str:
    """Return one closing sentence per compared variant: what the means over roles say, and what they cannot.

    Args:
        metric: name of the score.
        differences: of the variants to the baseline; none give no sentence.
    """
    lines = []
    for variant in dict.fromkeys(d.variant for d in differences):
        own = {d.column: d for d in differences if d.variant == variant}
        shown = [own[c] for c in ("mean seen", "mean unseen") if c in own] or list(own.values())[:1]
        pair, seeds = f"{variant} against {shown[0].baseline}", {d.over for d in shown} == {"seeds"}
        words = {True: "better", False: "worse", None: "open"}
        told = " and ".join(
            f"{d.interval.mean:+.4f} {metric} on {d.column}" + (f" ({words[d.better]})" if seeds else "") for d in shown
        )
        lines.append(
            f"Over {shown[0].interval.n} seeds, {pair}: {told}."
            if seeds
            else f"With one seed, {pair}: {told}. One seed decides nothing: trainings that differ by the seed alone "
            "can differ by more than this; more seeds would tell (--seed_everything 1)."
        )
    return "\n".join(lines)
