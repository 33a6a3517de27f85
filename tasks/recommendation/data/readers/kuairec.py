# SPDX-License-Identifier: Apache-2.0
"""KuaiRec: who watched which video how long, with one part in which nearly all pairs are known (Gao et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moeapps.data.domain import Role
from tasks.recommendation.data.readers.arrow_text import Lookup, Types, read_csv
from tasks.recommendation.data.readers.columns import BagColumn, DenseColumn, IdColumn, TableColumns, TaskColumn
from tasks.recommendation.data.readers.public import PublicLog, by_time, choose, chosen, in_order, instant, replace

TASKS = (
    TaskColumn("half", "watch", "watch_ratio", above=0.5),
    TaskColumn("whole", "watch", "watch_ratio", above=1.0),
    TaskColumn("twice", "watch", "watch_ratio", above=2.0),
)
MATRIX: Types = {
    "user_id": pa.int64(),
    "video_id": pa.int64(),
    "video_duration": pa.float64(),
    "timestamp": pa.float64(),
    "watch_ratio": pa.float64(),
}
LENGTHS = {"short": 7_000.0, "medium": 18_000.0, "long": np.inf}
"""Domains by the video's length in ms, up to and including: where the app's own notion of a view changes."""


class KuaiRec(PublicLog):
    """KuaiRec's big matrix to train on, by length of video, and its nearly complete small matrix to test on.

    Source: github.com/chongminggao/KuaiRec, CC BY-SA 4.0. Layout: from its readme; NOT tried on the real files. CSV
    with headers: big_matrix.csv, small_matrix.csv, item_categories.csv.

    Domains: short (to 7 s), medium (to 18 s) and long videos of the big matrix, and ``small``, only tested on. Both
    matrices cover the same weeks, so both are cut by time; pairs of the small matrix are taken out of the big one, as
    are rows without a time. Left out: the play time, of which the labels are made.

    Args:
        root: folder of the files.
        tasks: names out of `TASKS`: the share of the video that was watched is above 0.5, 1 or 2.
        val_from: first day of the validation, in China's time.
        test_from: first day of the test.
        window: blocks whose rows are shuffled together.

    Raises:
        ValueError: an unknown task, or days in the wrong order.
    """

    name = "KuaiRec"
    terms = "CC BY-SA 4.0"
    get = "Download it from the page github.com/chongminggao/KuaiRec leads to, and unpack it."
    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": ["short", "long"],
        "validation": ["medium"],
        "unseen": ["small"],
    }

    def __init__(
        self,
        *,
        root: Path,
        tasks: tuple[str, ...] = ("half", "whole", "twice"),
        val_from: str = "2020-08-16",
        test_from: str = "2020-08-23",
        window: int = 8,
    ) -> None:
        self.cuts = instant(val_from, 8), instant(test_from, 8)
        in_order(*self.cuts, f"val_from={val_from}, test_from={test_from}")
        super().__init__(
            root=root,
            columns=TableColumns(
                tasks=chosen(TASKS, tasks),
                user="user_id",
                ids=[IdColumn("user_id", 1 << 14), IdColumn("video_id", 1 << 15)],
                bags=[BagColumn("feat", 64, max_length=4, hashed=False, offset=1)],
                dense=[DenseColumn("video_duration", log=True, mean=9.0)],
                time="timestamp",
            ),
            domains=[*LENGTHS, "small"],
            settings={"cuts": self.cuts},
            window=window,
        )

    def files(self) -> list[Path]:
        """Return both matrices and the categories."""
        names = ("big_matrix.csv", "small_matrix.csv", "item_categories.csv")
        return [path for name in names for path in self.find(name)]

    def parts(self) -> Iterator[pa.Table]:
        """Yield the rows of the big matrix, then those of the small one."""
        big, small, items = self.files()
        feats = Lookup(read_csv(items, {"video_id": pa.int64(), "feat": pa.string()}), "video_id", str(items))
        # The pairs alone of the small matrix: 37 MB.
        tested = np.sort(np.concatenate([_pairs(table) for table in read_csv(small, MATRIX)]))
        for path in (big, small):
            for table in read_csv(path, MATRIX):
                split = by_time(table["timestamp"], *self.cuts)
                if path == big:
                    length = np.searchsorted(list(LENGTHS.values()), table["video_duration"].fill_null(0).to_numpy())
                    # Sorted once; isin would sort all pairs anew for each part.
                    near = np.minimum(np.searchsorted(tested, _pairs(table)), len(tested) - 1)
                    place = np.where(tested[near] == _pairs(table), len(LENGTHS), length)
                    domain = choose(place, [*LENGTHS, None])
                else:
                    domain = pc.if_else(pc.equal(split, "test"), "small", pa.scalar(None, pa.string()))
                table = feats.add(table, "video_id")
                yield replace(table, split=split, domain=domain, feat=_numbers(table["feat"]))


def _pairs(table: pa.Table) -> NDArray[np.int64]:
    """One number per (user, video); both have far fewer than 31 bits."""
    return np.asarray((table["user_id"].to_numpy() << 32) + table["video_id"].to_numpy())


def _numbers(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Make ``[27, 9]`` a list of integers."""
    bare = pc.replace_substring_regex(text, r"[\[\]\s]", "")
    bare = pc.if_else(pc.equal(bare, ""), pa.scalar(None, pa.string()), bare)
    return pc.split_pattern(bare, ",").cast(pa.list_(pa.int64()))
