# SPDX-License-Identifier: Apache-2.0
"""Wrap Markdown at 120 columns.

Paragraphs and list items with a longer line are filled anew; tables, code, headings and pictures stay as they are.
"""

from __future__ import annotations

import re
import textwrap

WIDTH = 120
_ITEM = re.compile(r"\s*(?:[-*] |\d+\. )")
_FIXED = re.compile(r"\s*(?:\||#|<|!\[|---|\[[^\]]+\]:|$)")
_BLANK_IN_CODE = "\0"


def wrapped(text: str) -> str:
    """Return the text with no line of a paragraph or list item longer than `WIDTH`; only line breaks change."""
    lines: list[str] = []
    block: list[str] = []
    in_code = False
    for line in text.split("\n"):
        fence = line.lstrip().startswith("```")
        if fence or in_code or _FIXED.match(line):
            lines += _filled(block)
            lines.append(line)
            block, in_code = [], in_code != fence
        elif _ITEM.match(line):
            lines += _filled(block)
            block = [line]
        else:
            block.append(line)
    return "\n".join([*lines, *_filled(block)])


def _filled(block: list[str]) -> list[str]:
    """Fill one paragraph or item; code between backticks is not broken, and no new line looks like a list item."""
    if all(len(line) <= WIDTH for line in block):
        return block
    item = _ITEM.match(block[0])
    lead = item[0] if item else re.match(r"\s*", block[0])[0]  # type: ignore[index]
    text = " ".join(line.strip() for line in [block[0][len(lead) :], *block[1:]])
    text = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", _BLANK_IN_CODE), text)
    text = re.sub(r" (?=(?:[-*+>#|]|\d+[.)]) )", _BLANK_IN_CODE, text)
    filled = textwrap.wrap(
        text,
        WIDTH,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_BLANK_IN_CODE, " ") for line in filled]
