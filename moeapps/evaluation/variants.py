# SPDX-License-Identifier: Apache-2.0
"""Which runs may be compared, and which are one variant: the configuration decides, not the name."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeapps.evaluation.results import RunResults


@dataclass(frozen=True)
class Variant:
    """Runs that differ by their seeds alone.

    Args:
        name: what people call it; with the first digits of its hash where another variant is called the same.
        runs: one per combination of seeds.
    """

    name: str
    runs: list[RunResults]


def check_runs(runs: Sequence[RunResults]) -> None:
    """Refuse runs that are not independent trainings.

    Raises:
        ValueError: a run without a single step of training, or a run beside one that went on from it.
    """
    for run in runs:
        if run.header.get("global_step") == 0:
            raise ValueError(
                f"{run.path} was never trained (global_step 0 in its results); leave it out, or test it again with "
                f"moeapps test --run {run.path} if an early version wrote them"
            )
    known = {run.path.resolve(): run for run in runs}
    for run in runs:
        before = run.continued_from
        if before is not None and before != run.path.resolve() and before in known:
            raise ValueError(f"{run.path} continues {known[before].path}: the two are one training; give one of them")


def variants_of(runs: Sequence[RunResults]) -> list[Variant]:
    """Group runs by what was run, in order of appearance.

    Raises:
        ValueError: two runs of one variant have the same seeds.
    """
    groups: dict[str, list[RunResults]] = {}
    for run in runs:
        groups.setdefault(run.identity, []).append(run)
    for group in groups.values():
        _check_seeds(group)
    labels = [group[0].label for group in groups.values()]
    return [
        Variant(label if labels.count(label) == 1 else f"{label}#{identity[:6]}", group)
        for label, (identity, group) in zip(labels, groups.items(), strict=True)
    ]


def _check_seeds(group: Sequence[RunResults]) -> None:
    found: dict[Hashable, RunResults] = {}
    for run in group:
        seeds = tuple(sorted(run.seeds.items()))
        if seeds in found:
            raise ValueError(
                f"{run.path} and {found[seeds].path} ran the same config and both have seed {run.seed}: a "
                "repeated training adds no information; give one run per seed"
            )
        found[seeds] = run


def pair_keys(runs: Sequence[RunResults]) -> dict[Path, Hashable]:
    """Return for each run what its partner must share: the seed and, where all runs tell them, the data seeds."""
    told = all(run.data_seeds for run in runs)
    return {run.path: (run.seed, tuple(sorted(run.data_seeds.items())) if told else ()) for run in runs}
