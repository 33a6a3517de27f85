# SPDX-License-Identifier: Apache-2.0
"""What the experts of a layer did, as numbers and one plain English sentence: pure functions of tables of work.

Nothing here reads a file or loads torch; `moeapps.reporting.findings` reads the tables of a finished run.

Shape legend: L labels of a factor (domains, classes, families ...), E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """When a number becomes a word; the one place where this is decided.

    ``told`` is I(expert; factor) / H(factor), in [0, 1]: how much of a factor is known once the expert is known. With
    few experts and many labels it cannot reach 1; what it can reach is min(1, log E / H(factor)), and what is compared
    with a limit is ``told`` over that.

    Args:
        dead: an expert with less than this part of the mean load is dead (as in `moeapps.moe.metrics.dead_fraction`).
        idle: one with less than this part is idle.
        even: a load whose coefficient of variation is at most this is even.
        specialised: experts specialise by a factor of which they tell at least this part of what they could.
        leaning: from this part on they lean by it; below they do not follow it.
        rows: a table of fewer rows says nothing.
        noise: what is told must be this many times what chance alone tells in so few rows,
            (L - 1)(E - 1) / 2N nats (Miller 1955).
    """

    dead: float = 0.01
    idle: float = 0.1
    even: float = 0.25
    specialised: float = 0.25
    leaning: float = 0.05
    rows: float = 20.0
    noise: float = 2.0


LIMITS = Limits()


@dataclass(frozen=True)
class ExpertTable:
    """Work of each expert of one layer by the labels of one factor.

    Args:
        layer: name of the layer.
        factor: what rows are told apart by: ``domain``, ``class``, ``family`` ...
        labels: its L labels.
        work: [L, E], rows or sums of weights, none below 0.
        experts: names of the E experts; empty for their numbers.
        told: I(expert; factor) / H(factor) as the run's files have it; None computes it from the table.
        rows: rows behind the table; None for the sum of ``work``.
        given: what is told by construction, before anything is learned: by a mask that lets a gate see some experts.
        score: a number that says better than ``told`` how well experts follow the factor, 1 at best, with its name.
        always: every expert works on every row, as the layer is built; ``work`` is how much each of them counts.
        story: what the table says in the words of its task, in a clause, where one number cannot tell it.
        sees: which experts a label may be sent to at all [L, E], as a mask has it; empty for all.
        per_row: how many experts work on each row, where that is the same for all and known; else None.
    """

    layer: str
    factor: str
    labels: Sequence[str]
    work: Sequence[Sequence[float]]
    experts: Sequence[str] = ()
    told: float | None = None
    rows: float | None = None
    given: float = 0.0
    score: tuple[str, float] | None = None
    always: bool = False
    story: str = ""
    sees: Sequence[Sequence[bool]] = ()
    per_row: int | None = None

    def __post_init__(self) -> None:
        work = np.asarray(self.work, dtype=np.float64)
        if work.ndim != 2 or not work.size or not np.isfinite(work).all() or (work < 0).any():
            raise ValueError(
                f"table of {self.layer} by {self.factor}: work must be a table [labels, experts] of numbers from 0 on, "
                f"not of shape {list(work.shape)} or with others; run the test again"
            )
        for what, names, number in (("labels", self.labels, work.shape[0]), ("experts", self.experts, work.shape[1])):
            if len(names) != number and (names or what == "labels"):
                raise ValueError(f"table of {self.layer} by {self.factor}: {len(names)} names of {number} {what}")

    @property
    def array(self) -> Floats:
        """``work`` as float64 [L, E]."""
        return np.asarray(self.work, dtype=np.float64)

    @property
    def shares(self) -> Floats:
        """The share of each label's work that each expert takes [L, E]; 0 for a label without work."""
        share_LE: Floats = self.array / np.maximum(self.array.sum(1, keepdims=True), 1e-300)
        return share_LE

    def expert(self, number: int) -> str:
        """What people call an expert."""
        return f"expert {self.experts[number] if self.experts else number}"

    def most(self) -> str:
        """The most that one expert can take and why, in a clause; empty where that is everything."""
        several = self.per_row or 1
        return f"{_percent(1 / several)} is the most, as {several} experts work on each row" if several > 1 else ""

    def strength(self) -> float:
        """How much of the factor experts tell, over the most that so many experts could; or the table's own score.

        What is told by construction counts on neither side.
        """
        told, most = _known(self) - self.given, reachable(self.array) - self.given
        share = max(0.0, told) / most if most > 1e-9 else 0.0
        return share if self.score is None else max(share, self.score[1])


