# SPDX-License-Identifier: Apache-2.0
"""Heat maps of expert by domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from moeapps.moe.metrics import expert_domain_matrix


def routing_figure(work: Mapping[str, Sequence[Sequence[float]]], domains: Sequence[str], columns: int = 6) -> Figure:
    """Draw p(expert | domain) of every layer: one small map per layer, domains down, experts across.

    Args:
        work: layer name -> work [S, E] of each expert for each domain (assignments or summed weights).
        domains: the S names.
        columns: maps side by side.

    Returns:
        A figure that belongs to no window and no global state.
    """
    columns = max(1, min(columns, len(work)))
    rows = math.ceil(len(work) / columns)
    widest = max(len(table[0]) for table in work.values())
    size = (1.6 + columns * max(1.6, 0.28 * widest), 0.6 + rows * (0.7 + 0.22 * len(domains)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    labels = torch.arange(len(domains))
    maps = {name: expert_domain_matrix(torch.tensor(table), labels, len(domains)) for name, table in work.items()}
    highest = max(float(matrix_SE.max()) for matrix_SE in maps.values())
    image = None
    for axis, (name, matrix_SE) in zip(axes.flat, maps.items(), strict=False):
        image = axis.imshow(matrix_SE.numpy(), vmin=0.0, vmax=highest, cmap="viridis", aspect="auto")
        axis.set_title(name, fontsize=7)
        axis.set_xticks(range(matrix_SE.shape[1]))
        axis.set_yticks(range(len(domains)), list(domains))
        axis.tick_params(labelsize=6)
    for axis in list(axes.flat)[len(work) :]:
        axis.set_visible(False)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=40, fraction=0.05)
        bar.set_label("p(expert | domain)", fontsize=7)
        bar.ax.tick_params(labelsize=6)
    return figure
