# SPDX-License-Identifier: Apache-2.0
"""What the experts of a finished run did, read from the files of its folder: nothing of the run is imported or run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from moeapps.bounds import read_json
from moeapps.commands.tasks import run_folder_of, task_modules
from moeapps.moe.record import place_of
from moeapps.reporting.knowledge import LIMITS, ExpertTable, LayerFinding, Limits, describe_layer
from moeapps.text import plain

TableReader = Callable[[Path, dict[str, int]], list[ExpertTable]]
"""``expert_tables(folder, layers)`` of a task's ``report/gallery.py``: tables that it knows beyond the common ones; for
each layer its number of experts is given."""


@dataclass(frozen=True)
class RunFinding:
    """What the experts of a run did.

    Args:
        sentence: about the whole run, in plain English.
        layers: one finding per MoE layer, in the order of the network; none for a network without experts that choose.
        notes: what could not be read, a line each.
    """

    sentence: str
    layers: tuple[LayerFinding, ...]
    notes: tuple[str, ...] = ()


def describe_run(folder: Path, limits: Limits = LIMITS, packages: frozenset[str] = frozenset()) -> RunFinding:
    """Say what the experts of a finished run did.

    Read are metrics/routing_test.json (work by domain), metrics/experts.json (work by the factors that the task names),
    and what the gallery of the task reads further. A table of the gallery replaces the common one of its factor.

    Args:
        folder: of the run.
        limits: when a number becomes a word.
        packages: of the user's own, whose galleries are imported, see `gallery_of`.

    Raises:
        ValueError: metrics/routing_test.json is there and is not what a test writes.
    """
    file = folder / "metrics" / "routing_test.json"
    if not file.is_file():
        return RunFinding("Nothing was routed in its test: the network has no experts, or it was not tested.", ())
    tables, entropies, per_row = _routing_tables(file)
    notes: list[str] = []
    readers: list[TableReader] = [_factor_tables]
    gallery = gallery_of(folder, packages)
    if gallery is not None and hasattr(gallery, "expert_tables"):
        readers.append(gallery.expert_tables)
    for reader in readers:
        try:
            for table in reader(folder, {name: len(own[0].work[0]) for name, own in tables.items()}):
                own = tables[table.layer]
                tables[table.layer] = _with(own, table)
        except (ValueError, OSError, KeyError, TypeError, IndexError, AttributeError) as error:
            notes.append(f"tables of experts were left out, a file of them cannot be read ({plain(error)})")
    # Whatever a table tells rows apart by, as many experts work on each of them.
    tables = {name: [replace(table, per_row=per_row[name]) for table in own] for name, own in tables.items()}
    layers = tuple(describe_layer(own, entropies.get(name), limits) for name, own in tables.items())
    return RunFinding(summarise(layers), layers, tuple(notes))


def gallery_of(folder: Path, packages: frozenset[str] = frozenset()) -> ModuleType | None:
    """Return the module ``report.gallery`` in the package of the task that a run is of; None without any.

    The task is named by the run's results. Galleries of our own tasks are always read. That of another package is
    imported where ``packages`` holds its name, or where this process has imported the task already, as while it trains.

    Args:
        folder: of the run.
        packages: names of packages of the user's own.
    """
    task = _task_of(folder)
    for module in task_modules("report.gallery"):
        if task.startswith(module.removesuffix("report.gallery")):
            return import_module(module)
    package = untold_gallery(folder)
    trusted = package is not None and (package in packages or package in sys.modules)
    return import_module(f"{package}.report.gallery") if trusted else None


def untold_gallery(folder: Path) -> str | None:
    """Return the package of the user's own that has a gallery for a run; None without one. Nothing is imported."""
    from moeapps.commands.trust import FREE, locate

    package = _task_of(folder).partition(".")[0]
    if not package.isidentifier() or package in FREE:
        return None
    name = f"{package}.report.gallery"
    found = locate(name)
    return package if found and found[0] == name and run_folder_of(found[1], folder) is None else None


