# SPDX-License-Identifier: Apache-2.0
"""AliExpress: searches in five countries, with clicks and purchases (Li et al., MetaHeac's and MTReclib's data)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from moeapps.data.domain import Role
from tasks.recommendation.data.readers.arrow_text import Lookup, Types, read_csv, share_of
from tasks.recommendation.data.readers.columns import DenseColumn, IdColumn, TableColumns, TaskColumn
from tasks.recommendation.data.readers.public import PublicLog, choose, replace

COUNTRIES = ("nl", "es", "fr", "us", "ru")
USER = [f"user_{k}" for k in range(1, 34)]  # the first is the search's key
ITEM = [f"item_{k}" for k in range(1, 50)]  # the first is the same key, the last the label
CATEGORICAL = [*USER[1:8], *USER[31:33], *(f"item_{k}" for k in (19, 34, 35, 36, 40, 41, 42))]
NUMERICAL = [name for name in USER[8:31] + ITEM[1:48] if name not in CATEGORICAL]


def types(names: list[str]) -> Types:
    """Keys and categories as text, whatever they look like; all others are numbers."""
    return {name: pa.string() if name in (*CATEGORICAL, USER[0], ITEM[0]) else pa.float64() for name in names}


class AliExpress(PublicLog):
    """Searches of AliExpress; a domain is a country.

    Source: tianchi.aliyun.com/dataset/74690, research use under the host's terms (verify). Layout: from the code of
    easezyc/Multitask-Recommendation-Library; NOT tried on the real files. Per country a folder AliExpress_XX with
    xx_user_train.csv, xx_user_test.csv (33 columns), xx_item_train.csv and xx_item_test.csv (49 columns), all without a
    header, joined by the first column of each, the search's key. The last column is 0 (nothing), 1 (click) or 2
    (click and purchase).

    There is no time in it: training and test are the published files, of which the validation takes whole searches out
    of the training ones. A search that is in both files is taken out of the training. The searches' own table is held
    in memory, the items' table streams.

    Args:
        root: folder of the countries' folders.
        val_share: share of the training searches that validate.
        cardinality: size of the table of each categorical field.
        countries: those whose files are there.
        window: blocks whose rows are shuffled together.

    Raises:
        ValueError: an unknown country, or a share that is not between 0 and 1.
    """

    name = "AliExpress"
    terms = "research use under the terms of its host, Tianchi (verify them there)"
    get = "Download the zips of tianchi.aliyun.com/dataset/74690 and unpack each into AliExpress_<country>."
    default_roles: ClassVar[dict[Role, list[str]]] = {"seen": ["nl", "es"], "validation": ["fr"], "unseen": ["us"]}

    def __init__(
        self,
        *,
        root: Path,
        val_share: float = 0.1,
        cardinality: int = 1 << 16,
        countries: tuple[str, ...] = COUNTRIES[:4],
        window: int = 8,
    ) -> None:
        if not 0 < val_share < 1:
            raise ValueError(f"val_share={val_share} must be between 0 and 1")
        if set(countries) - set(COUNTRIES):
            raise ValueError(f"countries={list(countries)}: allowed are {', '.join(COUNTRIES)}")
        self.val_share, self.countries = val_share, countries
        super().__init__(
            root=root,
            columns=TableColumns(
                tasks=[
                    TaskColumn("click", "click", "label", above=0),
                    TaskColumn("conversion", "order", "label", above=1),
                ],
                user="search",
                ids=[IdColumn(name, cardinality) for name in CATEGORICAL],
                dense=[DenseColumn(name) for name in NUMERICAL],
            ),
            domains=countries,
            settings={"val_share": val_share, "countries": countries},
            window=window,
        )

    def files(self) -> list[Path]:
        """Return the four files of each country."""
        return [self._file(country, *kind) for country in self.countries for kind in KINDS]

    def _file(self, country: str, who: str, split: str) -> Path:
        return self.find(f"AliExpress_{country.upper()}/{country}_{who}_{split}.csv")[0]

    def parts(self) -> Iterator[pa.Table]:
        """Yield the items shown in each search, with what is known of the search."""
        for country in self.countries:
            train, test = (
                Lookup(read_csv(path, types(USER), names=USER), USER[0], str(path))
                for path in (self._file(country, "user", split) for split in ("train", "test"))
            )
            for split, searches in (("train", train.without(test.keys)), ("test", test)):
                for items in read_csv(self._file(country, "item", split), types(ITEM), names=ITEM):
                    table = searches.add(items, ITEM[0], inner=True)
                    late = share_of(table[ITEM[0]]) < self.val_share
                    parts = choose(late.astype("int64"), ("train", "val") if split == "train" else ("test", "test"))
                    label = table[ITEM[-1]]
                    table = table.rename_columns({ITEM[0]: "search", ITEM[-1]: "label"})
                    domain = pc.if_else(pc.is_valid(label), country, pa.scalar(None, pa.string()))
                    yield replace(table, split=parts, domain=domain)


KINDS = [(who, split) for who in ("user", "item") for split in ("train", "test")]
