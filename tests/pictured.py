# SPDX-License-Identifier: Apache-2.0
"""What every figure has to keep: texts can be read, and a legend lies where no data can."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def check_readable(figure: Any) -> None:
    """Assert that no two texts of a figure overlap, none is cut at its edge, and no legend lies in a panel.

    Args:
        figure: a ``matplotlib.figure.Figure``.
    """
    FigureCanvasAgg(figure).draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if _is_drawn(text)]
    for (one, box), (other, beside) in combinations(boxes, 2):
        width = min(box.x1, beside.x1) - max(box.x0, beside.x0)
        height = min(box.y1, beside.y1) - max(box.y0, beside.y0)
        assert width < 1 or height < 1, f"{one!r} lies over {other!r}"
    edge = figure.bbox
    for text, box in boxes:
        assert box.x0 > -1, f"{text!r} is cut"
        assert box.y0 > -1, f"{text!r} is cut"
        assert box.x1 < edge.x1 + 1, f"{text!r} is cut"
        assert box.y1 < edge.y1 + 1, f"{text!r} is cut"
    panels = [axis.get_window_extent() for axis in figure.axes if axis.get_visible()]
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend() is not None)]
    for legend in legends:
        assert not any(_overlap(legend.get_window_extent(), panel) for panel in panels), "a legend lies in a panel"


def _is_drawn(text: Text) -> bool:
    """Whether a text is in its figure's picture: ticks beyond the limits and those of hidden panels are not."""
    axis = text.axes
    if axis is None:
        return True
    if not axis.get_visible():
        return False
    ticks = [*axis.get_xticklabels(which="both"), *axis.get_yticklabels(which="both")]
    if not axis.axison and (text in ticks or text in (axis.xaxis.label, axis.yaxis.label)):
        return False
    if text not in ticks:
        return True
    (x0, x1), (y0, y1) = sorted(axis.get_xlim()), sorted(axis.get_ylim())
    x, y = text.get_position()
    return x0 <= x <= x1 if text in axis.get_xticklabels(which="both") else y0 <= y <= y1


def _overlap(box: Any, beside: Any) -> bool:
    return min(box.x1, beside.x1) - max(box.x0, beside.x0) > 1 and min(box.y1, beside.y1) - max(box.y0, beside.y0) > 1
