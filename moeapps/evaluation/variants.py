# SPDX-License-Identifier: Apache-2.0
"""Which runs may be compared, and which are one variant: the configuration decides, not the name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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


def one_of_each(*groups: Sequence[RunResults]) -> list[list[RunResults]]:
    """Return the groups with each run folder once in a group, as it was first called in any: paths may be spelt apart.

    Args:
        groups: of runs, for instance those to compare and the baseline.
    """
    known: dict[Path, RunResults] = {}
    for run in (run for group in groups for run in group):
        known.setdefault(run.path.resolve(), run)
    return [[known[place] for place in dict.fromkeys(run.path.resolve() for run in group)] for group in groups]


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
        for before in run.trained_before:
            if before in known:
                raise ValueError(
                    f"{run.path} continues {known[before].path}: the two are one training; give one of them"
                )


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


def pair_keys(variants: Sequence[Variant]) -> dict[Path, Hashable]:
    """Return for each run what its partner in another variant must share.

    That is the seed and, where all runs tell them, the data seeds. Where these do not tell the runs of a variant apart,
    it is every seed whose key all runs tell.

    Raises:
        ValueError: two runs of a variant share all of that, so that nothing says which of them is whose partner.
    """
    runs = [run for variant in variants for run in variant.runs]
    told = all(run.data_seeds for run in runs)
    keys: dict[Path, Hashable] = {
        run.path: (run.seed, tuple(sorted(run.data_seeds.items())) if told else ()) for run in runs
    }
    if not any(_alike(variant, keys) for variant in variants):
        return keys
    common = set.intersection(*(set(run.seeds) for run in runs))
    keys = {run.path: (run.seed, tuple(sorted((key, run.seeds[key]) for key in common))) for run in runs}
    for variant in variants:
        if (alike := _alike(variant, keys)) is not None:
            one, other = alike
            every = sorted(one.seeds.keys() | other.seeds.keys())
            differ = [key for key in every if one.seeds.get(key) != other.seeds.get(key)]
            raise ValueError(
                f"{one.path} and {other.path} differ by {', '.join(differ)} alone, which not every run tells, so "
                "neither has a partner of its own; give one of them"
            )
    return keys


def _alike(variant: Variant, keys: Mapping[Path, Hashable]) -> tuple[RunResults, RunResults] | None:
    """Two runs of one variant that have one key; None where all have their own."""
    found: dict[Hashable, RunResults] = {}
    for run in variant.runs:
        other = found.setdefault(keys[run.path], run)
        if other is not run:
            return other, run
    return None
