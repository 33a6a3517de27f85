# SPDX-License-Identifier: Apache-2.0
"""Draw a picture of README's first screen from a run folder: ``python -m benchmarks.first_screen home runs/home/base``.

One small picture of what the experts of a finished run do, readable at 400 pixels: ``home`` (weights of the gates of
the last level), ``aw_moe`` (one user's list, and the past items that called for each expert), ``meta_dmoe`` (images of
unseen domains that adaptation mended). Written is docs/figures/SYSTEM.png.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moeapps.bounds import read_json
from moeapps.reporting.exhibits import arrays_of
from moeapps.reporting.figures import COLOURS, FAINT, INK, save_figure
from moeapps.training.folders import newest_version

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
SIZE, DPI = (4.6, 3.0), 180
MOST_PAST = 9


def draw_home(run: Path) -> Figure:
    """Weights in per cent of every gate (down) on every expert that it may see (across), last level."""
    level = read_json(run / "metrics" / "experts.json")["levels"][-1]
    share_GE = np.asarray(level["share"], dtype=np.float64)
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    axis.imshow(np.ma.masked_equal(share_GE, 0.0), vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(share_GE):
        if value:
            colour = "white" if value > 0.55 else INK
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axis.set_facecolor("#efede6")
    axis.set_xticks(range(len(level["experts"])), level["experts"], rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(level["gates"])), level["gates"])
    axis.tick_params(labelsize=9, length=0)
    axis.set_xlabel("expert", fontsize=9)
    axis.set_ylabel("gate of a task", fontsize=9)
    axis.set_title("weight in %, grey: may not see", fontsize=9)
    return figure


def draw_aw_moe(run: Path) -> Figure:
    """The list of the user with most past items: scores; and what each past item added to the weights of experts."""
    one = max(read_json(run / "gallery" / "lists.json")["lists"], key=lambda found: len(found["past"]))
    ranked, past = one["ranked"], one["past"][:MOST_PAST]
    added_LE = np.asarray([item["added"] for item in past], dtype=np.float64)
    figure = Figure(figsize=SIZE, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    colours = [COLOURS[2] if item["taken"] else FAINT for item in ranked]
    lowest = min(item["score"] for item in ranked) - 0.3
    left.barh(range(len(ranked)), [item["score"] - lowest for item in ranked], color=colours, height=0.42)
    for place, item in enumerate(ranked):
        words = _item(item["item"]) + (": taken" if item["taken"] else "")
        left.text(0.02, place - 0.27, words, fontsize=8, va="bottom", fontweight="bold" if item["taken"] else None)
    left.set_ylim(len(ranked) - 0.5, -0.9)
    left.axis("off")
    left.set_title("ranked for one user", fontsize=9)
    reach = float(np.abs(added_LE).max())
    right.imshow(added_LE, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
    for (row, column), value in np.ndenumerate(added_LE):
        sign, ink = "+" if value > 0 else "\N{MINUS SIGN}", "white" if abs(value) > 0.6 * reach else INK
        right.text(column, row, sign, ha="center", va="center", fontsize=10, color=ink)
    right.set_yticks(range(len(past)), [_item(item["item"]) for item in past])
    right.set_xticks(range(added_LE.shape[1]))
    right.tick_params(labelsize=8, length=0)
    right.set_xlabel("expert", fontsize=9)
    right.set_title("past items call experts", fontsize=9)
    return figure


def draw_meta_dmoe(run: Path) -> Figure:
    """Two images of each unseen domain that adaptation mended, with the answers before and after."""
    image, *columns = arrays_of(run / "gallery" / "changed.npz", "image", "kind", "domain", "label", "before", "after")
    kind, domain, _, before, after = ([str(word) for word in column] for column in columns)
    roles = {name: told["role"] for name, told in read_json(run / "metrics" / "adaptation.json")["domains"].items()}
    mended = [k for k, what in enumerate(kind) if what == "mended" and roles[domain[k]] == "unseen"]
    places = {name: [k for k in mended if domain[k] == name][:2] for name in dict.fromkeys(domain[k] for k in mended)}
    shown = dict(list(places.items())[:6])
    figure = Figure(figsize=(4.6, 2.3), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, (name, own) in enumerate(shown.items()):
        for row in range(2):
            axis = axes[row, column]
            axis.axis("off")
            if row < len(own):
                k = own[row]
                axis.imshow(image[k], interpolation="nearest")
                axis.set_title(name.replace("_", "\n") if row == 0 else "", fontsize=8)
                words = f"{before[k].removeprefix('digit_')} \N{RIGHTWARDS ARROW} {after[k].removeprefix('digit_')}"
                axis.text(0.5, -0.06, words, ha="center", va="top", fontsize=11, transform=axis.transAxes)
    return figure


def _item(name: str) -> str:
    """An item without its number."""
    return name.partition(": ")[2] or name


DRAWN: dict[str, Callable[[Path], Figure]] = {"home": draw_home, "aw_moe": draw_aw_moe, "meta_dmoe": draw_meta_dmoe}


def main(words: Sequence[str]) -> int:
    """Draw the picture of a system from a run folder."""
    if len(words) != 2 or words[0] not in DRAWN:
        print(f"usage: python -m benchmarks.first_screen {{{','.join(DRAWN)}}} RUN", file=sys.stderr)
        return 2
    system, run = words
    figure: Any = DRAWN[system](newest_version(Path(run)))
    path = FIGURES / f"{system}.png"
    save_figure(figure, path, dpi=DPI, metadata={"Software": None})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
