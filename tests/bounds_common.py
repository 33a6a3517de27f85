# SPDX-License-Identifier: Apache-2.0
"""What the tests of bounds ask of every reader: to refuse a file in one sentence, within bounds.

Every attack runs in a process of its own, see tests/guarded.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.guarded import guarded

Read = Callable[[Path], object]
HUGE = 2**40


def told(read: Read, path: Path, *words: str) -> str:
    """Read a file in a guarded process, which must refuse it in one sentence within the bounds."""
    found = guarded(partial(read, path))
    assert found.kind.endswith("Error"), found
    assert found.kind not in ("MemoryError", "RecursionError", "KeyError", "TypeError"), found
    assert found.within(path.stat().st_size if path.is_file() else 0), found
    assert all(word in found.text for word in words), found
    assert len(found.text) < 1500, found
    return found.text
