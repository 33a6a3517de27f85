# SPDX-License-Identifier: Apache-2.0
"""Pictures of a gate: what each past item of a user added to each expert, and where the gates of a factor's values lie.

Matplotlib is imported when a figure is made and not before. B lists, H past items, K experts, L values of a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moeapps.reporting.figures import FAINT, INK, colour
from moeapps.text import figure_text
from tasks.recommendation.report.attribution import GateSample, mean_gates, prior_of
from tasks.recommendation.report.list_metrics import TAIL

MOST_ITEMS, LONGEST_NAME, MOST_POINTS = 12, 30, 1500
FAINTEST = 0.02
"""Least share of the largest weight that has full colour where past items are drawn."""


def attribution_figure(sample: GateSample, factors: Sequence[str], name: Callable[[int], str]) -> Any:
    """Draw, for each list, past items (rows, latest first) by experts (columns), and the gate's weights above them.

    A dark line in each bar is the weight that a user without a past has, where the gate does not norm its weights.

    Args:
        sample: the lists; with ``parts``.
        factors: names of the factor's values.
        name: item number -> what to call it.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    assert sample.parts is not None
    num, K = len(sample.gate), sample.gate.shape[1]
    shown = [min(int((items >= 0).sum()), MOST_ITEMS) for items in sample.history_item]
    columns = min(num, 2)
    rows = -(-num // columns)
    tallest = [max(shown[r * columns : (r + 1) * columns]) for r in range(rows)]
    heights = [inch for most in tallest for inch in (0.75, 0.24 * most)]
    figure = Figure(figsize=(5.2 * columns, sum(heights) + 0.95 * rows + 0.5), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=heights)
    real = sample.parts[sample.history_item >= 0].abs().flatten()
    largest = float(real.quantile(0.97)) if len(real) else 0.0  # one loud item would pale all others
    # Beside weights that they hardly move, past items are pale: full colour would make much of nothing.
    largest = max(largest, FAINTEST * float(sample.gate.abs().max()), 1e-9)
    image: Any = None
    prior = prior_of(sample)
    for b in range(rows * columns):
        top, below = axes[2 * (b // columns), b % columns], axes[2 * (b // columns) + 1, b % columns]
        if b >= num:
            top.set_visible(False)
            below.set_visible(False)
            continue
        _weights(top, sample.gate[b], prior, float(sample.gate.min()), float(sample.gate.max()))
        top.set_title(_heading(sample, b, factors, name), fontsize=9, color=INK, loc="left")
        parts_HK = torch.full((tallest[b // columns], K), torch.nan)
        parts_HK[: shown[b]] = sample.parts[b, : shown[b]]
        image = below.imshow(parts_HK.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        names = [_short(name(int(item))) for item in sample.history_item[b, : shown[b]].tolist()]
        below.set_yticks(range(len(names)), names, fontsize=7, color=INK)
        below.set_xticks(range(K), [f"expert {k}" for k in range(K)], fontsize=7, color=INK)
        below.set_xticks([k - 0.5 for k in range(1, K)], minor=True)
        below.set_yticks([h - 0.5 for h in range(1, len(names))], minor=True)
        below.grid(which="minor", color="white", linewidth=1.2)
        _bare(below)
    bar = figure.colorbar(image, ax=list(axes.flat), shrink=0.5, aspect=30, pad=0.02, extend="both")
    bar.set_label("added to the gate by a past item", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, color=FAINT, labelcolor=INK)
    bar.outline.set_visible(False)
    return figure


def _weights(axis: Any, gate_K: Tensor, prior_K: Tensor | None, low: float, high: float) -> None:
    """The gate's weights as bars, each above its column; lines where they would be without a past."""
    values = gate_K.tolist()
    if prior_K is not None:
        low, high = min(low, float(prior_K.min())), max(high, float(prior_K.max()))
        axis.hlines(prior_K.tolist(), [k - 0.42 for k in range(len(values))], [k + 0.42 for k in range(len(values))],
                    colors=INK, linewidth=1.2, zorder=3)  # fmt: skip
    colours = ["#b2182b" if value >= 0 else "#2166ac" for value in values]
    axis.bar(range(len(values)), values, width=0.55, color=colours)
    axis.axhline(0, color=FAINT, linewidth=0.8)
    axis.set_xlim(-0.5, len(values) - 0.5)
    room = 0.28 * max(high - low, 1e-9)
    axis.set_ylim(min(low, 0) - room, max(high, 0) + room)
    for k, value in enumerate(values):
        side = "bottom" if value >= 0 else "top"
        line = value if prior_K is None else float(prior_K[k])
        place = max(value, line) if value >= 0 else min(value, line)  # the line does not strike the number out
        axis.text(k, place, f"{value:+.2f}", ha="center", va=side, fontsize=7, color=INK)
    axis.set_xticks([])
    axis.set_yticks([])
    said = "gate" if prior_K is None else "gate\n(line: without\na past)"
    axis.set_ylabel(said, fontsize=7, color=INK, rotation=0, ha="right", va="center")
    _bare(axis)


def gate_figure(sample: GateSample, factors: Sequence[str]) -> Any:
    """Draw the mean gate of each value of the factor (rows) on each expert (columns), and the gates as points.

    Points are directions of gate vectors in their first two principal components, users of the long tail hollow.

    Args:
        sample: the lists.
        factors: names of the factor's values; without any, all lists are one row.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    names = list(factors) or ["all lists"]
    factor = sample.factor if factors else torch.zeros_like(sample.factor)
    means = mean_gates(sample.gate, factor, len(names))
    L, K = means.shape
    figure = Figure(figsize=(2.6 + 0.75 * K + 4.4, max(3.6, 1.2 + 0.42 * L)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.4 + 0.75 * K, 4.4])
    finite = means[means.isfinite()]
    edge = max(float(finite.abs().max()) if finite.numel() else 1.0, 1e-9)
    signed = bool((finite < 0).any())
    look = {"cmap": "RdBu_r", "vmin": -edge, "vmax": edge} if signed else {"cmap": "viridis", "vmin": 0, "vmax": edge}
    image = left.imshow(means.numpy(), aspect="auto", **look)
    for row in range(L):
        for k in range(K):
            value = float(means[row, k])
            dark = abs(value) > 0.6 * edge if signed else value < 0.6 * edge
            if value == value:
                left.text(
                    *(k, row, f"{value:+.2f}" if signed else f"{value:.2f}"),
                    **{"ha": "center", "va": "center", "fontsize": 8, "color": "white" if dark else INK},
                )
    left.set_xticks(range(K), [f"expert {k}" for k in range(K)], fontsize=8, color=INK)
    left.set_yticks(range(L), names, fontsize=8, color=INK)
    left.set_title("mean weight of an expert", fontsize=9, color=INK, loc="left")
    left.set_xticks([k - 0.5 for k in range(1, K)], minor=True)
    left.set_yticks([row - 0.5 for row in range(1, L)], minor=True)
    left.grid(which="minor", color="white", linewidth=1.5)
    _bare(left)
    bar = figure.colorbar(image, ax=left, shrink=0.8, aspect=30)
    bar.ax.tick_params(labelsize=7, color=FAINT, labelcolor=INK)
    bar.outline.set_visible(False)
    _points(right, sample, factor, names)
    return figure


def _points(axis: Any, sample: GateSample, factor: Tensor, names: list[str]) -> None:
    rows = torch.arange(0, len(sample.gate), max(1, len(sample.gate) // MOST_POINTS))
    unit = normalize(sample.gate[rows].double(), dim=1)
    centred = unit - unit.mean(0)
    flat = torch.zeros(len(rows), 2, dtype=torch.float64)
    if len(rows) > 1:
        axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        flat[:, : len(axes)] = centred @ axes.T
    full = sample.events[rows] > TAIL
    for value, name in enumerate(names):
        tint = colour(value)
        own = factor[rows] == value
        dots, rings = flat[own & full], flat[own & ~full]
        axis.scatter(dots[:, 0], dots[:, 1], s=9, color=tint, alpha=0.55, linewidths=0, label=name)
        axis.scatter(rings[:, 0], rings[:, 1], s=14, facecolors="none", edgecolors=tint, alpha=0.55, linewidths=0.7)
    axis.set_title(f"gates of lists (hollow: {TAIL} past items or fewer)", fontsize=9, color=INK, loc="left")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("first two principal components of the gates' directions", fontsize=7, color=INK)
    axis.set_aspect("equal", adjustable="datalim")
    look = {"fontsize": 7, "frameon": False, "labelcolor": INK, "markerscale": 1.6, "handletextpad": 0.1}
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), **look)  # its marks look like those of lists
    _bare(axis)


def _heading(sample: GateSample, b: int, factors: Sequence[str], name: Callable[[int], str]) -> str:
    factor = int(sample.factor[b])
    kind = f", {factors[factor]}" if 0 <= factor < len(factors) else ""
    more = int((sample.history_item[b] >= 0).sum()) - MOST_ITEMS
    hidden = f"\n{more} earlier items not shown" if more > 0 else ""
    return f"user {int(sample.user[b])}{kind}: took {_short(name(int(sample.item[b])))}{hidden}"


def _short(text: str) -> str:
    return figure_text(text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…")


def _bare(axis: Any) -> None:
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(which="both", length=0)
