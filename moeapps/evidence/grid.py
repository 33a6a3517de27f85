# SPDX-License-Identifier: Apache-2.0
"""What a system's evidence consists of: variants, seeds, claims and the conflict ladder, all checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moeapps.commands.listing import find_config
from moeapps.commands.names import read_config
from moeapps.evaluation.statistics import Direction, Rule, check_rule

Kind = Literal["statistical", "exact"]
Match = Literal["flops", "params", "none"]
Scale = Literal["linear", "log10"]
Pair = tuple[int, int]

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


class GridError(ValueError):
    """A grid that cannot be run or judged as it is written."""


@dataclass(frozen=True)
class Variant:
    """One thing to train: overlays and flags on top of the system's base config.

    Args:
        overlays: Config files, in order, relative to the folder that the grid is run in.
        flags: Further words for the command line, for instance ``("--model.net.depth", "2")``.
        pairs: How many of the grid's (seed, data seed) pairs to run; 8 for the two headline pairs of a system, else 3.
        data_seed_flags: Options that receive the data seed where they are not the grid's (another source of data).
        stages: For a curriculum: of each stage its overlay, then its own words. The cell is the whole chain.
    """

    overlays: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    pairs: int = 3
    data_seed_flags: tuple[str, ...] | None = None
    stages: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Claim:
    """A hypothesis about two variants, with its rule fixed before the runs.

    A value is ``metric`` of a cell: ``<domain or role>/<name>`` as in metrics/test.json (``unseen/miou``), or
    ``params_total``, ``params_active``, ``flops_per_token``, ``train_flops``.

    Args:
        id: C1, C2, ... in the order of the paper's claims.
        text: The claim in one sentence.
        metric: The metric it is about.
        direction: Which way is better; ``equal`` for exact equality.
        system: Name of the variant that should be better.
        baseline: Name of the variant it is compared with; None with ``baseline_value``, the same variant with
            ``baseline_metric``.
        rule: How it is judged.
        margin: Smallest gain (superiority), acceptable loss (non-inferiority) or tolerance (exact), in units of the
            metric.
        match: In what the two variants must agree within 2 per cent for the comparison to be fair: ``flops`` of the
            whole training (rows x passes x steps), ``params``, or nothing.
        baseline_metric: Metric of the baseline where it differs, for claims within one model.
        baseline_value: A constant to compare with instead of a baseline.
        minus: Two variants (of system, of baseline) whose metric is subtracted first, for claims about a difference of
            differences.
        untested: Reason why the claim is not tested at all; everything else may then be left at its default.
        clustered: Pairs of one data seed are averaged before the interval. False where the data seed draws nothing
            (real data), so that pairs differ by the model alone.
        scale: ``log10`` takes the logarithm of all values first, so that differences are ratios and ``margin`` is the
            logarithm of one; for errors that spread over powers of ten.
        skip: Pairs at the start of the grid that this claim leaves out: seeds whose scores were known when something
            was still chosen.
    """

    id: str
    text: str
    metric: str = ""
    direction: Direction = "higher"
    system: str = ""
    baseline: str | None = None
    rule: Rule = "superiority"
    margin: float = 0.0
    match: Match = "flops"
    baseline_metric: str | None = None
    baseline_value: float | None = None
    minus: tuple[str, str] | None = None
    untested: str = ""
    clustered: bool = True
    scale: Scale = "linear"
    skip: int = 0

    def __post_init__(self) -> None:
        if self.untested:
            return
        positive = self.baseline_value is None or self.baseline_value > 0
        if self.scale == "log10" and (self.minus is not None or not positive):
            raise GridError(f"claim {self.id}: scale='log10' takes positive values and goes with no 'minus'")
        try:
            check_rule(self.rule, self.direction, self.margin)
        except ValueError as error:
            raise GridError(f"claim {self.id}: {error}") from error
        if not self.metric or not self.system:
            raise GridError(f"claim {self.id}: give metric and system, or a reason in 'untested'")
        if (self.baseline is None) == (self.baseline_value is None):
            raise GridError(f"claim {self.id}: give either a baseline variant or a baseline_value")
        if self.minus is not None and self.baseline is None:
            raise GridError(f"claim {self.id}: 'minus' needs a baseline variant")

    @property
    def kind(self) -> Kind:
        """``exact`` for the rules that make no statement about other runs (exact, median), else ``statistical``."""
        return "exact" if self.rule in ("exact", "median") else "statistical"

    @property
    def variants(self) -> tuple[str, ...]:
        """Every variant the claim needs."""
        names = (self.system, self.baseline, *(self.minus or ()))
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True)
class Ladder:
    """The conflict ladder: the same two variants at growing conflict between domains.

    Args:
        levels: Name of the level -> overlays and flags on top of the variant's own, from the least conflict to the
            most. A level that adds nothing shares the cells of the variants themselves.
        system: Name of the system's variant.
        baseline: Name of its dense twin.
        metric: What the curve shows.
        direction: Which way is better.
        text: What grows from level to level.
        pairs: Number of (seed, data seed) pairs per level.
    """

    levels: Mapping[str, Variant]
    system: str
    baseline: str
    metric: str
    direction: Direction
    text: str
    pairs: int = 3

    def variant_name(self, level: str, variant: str) -> str:
        """Give the name under which a level's cells are kept."""
        extra = self.levels[level]
        return f"ladder-{level}-{variant}" if extra.overlays or extra.flags else variant


