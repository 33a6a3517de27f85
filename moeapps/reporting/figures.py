# SPDX-License-Identifier: Apache-2.0
"""Figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeapps.files import WholeFile


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a matplotlib figure whole or not at all.

    Args:
        figure: what to write.
        path: file to write, its ending says the format; its folder is made.
        options: of ``figure.savefig``, such as ``dpi``.
    """
    with WholeFile(path) as temporary:
        figure.savefig(temporary, **options)
