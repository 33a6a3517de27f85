# SPDX-License-Identifier: Apache-2.0
"""Text that comes from files (names of runs, metrics, domains, classes) made harmless where it is shown.

A name may hold what a terminal obeys (control characters), what turns the direction of reading, or what is markup to
rich, Markdown or HTML. Shown, it is one line of visible characters.
"""

from __future__ import annotations

import html
import re
import unicodedata

_MOST = 200
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!$])")


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
    return "".join(sign if _visible(sign) else sign.encode("unicode_escape").decode("ascii") for sign in text)


def _visible(sign: str) -> bool:
    # C: control, format (among them the marks that turn the direction of reading), surrogates; Z: all but the blank
    return sign == " " or unicodedata.category(sign)[0] not in "CZ"


def markdown(value: object) -> str:
    r"""Return text that Markdown shows as it is, also in a cell of a table.

    >>> markdown("a|b <i>*c*")
    'a\\|b &lt;i&gt;\\*c\\*'
    """
    return _MARKDOWN.sub(r"\\\1", plain(value)).replace(r"\<", "&lt;").replace(r"\>", "&gt;")


def markup(value: object) -> str:
    r"""Return text that rich shows as it is.

    >>> markup("[red]a")
    '\\[red]a'
    """
    from rich.markup import escape

    return escape(plain(value))


def html_text(value: object) -> str:
    """Return text that HTML shows as it is, also in an attribute.

    >>> html_text('<script>"')
    '&lt;script&gt;&quot;'
    """
    return html.escape(plain(value), quote=True)