def _task_of(folder: Path) -> str:
    """The class of the task of a run, as its results name it; empty where they do not."""
    try:
        return str(read_json(folder / "metrics" / "test.json")["header"]["task"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def summarise(layers: Sequence[LayerFinding]) -> str:
    """Say in one sentence what the experts of all layers did; of one layer, its own."""
    if not layers:
        return "Nothing was routed in its test."
    if all("single" in layer.kinds for layer in layers):
        which = "Its one MoE layer has" if len(layers) == 1 else f"Each of its {len(layers)} MoE layers has"
        return f"{which} one expert, always on: there is nothing to choose."
    if len(layers) == 1:
        number = int(layers[0].numbers["experts"])
        return f"The {number} experts of its one MoE layer{_of_them(layers[0].sentence)}"
    total = len(layers)
    parts = [
        f"in layer {place} of {total} {layer.clause}"
        for place, layer in enumerate(layers, 1)
        if layer.clause and not layer.factor
    ]
    for kind, words in (("specialised", "specialise"), ("leaning", "lean")):
        own = [layer for layer in layers if kind in layer.kinds]
        if own:
            best = own[clearest(own)]
            parts.append(
                f"in {len(own)} of {total} MoE layers the experts {words}, most by {best.factor} in layer "
                f"{layers.index(best) + 1}: {best.clause}"
            )
    for kind, words in (
        ("collapsed", "have collapsed onto one expert"),
        ("even", "share the work alike and follow nothing known"),
        ("uneven", "share the work unevenly and follow nothing known"),
        ("always", "have all experts work on every row and follow nothing known"),
        ("single", "have one expert, always on"),
        ("unknown", "saw too few rows to say anything"),
    ):
        count = sum(kind in layer.kinds and not layer.clause for layer in layers)
        if count:
            parts.append(f"{count} of {total} MoE layers {words if count > 1 else _singular(words)}")
    dead = sum(int(layer.numbers["dead"]) for layer in layers)
    experts = sum(int(layer.numbers["experts"]) for layer in layers)
    parts.append(
        f"{dead} of all {experts} experts {'is' if dead == 1 else 'are'} dead" if dead else "no expert is dead"
    )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def clearest(layers: Sequence[LayerFinding]) -> int:
    """The place of the layer whose experts follow something most; of layers that follow nothing, of the last one."""
    order = ("specialised", "leaning")

    def clear(place: int) -> tuple[int, float, int]:
        layer = layers[place]
        rank = next((len(order) - k for k, kind in enumerate(order) if kind in layer.kinds), 0)
        return rank, layer.numbers[f"told_{layer.factor}"] if rank else 0.0, place

    return max(range(len(layers)), key=clear)


_BEGINNINGS = {
    "specialised by": " are specialised by",
    "leans by": " lean by",
    "collapsed:": " have collapsed:",
    "even: its": " are even: all",
    "uneven, yet": " are uneven, yet",
}


def _of_them(sentence: str) -> str:
    """The sentence of a layer, said of its experts."""
    for beginning, words in _BEGINNINGS.items():
        if sentence.startswith(beginning):
            return words + sentence.removeprefix(beginning)
    if match := re.match(r"all \d+ experts( work on every row.*)", sentence):
        return f" all{match[1]}"
    return f": {sentence}"


def _singular(words: str) -> str:
    return words.replace("have ", "has ").replace("share ", "shares ").replace("follow ", "follows ")


# --- files ------------------------------------------------------------------------------------------------------------


def _routing_tables(file: Path) -> tuple[dict[str, list[ExpertTable]], dict[str, float], dict[str, int | None]]:
    """Work by domain of every layer, the entropies of their routers, and how many experts work on each row."""
    try:
        raw = read_json(file)
        domains = [str(name) for name in raw["domains"]]
        tables: dict[str, list[ExpertTable]] = {}
        entropies: dict[str, float] = {}
        per_row: dict[str, int | None] = {}
        for name, report in raw["layers"].items():
            told, always = _number(report["mi_domain"]), report.get("always") is True  # absent in runs of before
            tables[name] = [ExpertTable(name, "domain", domains, report["work"], told=told, always=always)]
            several = report.get("per_row")  # absent in runs of before, too
            per_row[name] = several if isinstance(several, int) and 0 < several <= len(report["work"][0]) else None
            entropy = _number(report["entropy"])
            if entropy is not None:
                entropies[name] = entropy
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a routing file of moeapps ({plain(error)}); run the test again") from error
    return tables, entropies, per_row


def _factor_tables(folder: Path, layers: dict[str, int]) -> list[ExpertTable]:
    """Work by the factors of `BaseTask.routing_factors`, summed over domains; none where no report has written it."""
    file = folder / "metrics" / "experts.json"
    raw: dict[str, Any] = read_json(file) if file.is_file() else {}
    work, names = raw.get("work", {}), raw.get("labels", {})
    found = []
    for layer in layers:
        group = _group(layer, work)
        for factor, table_DLE in work.get(group, {}).items():
            table_LE = [[sum(column) for column in zip(*rows, strict=True)] for rows in zip(*table_DLE, strict=True)]
            labels = names.get(factor) or [f"{factor} {number}" for number in range(len(table_LE))]
            told = _number(raw.get(group, {}).get(f"mi_{factor}"))
            if table_LE and any(map(any, table_LE)):
                found.append(ExpertTable(layer, factor, labels, table_LE, told=told))
    return found


def _group(layer: str, groups: Iterable[str]) -> str:
    """The group of a layer: ``encoder.2.1``, or ``experts.2`` where the network has one stage; empty for none."""
    stage, numbers = place_of(layer)
    names = [".".join([first, *map(str, numbers)]) for first in (stage, "experts")]
    return next((name for name in names if name in groups), "")


def _with(tables: list[ExpertTable], table: ExpertTable) -> list[ExpertTable]:
    """Replace the table of the same factor, or add one."""
    if any(own.factor == table.factor for own in tables):
        return [table if own.factor == table.factor else own for own in tables]
    return [*tables, table]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
