# SPDX-License-Identifier: Apache-2.0
"""A picture of ranked lists: what was taken stands high in a good one.

Matplotlib is imported when a figure is made and not before. L lists, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moeapps.reporting.figures import COLOURS, FAINT, INK
from moeapps.text import figure_text


def ranks_figure(
    names: Sequence[str], scores: Sequence[Tensor], taken: Sequence[Tensor], *, most: int = 30, title: str = ""
) -> Any:
    """Draw each list as a row of dots, the highest score first; what was taken is dark.

    Args:
        names: one per list.
        scores: of each list [N].
        taken: bool [N].
        most: dots of a row.
        title: above the picture.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 1.0 + 0.26 * len(names)), dpi=80, layout="constrained")
    axis = figure.subplots()
    for row, (score_N, taken_N) in enumerate(zip(scores, taken, strict=True)):
        order = score_N.argsort(descending=True, stable=True)[:most]
        hit = taken_N[order].cpu().bool().tolist()
        axis.scatter(range(len(hit)), [row] * len(hit), s=34, c=[COLOURS[0] if one else "white" for one in hit],
                     edgecolors=[COLOURS[0] if one else FAINT for one in hit], linewidths=0.8)  # fmt: skip
    axis.set_yticks(range(len(names)), [figure_text(name) for name in names])
    axis.invert_yaxis()
    axis.tick_params(labelsize=7, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("place in the list; filled: taken", fontsize=8)
    axis.set_title(figure_text(title), fontsize=9, color=INK, loc="left")
    return figure
