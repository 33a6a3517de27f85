# SPDX-License-Identifier: Apache-2.0
"""Heat maps of expert by domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from moeapps.moe.metrics import expert_domain_matrix
from moeapps.reporting.figures import INK
from moeapps.text import figure_text

WIDEST_TITLE = 22
"""Characters of a line above a map: more would run into the next map's."""


def routing_figure(layers: Mapping[str, Mapping[str, Any]], domains: Sequence[str], columns: int = 6) -> Figure | None:
    """Draw p(expert | domain) of every layer: one small map per layer, domains down, experts across.

    A layer of one expert has nothing to show and is left out. Experts that the router does not choose but is told to
    use are grey with their share as a number: what they get would flatten the colours of the chosen ones.

    Args:
        layers: layer name -> its report: ``work`` [S, E] of each expert for each domain (assignments or summed
            weights); how many of the last experts are ``given``, 0 where it is not said; how many work on each row,
            ``per_row``, where that is known.
        domains: the S names.
        columns: maps side by side.

    Returns:
        A figure that belongs to no window and no global state; None where no layer has two experts.
    """
    shown = {name: report for name, report in layers.items() if len(report["work"][0]) > 1}
    if not shown:
        return None
    columns = max(1, min(columns, len(shown)))
    rows = math.ceil(len(shown) / columns)
    widest = max(len(report["work"][0]) for report in shown.values())
    titles = [_folded(name) for name in short_names(list(shown))]
    head = 0.7 + 0.12 * max(title.count("\n") for title in titles)
    size = (1.6 + columns * max(1.6, 0.28 * widest), 0.7 + rows * (head + 0.15 + 0.22 * len(domains)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    labels = torch.arange(len(domains))
    maps = [
        expert_domain_matrix(torch.tensor(report["work"]), labels, len(domains)).numpy() for report in shown.values()
    ]
    chosen = [table.shape[1] - int(report.get("given", 0)) for table, report in zip(maps, shown.values(), strict=True)]
    highest = max(float(table[:, :number].max(initial=0.0)) for table, number in zip(maps, chosen, strict=True))
    image: Any = None
    for axis, title, table, number, report in zip(axes.flat, titles, maps, chosen, shown.values(), strict=False):
        coloured = np.where(np.arange(table.shape[1]) < number, table, np.nan)
        image = axis.imshow(coloured, vmin=0.0, vmax=highest or 1.0, cmap="viridis", aspect="auto")
        axis.set_facecolor("#d9d9d9")
        for row, k in np.ndindex(table[:, number:].shape):
            share = f"{table[row, number + k]:.2f}"
            axis.text(number + k, row, share, ha="center", va="center", fontsize=5, color=INK)
        axis.set_title(title, fontsize=7)
        words = [str(k) if k < number else "given" for k in range(table.shape[1])]
        axis.set_xticks(range(table.shape[1]), words)
        several = f" ({report['per_row']} work on each row)" if (report.get("per_row") or 1) > 1 else ""
        grey = "\n(given: not chosen by the router)" if number < table.shape[1] else ""
        axis.set_xlabel(f"expert{several}{grey}", fontsize=6)
        axis.set_yticks(range(len(domains)), [figure_text(name) for name in domains])
        axis.tick_params(labelsize=6)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=40, fraction=0.05)
    bar.set_label("share of a domain's work,\np(expert | domain)", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return figure


def short_names(names: Sequence[str]) -> list[str]:
    """Names of layers without the parts that all of them begin and end with; a single one stays whole.

    >>> short_names(["net.encoder.0.attn.proj", "net.decoder.1.attn.proj"])
    ['encoder.0', 'decoder.1']
    """
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    front = _alike(parts)
    back = _alike([own[front:][::-1] for own in parts])
    # A name that is all of the others' common beginning would be left without a word.
    return [".".join(own[front : len(own) - back]) or name for own, name in zip(parts, names, strict=True)]


def _alike(parts: Sequence[Sequence[str]]) -> int:
    """How many first parts all have in common."""
    same = [len(set(column)) == 1 for column in zip(*parts, strict=False)]
    return next((place for place, one in enumerate(same) if not one), len(same))


def _folded(name: str) -> str:
    """A name on lines of at most `WIDEST_TITLE` characters, broken at its dots as far as it has them."""
    lines = [""]
    for part in figure_text(name).replace(".", ".\0").split("\0"):
        if lines[-1] and len(lines[-1] + part) > WIDEST_TITLE:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
