# SPDX-License-Identifier: Apache-2.0
"""Pictures of a test of adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from moeapps.text import figure_text, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_NAME = 16
"""Characters of a name above an image: longer ones would run into the next image's."""


def attention_figure(share: Sequence[Sequence[float]], domains: Sequence[str], experts: Sequence[str]) -> Figure:
    """Draw how much the aggregator attends to each expert (across) in each domain (down).

    Args:
        share: one row per domain, which sums to 1.
        domains: their names.
        experts: names of the experts.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 2.5 + 0.5 * len(experts)), 1.6 + 0.26 * len(domains)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(np.asarray(share), vmin=0.0, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(experts)), list(experts), rotation=60, ha="right")
    axis.set_yticks(range(len(domains)), list(domains))
    axis.tick_params(labelsize=7)
    axis.set_title("attention of the aggregator to each expert", fontsize=9)
    axis.set_xlabel("expert", fontsize=8)
    axis.set_ylabel("domain", fontsize=8)
    bar = figure.colorbar(image, ax=axis)
    bar.set_label("share of the attention", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def gain_figure(scores: Mapping[str, tuple[float, float]], metric: str) -> Figure:
    """Draw the score of each domain before (open) and after (filled) adaptation.

    Args:
        scores: domain -> after, before.
        metric: its name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 1.2 + 0.26 * len(scores)), layout="constrained")
    axis = figure.subplots()
    for place, (after, before) in enumerate(scores.values()):
        axis.plot([before, after], [place, place], color="tab:green" if after >= before else "tab:red", lw=2)
        axis.plot(before, place, "o", mfc="white", mec="black", ms=5)
        axis.plot(after, place, "o", color="black", ms=5)
    axis.set_yticks(range(len(scores)), list(scores))
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_xlabel(f"{metric}: before (open) and after (filled) adaptation", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    return figure


def pictures_of(answer: Any, names: Sequence[str], most: int = 6) -> dict[str, Figure]:
    """Draw images of one episode whose answer adaptation changed, and some that stayed.

    Args:
        answer: `tasks.adaptation.nets.adapters.Answer` to images with classes.
        names: of the classes.
        most: images of a kind.
    """
    before, after, label = answer.before.argmax(-1), answer.after.argmax(-1), answer.query.label
    kinds = {
        "mended": (after == label) & (before != label),
        "spoilt": (after != label) & (before == label),
        "as it was": after == before,
    }
    found = {
        kind: [
            (answer.domain, answer.query.image[q].cpu(), int(label[q]), int(before[q]), int(after[q]))
            for q in (rows & (label >= 0)).nonzero().flatten()[:most].tolist()
        ]
        for kind, rows in kinds.items()
    }
    return {"adapted": changed_figure(found, names)} if any(found.values()) else {}


def changed_figure(changed: Mapping[str, Sequence[tuple[str, Tensor, int, int, int]]], names: Sequence[str]) -> Figure:
    """Draw images whose answer adaptation made right (upper rows) or wrong (lower rows).

    Args:
        changed: ``mended`` and ``spoilt`` -> domain, image [C, H, W] in [-1, 1], label, answer before, answer after.
        names: of the classes.
    """
    columns = max(1, *(len(items) for items in changed.values()))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * columns + 0.3, 2.4 * len(changed)), layout="constrained")
    axes = figure.subplots(len(changed), columns, squeeze=False)
    said = [figure_text(plain(name, LONGEST_NAME)) for name in names]
    for row, (kind, items) in zip(axes, changed.items(), strict=True):
        row[0].set_ylabel(kind, fontsize=8)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
        for axis, (domain, image, label, before, after) in zip(row, items, strict=False):
            pixels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
            axis.imshow(((pixels + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
            answers = f"true: {said[label]}\nbefore: {said[before]}\nafter: {said[after]}"
            axis.set_title(f"{figure_text(plain(domain, LONGEST_NAME))}\n{answers}", fontsize=6, loc="left")
    return figure
