# SPDX-License-Identifier: Apache-2.0
"""A log of impressions as a log of ratings: what was taken is a rating of 1, what was shown in vain one of 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.recommendation.data.readers.public import PublicLog, replace
from tasks.recommendation.data.readers.rating_reader import RatingReader
from tasks.recommendation.data.readers.values import TableError


class Watched(RatingReader):
    """Impressions with times (KuaiRand, KuaiRec) for `RatingLists`: histories of what was taken, lists of one task.

    With ``taken``, histories hold what was taken before, and negatives are drawn from what a user never takes: among
    them may be what was shown in vain. Without, histories hold all that was shown before, taken or not, and negatives
    are drawn from what a user was never shown. The log's own days do not count: `RatingLists` cuts by shares of the
    rows.

    Args:
        log: the impressions.
        item: column of the item.
        task: name of the log's task that says whether it was taken.
        taken: leave out what was shown in vain.
        items_table: size of the table of items.

    Raises:
        ValueError: a log without times, or an unknown task.
    """

    liked = 1.0

    def __init__(
        self,
        *,
        log: PublicLog,
        item: str = "video_id",
        task: str = "long_view",
        taken: bool = True,
        items_table: int = 1 << 16,
    ) -> None:
        super().__init__(log.root)
        tasks = {known.name: known for known in log.columns.tasks}
        if log.columns.time is None or task not in tasks:
            raise ValueError(
                f"{log.name} with task {task!r}: lists need a log with times and one of its tasks, {', '.join(tasks)}"
            )
        self.name, self.terms, self.get = log.name, log.terms, log.get  # type: ignore[misc]
        self.log, self.item, self.task, self.taken = log, item, tasks[task], taken
        self.domains, self.default_roles = tuple(log.domains), log.default_roles
        self.items_table, self.item_fields = items_table, {}

    @property
    def settings(self) -> dict[str, Any]:
        """What is taken of which log."""
        log = [type(self.log).__name__, self.log.revision, self.log.settings]
        return {"log": log, "item": self.item, "task": self.task.name, "taken": self.taken}

    def files(self) -> list[Path]:
        """Return the log's files."""
        return self.log.files()

    def ratings(self) -> Iterator[pa.Table]:
        """Yield the impressions whose label and time are known."""
        columns = self.log.columns
        for part in self.log.parts():
            value = part[self.task.label_column].cast(pa.float64())
            taken = pc.greater(value, 0.5 if self.task.above is None else self.task.above)
            names = {"user": columns.user, "item": self.item, "rating": None, "time": columns.time, "domain": "domain"}
            table = pa.table(
                {new: taken.cast(pa.float64()) if old is None else part[old] for new, old in names.items()}
            )
            # Milliseconds, so that what follows within a second counts as earlier.
            time = pc.multiply(table["time"].cast(pa.float64()), 1000 * self.log.time_unit)
            table = replace(table, time=pc.cast(pc.floor(time), pa.int64()))
            keep = pc.and_(taken, pc.is_valid(table["time"])) if self.taken else pc.is_valid(table["time"])
            yield table.filter(pc.and_(keep, pc.is_valid(taken)))

    def items(self) -> pa.Table:
        """Return the items, all in one group."""
        chunks = [chunk for part in self.ratings() for chunk in part["item"].chunks]
        if not chunks:
            raise TableError(f"{self.name}: no row has {self.task.name} and a time")
        found = pc.unique(pa.chunked_array(chunks))
        return pa.table({"item": found, "group": np.zeros(len(found), np.int64)})