@dataclass(frozen=True)
class Cell:
    """One run: a variant with a seed for the model and one for the data."""

    variant: str
    seed: int
    data_seed: int

    @property
    def stem(self) -> str:
        """Name of its files."""
        return f"{self.variant}-s{self.seed}-d{self.data_seed}"


@dataclass(frozen=True)
class Grid:
    """All cells and claims of one system.

    Args:
        system: Name of the system: that of its runs.
        config: The base config, relative to the folder that the grid is run in.
        variants: Name -> variant. Names are lower case letters, digits, ``_``, ``.`` and ``-``.
        claims: In the order of the paper's claims.
        seeds: (seed, data seed) pairs; variants run the first few. Seed 0 is left for choosing settings.
        ladder: The conflict ladder, run before the wide table.
        headline: Variants of the headline pairs, run before everything else.
        flags: Words for the command line of every cell.
        data_seed_flags: Options that receive the data seed.
        settings_tried: Number of settings tried while choosing, on validation domains and other seeds; printed.
        choice: How settings were chosen, in one sentence; printed.
        show: Metrics of the table of all variants.

    Raises:
        GridError: For unknown variants, repeated ids or seeds, bad names, or too few pairs for a claim.
    """

    system: str
    config: str
    variants: Mapping[str, Variant]
    claims: tuple[Claim, ...]
    seeds: tuple[Pair, ...] = tuple((s, s) for s in range(1, 9))
    ladder: Ladder | None = None
    headline: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    data_seed_flags: tuple[str, ...] = ("--data.seed",)
    settings_tried: int = 0
    choice: str = ""
    show: tuple[str, ...] = ()
    _all: dict[str, Variant] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._all.update(self.variants)
        self._add_ladder()
        for name, variant in self._all.items():
            if not _NAME.fullmatch(name):
                raise GridError(f"variant {name!r}: use lower case letters, digits, '_', '.' and '-'")
            if not 1 <= variant.pairs <= len(self.seeds):
                raise GridError(
                    f"variant {name!r} asks for {variant.pairs} pairs; the grid has {len(self.seeds)} seeds"
                )
        if len(set(self.seeds)) != len(self.seeds):
            raise GridError(f"seeds {self.seeds} repeat a pair: the same run twice is no new evidence")
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) != len(ids):
            raise GridError(f"claim ids {ids} repeat; give each claim its own")
        for name in self.headline:
            self._require(name, "the headline")
        for claim in self.claims:
            self._check(claim)

    def _add_ladder(self) -> None:
        if self.ladder is None:
            return
        for name in (self.ladder.system, self.ladder.baseline):
            self._require(name, "the ladder")
        for level, extra in self.ladder.levels.items():
            for name in (self.ladder.system, self.ladder.baseline):
                base, own = self.variants[name], self.ladder.variant_name(level, name)
                if own != name:
                    self._all[own] = Variant(
                        base.overlays + extra.overlays,
                        base.flags + extra.flags,
                        self.ladder.pairs,
                        base.data_seed_flags,
                        base.stages,
                    )
                elif base.pairs < self.ladder.pairs:
                    raise GridError(f"ladder level {level!r} needs {self.ladder.pairs} pairs of {name!r}")

    def _check(self, claim: Claim) -> None:
        if claim.untested:
            return
        for name in claim.variants:
            self._require(name, f"claim {claim.id}")
        pairs = self.pairs(*claim.variants)[claim.skip :]
        independent = len({data_seed for _, data_seed in pairs}) if claim.clustered else len(pairs)
        if claim.kind == "statistical" and independent < 2:
            raise GridError(f"claim {claim.id} has one pair of seeds or one data seed; an interval needs at least two")

    def _require(self, name: str, who: str) -> None:
        if name not in self.variants:
            raise GridError(f"{who} names variant {name!r}; defined are {', '.join(self.variants)}")

    @property
    def all_variants(self) -> Mapping[str, Variant]:
        """The variants and, under names of their own, those of the ladder's levels."""
        return self._all

    def pairs(self, *names: str) -> tuple[Pair, ...]:
        """Give the (seed, data seed) pairs that all these variants run."""
        return self.seeds[: min(self._all[name].pairs for name in names)]

    @property
    def shared_pairs(self) -> tuple[Pair, ...]:
        """The pairs that most variants run: averages over them compare, as those over unlike seeds do not."""
        counts = [variant.pairs for variant in self.variants.values()]
        return self.seeds[: max(sorted(set(counts)), key=counts.count)]

    def cells(self) -> list[Cell]:
        """List every cell: headline, ladder, wide table, each seed by seed, so that an interrupted grid is balanced."""
        ladder = tuple(name for name in self._all if name not in self.variants and name not in self.headline)
        wide = tuple(name for name in self.variants if name not in self.headline)
        found = []
        for names in (self.headline, ladder, wide):
            for i, pair in enumerate(self.seeds):
                found += [Cell(name, *pair) for name in names if i < self._all[name].pairs]
        return found

    def arguments(self, cell: Cell) -> list[str]:
        """Give the words after ``moeapps`` that run a cell."""
        variant = self._all[cell.variant]
        configs = [word for name in (self.config, *variant.overlays) for word in ("--config", name)]
        seeds = ["--seed_everything", str(cell.seed)]
        seeds += [word for flag in self._data_seed_flags(variant) for word in (flag, str(cell.data_seed))]
        named = ["--system", self.system, "--name", cell.stem]
        stages = [word for stage in variant.stages for word in ("--stage", *stage)]
        return ["curriculum" if stages else "fit", *configs, *self.flags, *variant.flags, *seeds, *named, *stages]

    def _data_seed_flags(self, variant: Variant) -> tuple[str, ...]:
        return self.data_seed_flags if variant.data_seed_flags is None else variant.data_seed_flags

    def definition(self, variant: str, root: Path) -> str:
        """Give 12 hexadecimal digits that change when what a variant's configs and flags say changes.

        Comments and order of keys do not count, nor does what a later config overrides.

        Raises:
            GridError: If a config file is missing or is not YAML.
        """
        chosen = self._all[variant]

        def read(name: str) -> Any:
            try:
                return read_config(located(name, root))
            except OSError as error:
                raise GridError(f"variant {variant!r}: cannot read {name}: {error.strerror or error}") from error
            except ValueError as error:
                told = str(error).replace(f"{root}/", "")
                raise GridError(f"variant {variant!r}: cannot read {name}: {told}") from error

        merged: dict[str, Any] = {}
        for name in (self.config, *chosen.overlays):
            merged = overlaid(merged, read(name))
        parts: list[Any] = [merged, self.flags, chosen.flags, self._data_seed_flags(chosen)]
        parts += [[read(overlay), words] for overlay, *words in chosen.stages]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def located(name: str, root: Path) -> Path:
    """Give the file that a config's name means in a grid: below the root, else among those that come with moeapps."""
    own = root / name
    return own if own.exists() else find_config(name) if find_config(name).exists() else own


def overlaid(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one config over another: mappings merge, lists replace, ``name+`` adds to them.

    The command line drops the arguments of a class that another one replaces; here they stay, so that a digest may
    change where the model does not.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            merged[key] = overlaid(old, value)
        elif key.endswith("+") and isinstance(value, list):
            merged[key] = [*(old or []), *value]
        else:
            merged[key] = value
    return merged
