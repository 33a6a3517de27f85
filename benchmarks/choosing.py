# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/choosing_a_router.md from committed results: ``python -m benchmarks.choosing``."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.markdown import wrapped
from benchmarks.readme import ROOT, claim_of, claim_rows, holds
from moeapps.files import write_text

PAGE = ROOT / "docs" / "choosing_a_router.md"
BLOCK = re.compile(r"(<!-- choosing:begin -->\n).*?(<!-- choosing:end -->)", re.DOTALL)
QUESTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "Does it matter which expert a row gets?": (
        ("point_moe", "C1c"),
        ("promoe", "C1e"),
        ("home", "C4g"),
        ("home", "C4h"),
        ("aw_moe", "C8e"),
        ("aw_moe", "C8f"),
        ("mixer", "C2i"),
        ("mixer", "C2o"),
    ),
    "Which score?": (
        ("promoe", "C1c"),
        ("promoe", "C2b"),
        ("promoe", "C2c"),
        ("promoe", "C3a"),
        ("promoe", "C3c"),
        ("aw_moe", "C2a"),
        ("aw_moe", "C2d"),
        ("aw_moe", "C8a"),
        ("aw_moe", "C8b"),
        ("aw_moe", "C8c"),
        ("aw_moe", "C8d"),
    ),
    "Fitted or trained, where rows have hidden families?": (
        ("mixer", "C2f"),
        ("mixer", "C2g"),
        ("mixer", "C2h"),
        ("mixer", "C2q"),
        ("mixer", "C2j"),
        ("mixer", "C2l"),
        ("mixer", "C2k"),
        ("mixer", "C2p"),
    ),
    "As many experts as a row needs?": (
        ("unimoe_audio", "C6a"),
        ("unimoe_audio", "C6b"),
        ("unimoe_audio", "C6c"),
        ("unimoe_audio", "C6d"),
        ("unimoe_audio", "C6e"),
        ("unimoe_audio", "C6g"),
    ),
    "A shared expert, an expert for rows without a condition, given groups?": (
        ("point_moe", "C4c"),
        ("unimoe_audio", "C6f"),
        ("promoe", "C4a"),
        ("promoe", "C4b"),
        ("home", "C4f"),
    ),
    "Is a balance loss needed?": (
        ("point_moe", "C4a"),
        ("point_moe", "C4b"),
        ("promoe", "C5a"),
        ("promoe", "C5b"),
    ),
}
"""What a reader asks -> system and claim: comparisons of the evidence in which the router is what differs."""


_VERBS = (
    ("supported", "holds", "hold"),
    ("not supported", "does not", "do not"),
    ("inconclusive", "is open", "are open"),
)


def tables() -> str:
    """Return the Markdown of all questions: for each how many claims hold, then a row per claim."""
    parts = []
    for question, claims in QUESTIONS.items():
        found = [claim_of(system, name)["verdict"] for system, name in claims]
        counts = [found.count(word) for word, *_ in _VERBS]
        verbs = zip(counts, _VERBS, strict=True)
        told = [f"{count or 'none'} {one if count == 1 else many}" for count, (_, one, many) in verbs]
        lone = sum(holds(claim_of(system, name)).endswith(", alone") for system, name in claims)
        told += [f"{lone} of those decided {'stands' if lone == 1 else 'stand'} alone"] if lone else []
        told += [f"{untested} could not be tested"] if (untested := len(found) - sum(counts)) else []
        parts.append(f"### {question}\n\nOf {len(found)} claims {', '.join(told)}.\n\n{claim_rows(claims)}")
    return "\n" + "\n".join(parts) + "\n"


def write_page(page: Path) -> None:
    """Replace the block between the marks."""
    text = page.read_text(encoding="utf-8")
    write_text(page, BLOCK.sub(lambda found: found[1] + wrapped(tables()) + found[2], text))


if __name__ == "__main__":
    write_page(PAGE)
