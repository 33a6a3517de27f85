# SPDX-License-Identifier: Apache-2.0
"""What a report page shows of a run of this task, from the files of its run alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeapps.bounds import read_json
from moeapps.reporting.exhibits import Room, Table
from moeapps.reporting.knowledge import ExpertTable, information

METRICS = {
    "gauc": "share of the pairs of a user's items, one taken and one not, that are ranked right; the mean over "
    "users by their rows, and over tasks",
    "list_auc": "share of the pairs of a list's items, one taken and one not, that are ranked right; the mean "
    "over lists",
}
"""What the scores are that a page compares runs by."""
MOST_LISTS, MOST_PAST, MOST_NAMES = 6, 12, 3
TASTES = "users grouped by their weights alone fall into their tastes with an adjusted Rand index of"


def expert_tables(folder: Path, layers: dict[str, int]) -> list[ExpertTable]:
    """Weights of experts by task and category (several gates a level), or by what users like (one gate)."""
    found = []
    levels, gates = folder / "metrics" / "experts.json", folder / "metrics" / "gates.json"
    if levels.is_file():
        told: list[dict[str, Any]] = read_json(levels).get("levels", [])
        for layer, level in zip(layers, told, strict=False):
            if level.get("share"):
                share = np.asarray(level["share"], dtype=np.float64)
                sees = share > 0  # a gate weighs all that its mask lets it see
                seen = sees / np.maximum(sees.sum(1, keepdims=True), 1)  # even weights on what is seen
                names = {"labels": level["gates"], "work": level["share"], "experts": level["experts"]}
                names["sees"] = sees.tolist()
                story = gate_story(level["gates"], level["experts"], share)
                found.append(ExpertTable(layer, "gate", **names, rows=math.inf, given=information(seen), story=story))
    if gates.is_file() and layers:
        raw = read_json(gates)
        rows = [(f, w) for f, w in zip(raw["factors"], raw["mean_gate"], strict=True) if None not in w]
        # Weights may be below 0 where they are not normalised: their size is what an expert contributes.
        work = [[abs(value) for value in weights] for _, weights in rows]
        ari = raw.get("gate_ari")
        score = None if ari is None else (TASTES, max(0.0, float(ari)))
        if rows:
            found.append(
                ExpertTable(next(iter(layers)), "taste", [f for f, _ in rows], work, rows=math.inf, score=score)
            )
    return found


def gate_story(gates: list[str], experts: list[str], share_GE: npt.NDArray[np.float64]) -> str:
    """Say how gates divide their weights among their own experts, shared ones and others that they may see.

    Args:
        gates: names of the G gates.
        experts: names of the E experts: ``click.0`` or ``click`` is of the gate ``click``, ``shared.1`` of all.
        share_GE: mean weight of each gate on each expert, 0 where it may not see it.

    Returns:
        A clause; empty where no gate has an expert of its own, or has nothing besides.
    """
    owner_E = np.asarray([name.partition(".")[0] for name in experts])
    masses, fairs, names = [], [], []
    others: list[set[str]] = []
    for gate, share_E in zip(gates, share_GE, strict=True):
        groups = (owner_E == gate, owner_E == "shared", (owner_E != gate) & (owner_E != "shared"))
        if gate != "shared" and groups[0].any() and share_E.sum() > 0:
            names.append(gate)
            masses.append([share_E[group].sum() / share_E.sum() for group in groups])
            fairs.append([(share_E[group] > 0).sum() / (share_E > 0).sum() for group in groups])
            others.append(set(owner_E[groups[2] & (share_E > 0)].tolist()))
    if not names:
        return ""
    mass_GK, fair_K = np.asarray(masses), np.mean(fairs, axis=0)
    above = sorted(set().union(*others))
    one_each = all(len(seen) == 1 for seen in others) and not set(above) & set(names)
    own_G = mass_GK[:, 0]
    least, most = int(own_G.argmin()), int(own_G.argmax())
    ends = f" ({names[least]} {_percent(own_G[least])} to {names[most]} {_percent(own_G[most])})"
    places = (
        "of their weight on their own experts" + (ends if len(names) > 1 else ""),
        "on shared ones",
        f"on {' or '.join(above)}, their category's" if one_each else "on those of others",
    )
    words = [f"{_percent(mass_GK[:, k].mean())} {place}" for k, place in enumerate(places) if fair_K[k] > 0]
    even = " : ".join(f"{100 * value:.0f}" for value in fair_K if value > 0)
    who = f"the gates of {_listed(names)}" if len(names) <= MOST_NAMES else f"the {len(names)} gates"
    return f"{who} put {_listed(words)} (even weights: {even})" if len(words) > 1 else ""


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


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
        [
            f"{k}. impression {row['row']}",
            ", ".join(row["done"]) or "nothing",
            *(round(value, 3) for value in row["probability"]),
            row["expert"],
        ]
        for k, row in enumerate(one["rows"], 1)
    ]
    return Table(f"User {one['user']}", ("impression", "happened", *tasks, "expert"), rows)


def _health(number: int, level: dict[str, Any]) -> list[Table]:
    findings = level.get("findings") or {}
    rows = [[illness, ", ".join(names) if names else "none"] for illness, names in findings.items()]
    return [Table(f"Level {number}", ("illness", "experts or tasks"), rows)] if rows else []
