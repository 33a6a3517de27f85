# SPDX-License-Identifier: Apache-2.0
"""Plotly drawings as plain dictionaries, and colours of numbers; plotly itself is not imported.

Colours are Okabe and Ito's for kinds and viridis for amounts: both are told apart by colour-blind readers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from moeapps.reporting.figures import colour
from moeapps.text import plain

Series = tuple[Sequence[float], Sequence[float]]
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "x", "pentagon")
_VIRIDIS = (
    *((68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142)),
    *((31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37)),
)


def words(value: object) -> str:
    """Text that plotly shows as it is: it takes some tags, and links, for markup."""
    return html.escape(plain(value), quote=False)


def viridis(share: float) -> tuple[str, str]:
    """Colour of an amount in [0, 1] as ``#rrggbb``, and the colour of text on it."""
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(place), len(_VIRIDIS) - 2)
    part = place - low
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(_VIRIDIS[low], _VIRIDIS[low + 1], strict=True))
    light = (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255
    return f"#{red:02x}{green:02x}{blue:02x}", "#111111" if light > 0.45 else "#ffffff"


def lines(series: Mapping[str, Series], *, markers: bool = False) -> list[dict[str, Any]]:
    """One line per name; colours, and dashes beyond the tenth, tell them apart."""
    return [
        {
            "type": "scatter",
            "mode": "lines+markers" if markers or len(xs) < 30 else "lines",
            "x": list(map(_finite, xs)),
            "y": list(map(_finite, ys)),
            "name": words(name),
            "line": {"color": colour(k), "width": 2, "dash": DASHES[k // 10 % len(DASHES)]},
            "marker": {"size": 5, "symbol": SYMBOLS[k % len(SYMBOLS)]},
        }
        for k, (name, (xs, ys)) in enumerate(series.items())
    ]


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    """A layout with titles of both axes."""
    return {"xaxis": {"title": {"text": words(x)}}, "yaxis": {"title": {"text": words(y)}}, **more}


def dots(
    columns: Sequence[str], rows: Mapping[str, Sequence[tuple[float | None, float | None, float | None]]]
) -> list[dict[str, Any]]:
    """Scores with intervals: one row of dots per name.

    Args:
        columns: where on the axis.
        rows: name -> value, low, high of each column; None for nothing.
    """
    traces = []
    for k, (name, cells) in enumerate(rows.items()):
        up = [None if None in cell else cell[2] - cell[0] for cell in cells]  # type: ignore[operator]
        down = [None if None in cell else cell[0] - cell[1] for cell in cells]  # type: ignore[operator]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [words(column) for column in columns],
                "y": [cell[0] for cell in cells],
                "name": words(name),
                "marker": {"size": 10, "symbol": SYMBOLS[k % len(SYMBOLS)], "color": colour(k)},
                "error_y": {"type": "data", "array": up, "arrayminus": down, "symmetric": False, "width": 3},
            }
        )
    return traces


def heat(rows: Sequence[Sequence[float]], down: Sequence[str], across: Sequence[str], **more: Any) -> dict[str, Any]:
    """A heat map of amounts."""
    return {
        "type": "heatmap",
        "z": [list(map(_finite, row)) for row in rows],
        "y": [words(name) for name in down],
        "x": [words(name) for name in across],
        "colorscale": "Viridis",
        **more,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