@dataclass(frozen=True)
class LayerFinding:
    """What the experts of one layer did.

    Args:
        layer: its name.
        sentence: the finding in plain English.
        kinds: the words it was decided on, most important first, out of ``collapsed``, ``specialised``, ``leaning``,
            ``even``, ``uneven``, ``unknown`` (too few rows), ``single`` (one expert, always on), ``always`` (all work
            on every row, and nothing known is followed), ``dead``, ``idle``.
        factor: what experts specialise or lean by; empty for nothing.
        numbers: what the sentence rests on: ``experts``, ``dead``, ``idle``, ``load_cv``, ``least`` and ``most`` (load
            over the mean), ``entropy`` (of the router's probabilities, nats) where known, ``told_<factor>``.
        load: load of each expert over the mean [E].
        tables: what the numbers were made of.
        clause: what a sentence on the whole run tells of this layer; empty where its kind says all.
    """

    layer: str
    sentence: str
    kinds: tuple[str, ...]
    factor: str
    numbers: dict[str, float]
    load: tuple[float, ...]
    tables: tuple[ExpertTable, ...] = field(default=())
    clause: str = ""


def describe_layer(
    tables: Sequence[ExpertTable], entropy: float | None = None, limits: Limits = LIMITS
) -> LayerFinding:
    """Say what the experts of one layer did.

    Args:
        tables: work by one factor each, at least one; load is read from the first.
        entropy: mean entropy of the router's probabilities in nats, where the run knows it.
        limits: when a number becomes a word.

    Raises:
        ValueError: no table.
    """
    if not tables:
        raise ValueError("a layer is described by at least one table of its work")
    names = next((t.experts for t in tables if t.experts and len(t.experts) == len(tables[0].work[0])), ())
    first, *others = tables
    tables = [replace(first, experts=first.experts or names), *others]
    first = tables[0]
    load_E = loads(first.array)
    dead = [e for e, x in enumerate(load_E) if x < limits.dead]
    idle = [e for e, x in enumerate(load_E) if limits.dead <= x < limits.idle]
    numbers = {
        "experts": float(len(load_E)),
        "dead": float(len(dead)),
        "idle": float(len(idle)),
        "load_cv": float(load_E.std()),
        "least": float(load_E.min()),
        "most": float(load_E.max()),
        **({} if entropy is None else {"entropy": entropy}),
        **{f"told_{t.factor}": information(t.array) if t.told is None else t.told for t in tables},
    }
    words, kinds, factor = _main_clause(tables, load_E, len(load_E) - len(dead), limits)
    story = "" if kinds[0] in ("unknown", "collapsed", "single") else "; ".join(t.story for t in tables if t.story)
    if story and not factor:
        words = f"{story}{_hardly(first)}"
        words = f"all {len(load_E)} experts work on every row; {words}" if kinds[0] == "always" else words
    clauses = [words] if not story or not factor else [words, story]
    if kinds[0] != "collapsed":
        clauses += _rest(first, load_E, dead, idle, kinds, limits)
    kinds += [word for word, found in (("dead", dead), ("idle", idle)) if found]
    sentence = "; ".join(clauses) + "."
    best = next((t for t in tables if t.factor == factor), None)
    clause = story if story else "" if best is None else f"{_told(best)}{_pairs(best)}"
    load = tuple(load_E.tolist())
    return LayerFinding(first.layer, sentence, tuple(kinds), factor, numbers, load, tuple(tables), clause)


