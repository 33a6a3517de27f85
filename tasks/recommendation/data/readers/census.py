# SPDX-License-Identifier: Apache-2.0
"""Census-Income (KDD): 299,285 answers to the United States' survey of 1994 and 1995, as MMoE's first data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from moeapps.data.domain import Role
from tasks.recommendation.data.readers.arrow_text import Types, read_csv, share_of
from tasks.recommendation.data.readers.columns import DenseColumn, IdColumn, TableColumns, TaskColumn
from tasks.recommendation.data.readers.public import PublicLog, choose, replace

NAMES = (
    "age", "class_of_worker", "industry_code", "occupation_code", "education", "wage_per_hour", "enrolled", "marital",
    "major_industry", "major_occupation", "race", "hispanic", "sex", "union_member", "unemployment_reason",
    "employment", "capital_gains", "capital_losses", "dividends", "tax_filer", "previous_region", "previous_state",
    "household_detail", "household_summary", "instance_weight", "migration_msa", "migration_region",
    "migration_within_region", "same_house", "migration_sunbelt", "persons_worked", "family_under_18", "father_born",
    "mother_born", "self_born", "citizenship", "own_business", "veteran_questionnaire", "veteran_benefits",
    "weeks_worked", "year", "income",
)  # fmt: skip
NUMBERS = {  # logs of skewed ones; means and scales by hand, so that nothing of the test leaks into them
    "age": DenseColumn("age", mean=35.0, std=20.0),
    "wage_per_hour": DenseColumn("wage_per_hour", log=True),
    "capital_gains": DenseColumn("capital_gains", log=True),
    "capital_losses": DenseColumn("capital_losses", log=True),
    "dividends": DenseColumn("dividends", log=True),
    "persons_worked": DenseColumn("persons_worked", mean=2.0, std=2.0),
    "weeks_worked": DenseColumn("weeks_worked", mean=23.0, std=24.0),
}
COLLEGE = (
    "Some college but no degree", "Associates degree-academic program", "Associates degree-occup /vocational",
    "Bachelors degree(BA AB BS)", "Masters degree(MA MS MEng MEd MBA)", "Prof school degree (MD DDS DVM LLB JD)",
    "Doctorate degree(PhD EdD)",
)  # fmt: skip
LABELS = {"income": ["income"], "never_married": ["marital"], "college": ["education"]}  # task -> columns it is made of
DOMAINS = ("y94_female", "y94_male", "y95_female", "y95_male")


class CensusIncome(PublicLog):
    """Census-Income with the tasks of MMoE's paper; domains are the year of the survey and the sex.

    Source: archive.ics.uci.edu/dataset/117, CC BY 4.0 by its page (verify). Layout: 42 columns without a header,
    separated by comma and space, ``?`` missing: census-income.data (199,523 rows) and census-income.test (99,762);
    order of the columns from torch-rechub's sample with the instance weight put back; NOT tried on the real files.

    Training and test are the published files; a training row that is equal to a test row in all 42 columns is left
    out, and the validation takes equal rows together. The instance weight is no feature, nor is any column that a task
    is made of. Which degrees count as college is recalled, not read in the paper.

    Args:
        root: folder of the files.
        tasks: two or three of income (above 50,000), never_married, college (some college or more).
        val_share: share of the training rows that validate.
        window: blocks whose rows are shuffled together.

    Raises:
        ValueError: an unknown task, or a share that is not between 0 and 1.
    """

    name = "Census-Income (KDD)"
    terms = "CC BY 4.0 by its page at UCI (verify); cite the repository"
    get = "Download census.tar.gz of archive.ics.uci.edu/dataset/117 and unpack it."
    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": ["y94_female", "y94_male"],
        "validation": ["y95_female"],
        "unseen": ["y95_male"],
    }

    def __init__(
        self,
        *,
        root: Path,
        tasks: tuple[str, ...] = ("income", "never_married"),
        val_share: float = 0.1,
        window: int = 8,
    ) -> None:
        if not 0 < val_share < 1:
            raise ValueError(f"val_share={val_share} must be between 0 and 1")
        if set(tasks) - set(LABELS):
            raise ValueError(f"tasks={list(tasks)}: allowed are {', '.join(LABELS)}")
        self.val_share = val_share
        hidden = {"instance_weight", "year", "income", *(name for task in tasks for name in LABELS[task])}
        super().__init__(
            root=root,
            columns=TableColumns(
                tasks=[TaskColumn(task, "money" if task == "income" else "life", f"label_{task}") for task in tasks],
                user="domain",
                ids=[IdColumn(name, 1024) for name in NAMES if name not in hidden | set(NUMBERS)],
                dense=list(NUMBERS.values()),
            ),
            domains=DOMAINS,
            settings={"val_share": val_share},
            window=window,
        )

    def files(self) -> list[Path]:
        """Return both files."""
        return [path for name in ("census-income.data", "census-income.test") for path in self.find(name)]

    def parts(self) -> Iterator[pa.Table]:
        """Yield training and validation rows, then test rows."""
        data, test = self.files()
        known = pa.chunked_array([_whole(table).combine_chunks() for table in _read(test)])
        for path in (data, test):
            for table in _read(path):
                whole = _whole(table)
                late = (share_of(whole) < self.val_share).astype("int64")
                split = choose(late, ("train", "val") if path == data else ("test", "test"))
                if path == data:
                    split = pc.if_else(pc.is_in(whole, value_set=known), pa.scalar(None, pa.string()), split)
                domain = pc.binary_join_element_wise("y", table["year"], "_", pc.utf8_lower(table["sex"]), "")
                yield replace(
                    table,
                    split=split,
                    domain=domain,
                    label_income=pc.starts_with(table["income"], "50000+").cast(pa.int8()),
                    label_never_married=pc.equal(table["marital"], "Never married").cast(pa.int8()),
                    label_college=pc.is_in(table["education"], value_set=pa.array(COLLEGE)).cast(pa.int8()),
                )


def _read(path: Path) -> Iterator[pa.Table]:
    """Yield numbers, and text without the blanks around it; ``?`` is a value of its own, as the survey means it."""
    types: Types = {name: pa.float64() if name in NUMBERS else pa.string() for name in NAMES}
    for table in read_csv(path, types, names=list(NAMES), missing=()):
        yield replace(table, **{name: pc.utf8_trim_whitespace(table[name]) for name in NAMES if name not in NUMBERS})


def _whole(table: pa.Table) -> pa.ChunkedArray:
    """One text per row."""
    return pc.binary_join_element_wise(*(table[name].cast(pa.string()) for name in NAMES), "\x1f")
