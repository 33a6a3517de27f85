# SPDX-License-Identifier: Apache-2.0
"""KuaiRand: impressions of a video app with twelve kinds of feedback (Gao et al., CIKM 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moeapps.data.domain import Role
from tasks.recommendation.data.readers.arrow_text import Lookup, Types, read_csv
from tasks.recommendation.data.readers.columns import BagColumn, DenseColumn, IdColumn, TableColumns, TaskColumn
from tasks.recommendation.data.readers.public import PublicLog, by_time, choose, chosen, in_order, instant, replace

Version = Literal["pure", "1k", "27k"]

TASKS = (
    TaskColumn("click", "watch", "is_click"),  # a valid play in a feed of one column
    TaskColumn("long_view", "watch", "long_view"),
    TaskColumn("like", "interaction", "is_like"),
    TaskColumn("comment", "interaction", "is_comment"),
    TaskColumn("forward", "interaction", "is_forward"),
    TaskColumn("follow", "interaction", "is_follow"),
    TaskColumn("profile_enter", "interaction", "is_profile_enter"),
    TaskColumn("hate", "interaction", "is_hate"),
)
TABS = 15
LOG: Types = {
    "user_id": pa.int64(),
    "video_id": pa.int64(),
    "hourmin": pa.int64(),
    "time_ms": pa.int64(),
    **{task.label_column: pa.int8() for task in TASKS},
    "duration_ms": pa.float64(),
    "tab": pa.int64(),
}
VIDEO: Types = {
    "video_id": pa.int64(),
    "author_id": pa.int64(),
    "video_type": pa.string(),
    "upload_type": pa.string(),
    "music_id": pa.string(),
    "tag": pa.string(),
}
USER: Types = {"user_id": pa.int64(), **{f"onehot_feat{k}": pa.string() for k in range(18)}}
POINTED = ("music_id", *list(USER)[1:])  # integers; where some are missing, all are written with a point
STATISTICS = ("show_cnt", "play_cnt", "like_cnt")


class KuaiRand(PublicLog):
    """KuaiRand-Pure, -1K or -27K; domains are the app's tabs, and ``random`` (videos shown at random).

    Source: github.com/chongminggao/KuaiRand, CC BY-SA 4.0 by its readme. Layout: from that readme; NOT tried on the
    real files. CSV with headers: log_standard_4_08_to_4_21_<version>*.csv, log_standard_4_22_to_5_08_<version>*.csv,
    with ``random`` log_random_4_22_to_5_08_<version>.csv, with ``features`` video_features_basic_<version>*.csv and
    user_features_<version>.csv.

    Split by time. Left out: what is known only after the video was shown (play time, stays on pages), counts of
    followers and the degree of activity (snapshots of an unknown day), and by default the video statistics, which are
    averages over the whole month: they see the future.

    Args:
        root: folder of the files.
        version: pure, 1k or 27k.
        tasks: names out of `TASKS`.
        features: join what is known of videos (author, type, music, tags) and users (encrypted codes).
        statistics: join averages of the whole month as well. They LEAK: for comparison with work that uses them.
        random: read the random exposures too, as a domain of their own that is only tested on.
        val_from: first day of the validation, in China's time.
        test_from: first day of the test.
        window: blocks whose rows are shuffled together.

    Raises:
        ValueError: an unknown version or task, or days in the wrong order.
    """

    name = "KuaiRand"
    terms = "CC BY-SA 4.0 (its readme; it was once restricted to institutions in China)"
    get = "Download it from the page github.com/chongminggao/KuaiRand leads to, and unpack it."
    time_unit = 0.001
    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": ["tab_1", "tab_0"],
        "validation": ["tab_2"],
        "unseen": ["tab_4"],
    }

    def __init__(
        self,
        *,
        root: Path,
        version: Version = "pure",
        tasks: tuple[str, ...] = ("click", "long_view", "like", "comment", "forward", "follow"),
        features: bool = False,
        statistics: bool = False,
        random: bool = False,
        val_from: str = "2022-04-22",
        test_from: str = "2022-04-29",
        window: int = 8,
    ) -> None:
        if version not in get_args(Version):
            raise ValueError(f"version={version!r} is unknown; allowed: {', '.join(get_args(Version))}")
        self.cuts = 1000 * instant(val_from, 8), 1000 * instant(test_from, 8)
        in_order(*self.cuts, f"val_from={val_from}, test_from={test_from}")
        self.version, self.features, self.statistics, self.random = version, features, statistics, random
        videos = {"pure": 1 << 14, "1k": 1 << 22, "27k": 1 << 24}[version]
        ids = [IdColumn("user_id", 1 << 16), IdColumn("video_id", videos), IdColumn("tab", TABS + 1, False, 1)]
        dense = [DenseColumn("duration_ms", log=True, mean=10.0)]
        if features:
            ids += [IdColumn("author_id", videos // 2), IdColumn("video_type", 8), IdColumn("upload_type", 64)]
            ids += [IdColumn("music_id", videos // 2), *(IdColumn(name, 2048) for name in list(USER)[1:])]
        if statistics:
            dense += [DenseColumn(name, log=True, mean=5.0, std=3.0) for name in STATISTICS]
        super().__init__(
            root=root,
            columns=TableColumns(
                tasks=chosen(TASKS, tasks),
                user="user_id",
                ids=[*ids, IdColumn("hour", 25, hashed=False, offset=1)],
                bags=[BagColumn("tag", 256, max_length=5)] if features else [],
                dense=dense,
                time="time_ms",
            ),
            domains=[*(f"tab_{k}" for k in range(TABS)), *(["random"] if random else [])],
            settings={"what": [version, features, statistics, random], "cuts": self.cuts},
            window=window,
        )

    def files(self) -> list[Path]:
        """Return logs, then what is joined to them."""
        return [path for pattern in (*self._logs(), *self._joined().values()) for path in self.find(pattern)]

    def _logs(self) -> list[str]:
        periods = ["standard_4_08_to_4_21", "standard_4_22_to_5_08", *(["random_4_22_to_5_08"] if self.random else [])]
        return [f"log_{period}_{self.version}*.csv" for period in periods]

    def _joined(self) -> dict[str, str]:
        basic = {"video": f"video_features_basic_{self.version}*.csv", "user": f"user_features_{self.version}.csv"}
        statistic = {"statistic": f"video_features_statistic_{self.version}*.csv"}
        return (basic if self.features else {}) | (statistic if self.statistics else {})

    def parts(self) -> Iterator[pa.Table]:
        """Yield impressions with their videos' and users' features."""
        types = {
            "video": VIDEO,
            "user": USER,
            "statistic": {"video_id": pa.int64(), **dict.fromkeys(STATISTICS, pa.float64())},
        }
        lookups = {
            kind: Lookup((_whole(t) for p in self.find(pattern) for t in read_csv(p, types[kind])), _key(kind), pattern)
            for kind, pattern in self._joined().items()
        }
        for pattern in self._logs():
            for table in (part for path in self.find(pattern) for part in read_csv(path, LOG)):
                for kind, lookup in lookups.items():
                    table = lookup.add(table, _key(kind))
                split = by_time(table["time_ms"], *self.cuts)
                if "random" in pattern:
                    domain = pa.array(["random"] * len(table))
                    split = pc.if_else(pc.equal(split, "test"), split, pa.scalar(None, pa.string()))
                else:
                    tab = table["tab"].fill_null(TABS).to_numpy()
                    names = [*(f"tab_{k}" for k in range(TABS)), None]
                    domain = choose(np.where((tab >= 0) & (tab < TABS), tab, TABS), names)
                hour = pc.divide(table["hourmin"], 100)  # 1305 is five past one
                yield replace(table, split=split, domain=domain, hour=hour)


def _key(kind: str) -> str:
    return "user_id" if kind == "user" else "video_id"


def _whole(table: pa.Table) -> pa.Table:
    """Make ``7.0`` the integer 7, without a float between."""
    names = [name for name in POINTED if name in table.column_names]
    return replace(
        table,
        **{name: pc.replace_substring_regex(table[name], r"\.0*$", "").cast(pa.int64()) for name in names},
    )
