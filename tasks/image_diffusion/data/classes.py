# SPDX-License-Identifier: Apache-2.0
"""Classes by name or number."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def class_numbers(words: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the labels of classes given by name or number.

    Raises:
        ValueError: no such class.
    """
    found = []
    for word in words:
        if word in names:
            found.append(list(names).index(word))
        elif word.isdigit() and int(word) < len(names):
            found.append(int(word))
        else:
            close = difflib.get_close_matches(word, names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise ValueError(f"no class {word!r}; {hint}allowed: 0 to {len(names) - 1}, or {shown}")
    return found
