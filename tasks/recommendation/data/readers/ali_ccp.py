# SPDX-License-Identifier: Apache-2.0
"""Ali-CCP: recommendations of Taobao, with clicks and purchases after them (Ma et al., ESMM, SIGIR 2018)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moeapps.data.domain import Role
from tasks.recommendation.data.readers.arrow_text import Lookup, Types, read_csv, share_of
from tasks.recommendation.data.readers.columns import BagColumn, DenseColumn, IdColumn, TableColumns, TaskColumn
from tasks.recommendation.data.readers.public import PublicLog, choose, replace
from tasks.recommendation.data.readers.values import TableError

COMMON = ["101", "121", "122", "124", "125", "126", "127", "128", "129"]  # of the user
OWN = ["205", "206", "207", "210", "216", "301"]  # of the item and the context
CROSSED = ["508", "509", "702", "853"]  # of both, with a number each
PAST = ["109_14", "110_14", "127_14", "150_14"]  # of the user, several each
SKELETON: Types = {
    "sample": pa.string(),
    "click": pa.int8(),
    "purchase": pa.int8(),
    "key": pa.string(),
    "count": pa.int64(),
    "features": pa.string(),
}
SHARED: Types = {"key": pa.string(), "count": pa.int64(), "features": pa.string()}
SCENARIOS = ("scenario_1", "scenario_2", "scenario_3")
FEATURE = "^(?P<field>[^\x02]*)\x02(?P<id>[0-9]+)\x03(?P<value>.*)$"


class AliCCP(PublicLog):
    """Impressions of Taobao; domains are the three values of field 301, in the order of their numbers.

    Source: tianchi.aliyun.com/dataset/408, research use under the host's terms (verify). Layout: from the code of
    torch-rechub; NOT tried on the real files. CSV without headers: sample_skeleton_{train,test}.csv (sample, click,
    purchase, key, number of features, features) and common_features_{train,test}.csv (key, number, features), joined
    by the key. Features are separated by byte 1; each is ``field <byte 2> id <byte 3> value``.

    There is no time in it: training and test are the published files, of which the validation takes all rows of a key
    out of the training ones. A key that is in both is taken out of the training. Rows bought without a click are left
    out. Conversion counts among clicks alone (its mask); ``purchase`` counts everywhere. The common features, about a
    hundred megabytes as columns, are held in memory.

    Args:
        root: folder of the files.
        val_share: share of the training keys that validate.
        cardinality: size of the table of each field.
        window: blocks whose rows are shuffled together.

    Raises:
        ValueError: a share that is not between 0 and 1.
    """

    name = "Ali-CCP"
    terms = "research use under the terms of its host, Tianchi (verify them there)"
    get = "Download the archives of tianchi.aliyun.com/dataset/408 and unpack them."
    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": [SCENARIOS[0]],
        "validation": [SCENARIOS[1]],
        "unseen": [SCENARIOS[2]],
    }

    def __init__(self, *, root: Path, val_share: float = 0.1, cardinality: int = 1 << 18, window: int = 8) -> None:
        if not 0 < val_share < 1:
            raise ValueError(f"val_share={val_share} must be between 0 and 1")
        self.val_share = val_share
        super().__init__(
            root=root,
            columns=TableColumns(
                tasks=[
                    TaskColumn("click", "click", "click"),
                    TaskColumn("purchase", "order", "purchase"),
                    TaskColumn("conversion", "order", "purchase", mask_column="click"),
                ],
                user="key",
                ids=[IdColumn(name, cardinality) for name in (*COMMON, *OWN, *CROSSED)],
                bags=[BagColumn(name, cardinality) for name in PAST],
                dense=[DenseColumn(f"{name}_value") for name in CROSSED],
            ),
            domains=SCENARIOS,
            settings={"val_share": val_share},
            window=window,
        )

    def files(self) -> list[Path]:
        """Return the four files."""
        names = (
            f"{what}_{split}.csv" for split in ("train", "test") for what in ("sample_skeleton", "common_features")
        )
        return [path for name in names for path in self.find(name)]

    @cached_property
    def scenarios(self) -> pa.Array:
        """The three values of field 301, sorted; as much is read as shows them."""
        found: set[int] = set()
        for table in islice(self._rows(self.files()[0]), 50):
            found |= set(pc.unique(table["301"]).drop_null().to_pylist())
            if len(found) >= len(SCENARIOS):
                break
        if len(found) > len(SCENARIOS):
            raise TableError(f"{self.files()[0]}: field 301 has {len(found)} values, {len(SCENARIOS)} are expected")
        return pa.array(sorted(found), pa.int64())

    def _rows(self, path: Path) -> Iterator[pa.Table]:
        for table in read_csv(path, SKELETON, names=list(SKELETON)):
            kept = table.filter(pc.or_(pc.equal(table["click"], 1), pc.equal(table["purchase"], 0)))
            yield unpack(kept, [*OWN, *CROSSED], [])

    def parts(self) -> Iterator[pa.Table]:
        """Yield impressions with their common features."""
        train_rows, train_common, test_rows, test_common = self.files()
        train, test = (
            Lookup((unpack(t, COMMON, PAST) for t in read_csv(path, SHARED, names=list(SHARED))), "key", str(path))
            for path in (train_common, test_common)
        )
        for path, common in ((train_rows, train.without(test.keys)), (test_rows, test)):
            for rows in self._rows(path):
                table = common.add(rows.drop_columns(["count"]), "key", inner=True)
                late = (share_of(table["key"]) < self.val_share).astype("int64")
                split = choose(late, ("train", "val") if path == train_rows else ("test", "test"))
                place = pc.index_in(table["301"], value_set=self.scenarios)
                yield replace(table, split=split, domain=pa.array(SCENARIOS).take(place))


def unpack(table: pa.Table, single: Iterable[str], several: Iterable[str]) -> pa.Table:
    """Make fields columns: the first id of a single-valued one (and its number), all ids of a multi-valued one.

    Raises:
        TableError: a feature that is not field, id and value.
    """
    words = pc.split_pattern(table["features"].combine_chunks().fill_null(""), "\x01")
    flat, row = pc.list_flatten(words), pc.list_parent_indices(words).to_numpy()
    filled = pc.not_equal(flat, "")
    flat, row = flat.filter(filled), row[filled.to_numpy(zero_copy_only=False)]
    groups = pc.extract_regex(flat, FEATURE)
    if groups.null_count:
        wrong = flat.filter(groups.is_null())[0].as_py()
        raise TableError(f"the feature {wrong[:80]!r} is not field, byte 2, id, byte 3, value")
    field, code, value = groups.flatten()
    code, rows = code.cast(pa.int64()), len(table)
    table = table.drop_columns(["features"])
    for name in single:
        mine = pc.equal(field, name).to_numpy(zero_copy_only=False)
        place, first = np.unique(row[mine], return_index=True)
        found = pa.array(np.searchsorted(place, np.arange(rows)), mask=~np.isin(np.arange(rows), place))
        first_ids = code.filter(pa.array(mine)).take(pa.array(first))
        table = table.append_column(name, first_ids.take(found))
        if name in CROSSED:
            numbers = value.filter(pa.array(mine)).take(pa.array(first)).cast(pa.float64())
            table = table.append_column(f"{name}_value", numbers.take(found))
    for name in several:
        mine = pc.equal(field, name).to_numpy(zero_copy_only=False)
        ends = np.concatenate([[0], np.cumsum(np.bincount(row[mine], minlength=rows))])
        lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), code.filter(pa.array(mine)))
        table = table.append_column(name, lists)
    return table
