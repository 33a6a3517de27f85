# SPDX-License-Identifier: Apache-2.0
"""Text that comes from files (names of runs, metrics, domains, classes) made harmless where it is shown.

A name may hold what a terminal obeys (control characters), what turns the direction of reading, or what is markup to
rich, Markdown or HTML. Shown, it is one line of visible characters.
"""

from __future__ import annotations

import html
import logging
import re
import unicodedata

_MOST = 200
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the wide ones too
_NUMBER = re.compile(r"[+-](\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# What begins markup inside of a line: code, emphasis (an underscore inside of a word begins none), cells, formulas.
_MARKDOWN = re.compile(r"([\\`*|$]|~~|(?<![^\W_])_|_(?![^\W_])|(?<=\])[(\[:])")


def plain(value: object, most: int = _MOST) -> str:
    r"""Return text as one line of visible characters: others as escapes, the middle of a long one left out.

    Args:
        value: what to show.
        most: characters of the result at most.

    >>> plain("a\x1b[31m\nb")
    'a\\x1b[31m\\nb'
    """
    text = str(value)
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[len(text) - most // 2 :]}"
    return "".join(sign if _visible(sign) else _escape(sign) for sign in text)


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")


def _visible(sign: str) -> bool:
    # C: control, format (among them the marks that turn the direction of reading), surrogates; Z: all but the blank
    return sign == " " or unicodedata.category(sign)[0] not in "CZ"


def lines(value: object) -> str:
    r"""Return text whose lines are of visible characters; line breaks and tabs stay.

    >>> lines("a\x1b[2J\nb")
    'a\\x1b[2J\nb'
    """
    return "".join(sign if sign in "\n\t" or _visible(sign) else _escape(sign) for sign in str(value))


class VisibleLines(logging.Formatter):
    """Log lines of visible characters: they may hold names out of files."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return lines(super().format(record))


def markdown(value: object, most: int = _MOST) -> str:
    r"""Return text that Markdown shows as it is inside of a line, also in a cell of a table.

    >>> markdown("a|b <i>*c* [d](e)")
    'a\\|b &lt;i&gt;\\*c\\* [d]\\(e)'
    """
    safe = html.escape(plain(value, most), quote=False)
    return _MARKDOWN.sub(r"\\\1", safe)


def cell(value: object) -> object:
    """Return a value as a cell of CSV that no spreadsheet takes for a formula: text gets a ``'`` before its ``=+-@``.

    Numbers, also those that are text, stay; so does what is inside of a cell.

    >>> cell("=1+1"), cell("-1.5"), cell(-1.5), cell("a=b")
    ("'=1+1", '-1.5', -1.5, 'a=b')
    """
    text = isinstance(value, str) and value.lstrip().startswith(_FORMULA)
    return f"'{value}" if text and not _NUMBER.fullmatch(str(value)) else value


def figure_text(value: object) -> str:
    r"""Return text that matplotlib shows as it is: no formula begins in it.

    >>> figure_text("a $x$")
    'a \\$x\\$'
    """
    return plain(value).replace("$", r"\$")


def html_text(value: object) -> str:
    """Return text that HTML shows as it is, also in an attribute.

    >>> html_text('<script>"')
    '&lt;script&gt;&quot;'
    """
    return html.escape(plain(value), quote=True)
