# SPDX-License-Identifier: Apache-2.0
"""The colours of all figures, and figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeapps.files import WholeFile

INK, FAINT = "#22262e", "#9aa1ad"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#5d4b8c", "#7f7f7f", "#8c564b")
"""Colour of number 0, 1, ...: Okabe and Ito's palette for colour-blind readers, then some more."""


def colour(number: int) -> str:
    """Colour of an expert or another number; repeated after the tenth."""
    return COLOURS[number % len(COLOURS)]


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a matplotlib figure whole or not at all.

    Args:
        figure: what to write.
        path: file to write, its ending says the format; its folder is made.
        options: of ``figure.savefig``, such as ``dpi``.
    """
    with WholeFile(path) as temporary:
        figure.savefig(temporary, **options)
