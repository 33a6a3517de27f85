# SPDX-License-Identifier: Apache-2.0
"""Wrap Markdown at 120 columns: ``python -m benchmarks.markdown PAGE...`` rewrites pages in place."""

from __future__ import annotations

import sys
from pathlib import Path

from moeapps.reporting.wrapping import WIDTH, wrapped

__all__ = ["WIDTH", "wrapped"]


def main(pages: list[str]) -> int:
    """Wrap the named pages."""
    for name in pages:
        page = Path(name)
        page.write_text(wrapped(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
