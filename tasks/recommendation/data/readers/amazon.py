# SPDX-License-Identifier: Apache-2.0
"""Amazon reviews in their editions of 2014, 2018 and 2023 (McAuley's group); a domain is a category of the shop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.recommendation.data.readers.arrow_text import Types, hash_text, read_csv, read_json, read_lines
from tasks.recommendation.data.readers.rating_reader import RatingReader

Edition = Literal["2014", "2018", "2023"]

REVIEWS: dict[str, Types] = {  # names in the order user, item, rating, time
    "2014": {"reviewerID": pa.string(), "asin": pa.string(), "overall": pa.float64(), "unixReviewTime": pa.int64()},
    "2018": {"reviewerID": pa.string(), "asin": pa.string(), "overall": pa.float64(), "unixReviewTime": pa.int64()},
    "2023": {"user_id": pa.string(), "parent_asin": pa.string(), "rating": pa.float64(), "timestamp": pa.int64()},
}
PATTERNS = {"2014": "reviews_{}_5.json", "2018": "{}_5.json", "2023": "{}.*"}
META = {"2014": "meta_{}.json", "2018": "meta_{}.json", "2023": "meta_{}.jsonl"}
# Lines of 2014 are Python literals, not JSON. The first list of categories runs from general to special.
LITERAL = (
    r"""^(?:.*?'asin': '(?P<item>[^']*)')?"""
    r"""(?:.*?'categories': \[\[(?:'[^']*'|"[^"]*")(?:, (?P<kind>'[^']*'|"[^"]*"))?)?.*$"""
)
KINDS = 4096  # size of the table of sub-categories


class AmazonReviews(RatingReader):
    """Reviews of Amazon; each category of the shop is a domain, and negatives come from the positive's own category.

    Source: jmcauley.ucsd.edu/data/amazon (2014), nijianmo.github.io/amazon (2018), amazon-reviews-2023.github.io;
    research use (verify there). Layouts recalled, NOT tried on the real files. 2014 and 2018: JSON lines
    reviews_<category>_5.json and <category>_5.json (reviewerID, asin, overall, unixReviewTime in seconds); 2023: JSON
    lines <category>.jsonl or the benchmark's <category>.csv (user_id, parent_asin, rating, timestamp in milliseconds).
    With ``meta``: meta_<category>.json, whose lines are Python literals in 2014, or meta_<category>.jsonl. All may be
    packed (.gz). Texts, votes and ranks are not read: they are later than the purchase, or look into the future.

    Args:
        root: folder of the files.
        categories: categories as the files' names spell them.
        edition: 2014, 2018 or 2023.
        meta: read the items' sub-categories.

    Raises:
        ValueError: an unknown edition or no category.
    """

    name = "Amazon reviews"
    terms = "research use by its authors' pages (verify them there); cite the edition's paper"
    get = "Download the category's reviews from the edition's page; they may stay packed."

    def __init__(
        self, *, root: Path, categories: tuple[str, ...], edition: Edition = "2023", meta: bool = False
    ) -> None:
        super().__init__(root)
        if edition not in get_args(Edition) or not categories:
            raise ValueError(
                f"edition={edition!r}, categories={list(categories)}: editions are {', '.join(get_args(Edition))}, and "
                "at least one category is needed"
            )
        self.categories, self.edition, self.meta = tuple(categories), edition, meta
        self.domains = self.groups = self.categories
        self.default_roles = {"seen": list(categories), "validation": [], "unseen": []}
        self.items_table = 1 << 20
        self.item_fields = {"category": len(categories) + 1, **({"kind": KINDS} if meta else {})}

    @property
    def settings(self) -> dict[str, Any]:
        """What is read of which edition."""
        return {"categories": self.categories, "edition": self.edition, "meta": self.meta}

    def files(self) -> list[Path]:
        """Return the reviews of each category, then what is known of their items."""
        kinds = [PATTERNS, META] if self.meta else [PATTERNS]
        return [self.find(kind[self.edition].format(name))[0] for kind in kinds for name in self.categories]

    def ratings(self) -> Iterator[pa.Table]:
        """Yield the reviews, category after category."""
        types = REVIEWS[self.edition]
        unit = 1000 if self.edition == "2023" else 1  # milliseconds
        for category, path in zip(self.categories, self.files(), strict=False):
            text = ".csv" in path.suffixes
            for table in read_csv(path, types) if text else read_json(path, types, required=list(types)):
                table = table.select(list(types)).rename_columns(["user", "item", "rating", "time"])
                seconds = pc.divide(table["time"], unit)
                domain = pa.array(np.full(len(table), category, object), pa.string())
                yield table.set_column(3, "time", seconds).append_column("domain", domain)

    def items(self) -> pa.Table:
        """Return each item's category and, with ``meta``, its sub-category as a hash."""
        seen: dict[str, pa.Array] = {}
        for table in self.ratings():
            category = table["domain"][0].as_py()
            new = pc.unique(table["item"])
            seen[category] = pc.unique(pa.concat_arrays([seen[category], new])) if category in seen else new
        parts = []
        for number, items in enumerate(seen.get(category, pa.array([], pa.string())) for category in self.categories):
            columns = {
                "item": items,
                "category": np.full(len(items), number + 1),
                **({"kind": self._kinds(number, items)} if self.meta else {}),
                "group": np.full(len(items), number),
            }
            parts.append(pa.table(columns))
        return pa.concat_tables(parts)

    def _kinds(self, number: int, items: pa.Array) -> pa.Array:
        path = self.files()[len(self.categories) + number]
        described = pa.concat_tables(list(self._described(path))).combine_chunks()
        place = pc.index_in(items, value_set=described["item"].combine_chunks())
        kind = described["kind"].take(place).combine_chunks()
        code = pa.array(1 + (hash_text(kind) % np.uint64(KINDS - 1)).astype(np.int64))
        return pc.if_else(pc.is_valid(kind), code, 0)

    def _described(self, path: Path) -> Iterator[pa.Table]:
        """Yield item and the second of its categories (the first is the whole shop's or the file's own)."""
        if self.edition == "2014":
            said = "a Python literal with 'asin' and 'categories'"
            for table in read_lines(path, LITERAL, expected=said):
                kind = pc.utf8_trim(table["kind"], "'\"")
                yield pa.table({"item": table["item"], "kind": _filled(kind)})
            return
        item, several = ("asin", "category") if self.edition == "2018" else ("parent_asin", "categories")
        for table in read_json(path, {item: pa.string(), several: pa.list_(pa.string())}, required=[item]):
            second = pc.list_slice(table[several].combine_chunks(), 1, 2, return_fixed_size_list=True)
            yield pa.table({"item": table[item], "kind": _filled(pc.list_element(second, 0))})


def _filled(words: pa.Array) -> pa.Array:
    """Make empty text missing."""
    return pc.if_else(pc.equal(words, ""), pa.scalar(None, pa.string()), words)