def _main_clause(
    tables: Sequence[ExpertTable], load_E: Floats, alive: int, limits: Limits
) -> tuple[str, list[str], str]:
    """The first words, the kinds, and the factor that decides."""
    first = tables[0]
    if len(load_E) == 1:
        return "one expert, always on: there is nothing to choose", ["single"], ""
    rows = float(first.array.sum()) if first.rows is None else first.rows
    if rows < limits.rows:
        return f"too little was routed ({rows:.0f} rows) to say what its {len(load_E)} experts do", ["unknown"], ""
    if alive == 1 and len(load_E) > 1:
        winner = first.expert(int(load_E.argmax()))
        others = "the other is" if len(load_E) == 2 else f"the other {len(load_E) - 1} are"
        return f"collapsed: {winner} does all the work, {others} dead", ["collapsed"], ""
    followed = sorted(
        (t for t in tables if _beyond_chance(t, limits) and t.strength() >= limits.leaning),
        key=lambda t: -t.strength(),
    )
    if followed:
        best = followed[0]
        strong = best.strength() >= limits.specialised
        lead = "specialised by" if strong else "leans by"
        also = [t for t in followed[1:] if t.strength() >= limits.specialised][:1] if strong else []
        words = f"{lead} {best.factor}: {_told(best)}{_pairs(best)}"
        words += "".join(f"; also by {t.factor} ({_percent(_known(t))} of it told)" for t in also)
        return words, ["specialised" if strong else "leaning"], best.factor
    highest = max(tables, key=lambda t: _known(t) - t.given)
    beyond = " beyond what its gate may see" if highest.given else ""
    told = max(0.0, _known(highest) - highest.given)
    most = _percent(told) if 0 < told < 0.001 else f"at most {_percent(told)}"
    nothing = f"{most} of {highest.factor} told by the expert{beyond}"
    if first.always:
        alike = float(load_E.std()) < 1e-6 and told < 1e-6
        weighed = f"and none counts more for some of them ({nothing})"
        how = "as the layer is built: nothing is chosen" if alike else weighed
        return f"all {len(load_E)} experts work on every row, {how}", ["always"], ""
    if float(load_E.std()) <= limits.even:
        return (
            f"even: its {len(load_E)} experts share the work alike and follow nothing known here ({nothing})",
            ["even"],
            "",
        )
    return f"uneven, yet not specialised by anything known here ({nothing})", ["uneven"], ""


def _hardly(table: ExpertTable) -> str:
    """How little experts tell of a factor that they do not follow; empty for one label."""
    return f"; the expert tells {_percent(_known(table))} of the {table.factor}" if len(table.labels) > 1 else ""


def _rest(
    table: ExpertTable, load_E: Floats, dead: list[int], idle: list[int], kinds: list[str], limits: Limits
) -> list[str]:
    """What else is to be said on the load."""
    clauses = []
    for word, found in (("dead", dead), ("almost idle", idle)):
        if found:
            names = ", ".join(table.expert(e).removeprefix("expert ") for e in found[:6])
            more = f" and {len(found) - 6} more" if len(found) > 6 else ""
            clauses.append(f"{len(found)} of {len(load_E)} experts {_are(found)} {word} ({names}{more})")
    if kinds[0] in ("specialised", "leaning", "uneven"):
        busiest = int(load_E.argmax())
        share = load_E[busiest] / len(load_E)
        even = float(load_E.std()) <= limits.even
        limit = f" ({table.most()})" if kinds[0] == "uneven" and table.most() else ""  # else it has been said
        load = "the load is even" if even else f"{table.expert(busiest)} takes {_percent(share)} of the work{limit}"
        clauses.append(load)
    return clauses


