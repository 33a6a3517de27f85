# SPDX-License-Identifier: Apache-2.0
"""What a report page shows of a run of this task, from the files of its run alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from moeapps.bounds import read_json
from moeapps.reporting.exhibits import Room, Table
from moeapps.reporting.knowledge import ExpertTable, information

MOST_LISTS, MOST_PAST = 6, 12


def expert_tables(folder: Path, layers: dict[str, int]) -> list[ExpertTable]:
    """Weights of experts by task and category (several gates a level), or by what users like (one gate)."""
    found = []
    levels, gates = folder / "metrics" / "experts.json", folder / "metrics" / "gates.json"
    if levels.is_file():
        told: list[dict[str, Any]] = read_json(levels).get("levels", [])
        for layer, level in zip(layers, told, strict=False):
            if level.get("share"):
                share = np.asarray(level["share"], dtype=np.float64)
                seen = (share > 0) / np.maximum((share > 0).sum(1, keepdims=True), 1)  # even weights on what is seen
                names = {"labels": level["gates"], "work": level["share"], "experts": level["experts"]}
                found.append(ExpertTable(layer, "gate", **names, rows=math.inf, given=information(seen)))
    if gates.is_file() and layers:
        raw = read_json(gates)
        rows = [(f, w) for f, w in zip(raw["factors"], raw["mean_gate"], strict=True) if None not in w]
        # Weights may be below 0 where they are not normalised: their size is what an expert contributes.
        work = [[abs(value) for value in weights] for _, weights in rows]
        ari = raw.get("gate_ari")
        score = None if ari is None else ("adjusted Rand index of groups of gates and tastes", max(0.0, float(ari)))
        if rows:
            found.append(
                ExpertTable(next(iter(layers)), "taste", [f for f, _ in rows], work, rows=math.inf, score=score)
            )
    return found


def gallery(folder: Path) -> list[Room]:
    """Ranked lists, with the items that activated an expert; and impressions ranked for several tasks."""
    rooms = []
    lists = folder / "gallery" / "lists.json"
    if lists.is_file():
        shown = [table for one in read_json(lists)["lists"][:MOST_LISTS] for table in _list(one)]
        text = (
            "For each user first what was ranked, the item that the user took standing out; then what each past item "
            "added to each expert's weight: above 0 it calls for the expert, below 0 it calls it off."
        )
        rooms.append(Room("Ranked lists, and what activated which expert", text, shown))
    rankings = folder / "gallery" / "rankings.json"
    if rankings.is_file():
        raw = read_json(rankings)
        text = (
            "Impressions of a few users, most likely to be clicked first: the probability of each task, what happened, "
            "and the expert that the gate of the first task weighs most."
        )
        rooms.append(Room("Ranked impressions", text, [_ranking(one, raw["tasks"]) for one in raw["users"]]))
    levels = folder / "metrics" / "experts.json"
    if levels.is_file():
        found = read_json(levels)
        shown = [table for k, level in enumerate(found.get("levels", []), 1) for table in _health(k, level)]
        text = (
            "Collapsed: silent on 90 % of rows. Degraded: used by one gate alone. Underfitted: ignored by a rare task."
        )
        rooms.append(Room("Are the experts well?", text, shown))
    return rooms


def _list(one: dict[str, Any]) -> list[Table]:
    who = f"User {one['user']}" + (f" ({one['factor']})" if one["factor"] else "")
    experts = [f"expert {k}" for k in range(len(one["experts"]))]
    found = []
    if one["ranked"]:
        rows = [[f"{k}. {item['item']}", item["score"]] for k, item in enumerate(one["ranked"], 1)]
        taken = frozenset(k for k, item in enumerate(one["ranked"]) if item["taken"])
        found.append(Table(f"{who}: the list as ranked", ("candidate", "score"), rows, marked=taken))
    past = [[item["item"], *item["added"]] for item in one["past"][:MOST_PAST]]
    weights = ", ".join(f"{name} {value:+.2f}" for name, value in zip(experts, one["experts"], strict=True))
    caption = f"Weights of the experts: {weights}."
    found.append(Table(f"{who}: what past items added", ("past item", *experts), past, caption, shaded=True))
    return found


def _ranking(one: dict[str, Any], tasks: list[str]) -> Table:
    rows = [
        [f"{k}. impression {row['row']}", *row["probability"], ", ".join(row["done"]) or "nothing", row["expert"]]
        for k, row in enumerate(one["rows"], 1)
    ]
    return Table(f"User {one['user']}", ("impression", *tasks, "happened", "expert"), rows)


def _health(number: int, level: dict[str, Any]) -> list[Table]:
    findings = level.get("findings") or {}
    rows = [[illness, ", ".join(names) if names else "none"] for illness, names in findings.items()]
    return [Table(f"Level {number}", ("illness", "experts or tasks"), rows)] if rows else []
