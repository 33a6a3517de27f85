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
    hidden = {id(text) for panel in figure.axes for text in _left_out(panel)}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and id(text) not in hidden]
    texts = [text for text in texts if text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    # The boxes of slanted texts overlap where the texts do not.
    upright = [pair for pair, text in zip(boxes, texts, strict=True) if not text.get_rotation() % 90]
    for (one, box), (other, beside) in combinations(upright, 2):
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


def _left_out(panel: Any) -> list[Text]:
    """Texts of a panel that are not in the picture: all of a hidden one, spare ticks and ticks beyond the limits."""
    if not panel.get_visible():
        return list(panel.findobj(Text))
    found: list[Text] = []
    for place, (axis, limits) in enumerate(((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim()))):
        if not panel.axison:
            found += axis.findobj(Text)
        used = axis.get_ticklabels(which="both")
        for tick in (*axis.majorTicks, *axis.minorTicks):
            for label in (tick.label1, tick.label2):
                if label not in used or not min(limits) <= label.get_position()[place] <= max(limits):
                    found.append(label)
    return found


def _overlap(box: Any, beside: Any) -> bool:
    return min(box.x1, beside.x1) - max(box.x0, beside.x0) > 1 and min(box.y1, beside.y1) - max(box.y0, beside.y0) > 1