def _told(table: ExpertTable) -> str:
    if table.score is not None:
        return f"{table.score[0]} {table.score[1]:.2f}, where 1 is the best and 0 is chance"
    most = reachable(table.array)
    limit = f", of at most {_percent(most)} that {table.array.shape[1]} experts can tell" if most < 0.95 else ""
    built = f", {_percent(table.given)} by what its gate may see" if table.given else ""
    return f"the expert tells {_percent(_known(table))} of it{limit}{built}"


def clearest_pairs(table: ExpertTable) -> list[tuple[int, int]]:
    """Labels and the experts that take more of them than of all, the clearest first; each label and expert once."""
    work_LE = table.array
    above_LE = np.where(work_LE.sum(1, keepdims=True) > 0, table.shares - work_LE.sum(0) / work_LE.sum(), 0.0)
    found: list[tuple[int, int]] = []
    for flat in np.argsort(-above_LE, axis=None, kind="stable"):
        label, expert = divmod(int(flat), work_LE.shape[1])
        if above_LE[label, expert] >= 0.05:
            found.append((label, expert))
            above_LE[label, :], above_LE[:, expert] = -1.0, -1.0
    return found


def _pairs(table: ExpertTable, most: int = 3) -> str:
    """Which expert takes which label more than its share, the clearest first; one label for each expert."""
    share_LE = table.shares
    found = [
        f"{table.expert(expert)} takes {_percent(share_LE[label, expert])} of {table.labels[label]}"
        for label, expert in clearest_pairs(table)[:most]
    ]
    limit = f"; {table.most()}" if table.most() else ""
    return f" ({', '.join(found)}{limit})" if found else ""


def _known(table: ExpertTable) -> float:
    return information(table.array) if table.told is None else table.told


def _are(found: Sequence[int]) -> str:
    return "is" if len(found) == 1 else "are"


def _percent(share: float) -> str:
    digits = 0 if share == 0 or share >= 0.01 else 1
    return "under 0.1 %" if 0 < share < 0.001 else f"{100 * share:.{digits}f} %"


# --- numbers ----------------------------------------------------------------------------------------------------------


def loads(work_LE: Floats) -> Floats:
    """Load of each expert over the mean [E]; 0 everywhere without any work."""
    work_E: Floats = work_LE.sum(0)
    return work_E * len(work_E) / max(float(work_E.sum()), 1e-300)


def information(work_LE: Floats) -> float:
    """I(expert; label) / H(label) of a table of work, as `moeapps.moe.metrics.mutual_information`; 0 for one label."""
    entropy = _entropy(work_LE.sum(1))
    return _mutual(work_LE) / entropy if entropy > 1e-12 else 0.0


def reachable(work_LE: Floats) -> float:
    """The most that `information` can be with so many experts: min(1, log E / H(label)); 1 for one label."""
    entropy = _entropy(work_LE.sum(1))
    return min(1.0, math.log(work_LE.shape[1]) / entropy) or 1.0 if entropy > 1e-12 else 1.0


def _beyond_chance(table: ExpertTable, limits: Limits) -> bool:
    """Whether the table tells more than the same number of rows would by chance."""
    work_LE = table.array
    rows = float(work_LE.sum()) if table.rows is None else table.rows
    labels, experts = int((work_LE.sum(1) > 0).sum()), int((work_LE.sum(0) > 0).sum())
    chance = (labels - 1) * (experts - 1) / (2 * max(rows, 1e-300))
    return rows >= limits.rows and _known(table) * _entropy(work_LE.sum(1)) > limits.noise * chance


def _mutual(work_LE: Floats) -> float:
    total = float(work_LE.sum())
    if total <= 0:
        return 0.0
    p_LE = work_LE / total
    independent_LE = p_LE.sum(1, keepdims=True) * p_LE.sum(0, keepdims=True)
    there = p_LE > 0
    return max(0.0, float((p_LE[there] * np.log(p_LE[there] / independent_LE[there])).sum()))


def _entropy(work: Floats) -> float:
    p = work[work > 0] / max(float(work.sum()), 1e-300)
    return float(-(p * np.log(p)).sum()) if len(p) else 0.0
