# SPDX-License-Identifier: Apache-2.0
"""Logs of impressions or of lists as domains: populations, regions, pages of an app, spans of time."""

from __future__ import annotations

from typing import Any, cast

from torch.utils.data import Dataset

from moeapps.data.domain import Split
from moeapps.data.gather import TableDataset
from moeapps.data.mixing import DomainMixing, MixingSampler
from moeapps.data.source import SourceDataModule
from moeapps.data.stream_writing import StreamPlan
from moeapps.data.windows import WindowSampler
from tasks.recommendation.data import streams
from tasks.recommendation.data.batch import Schema
from tasks.recommendation.data.inputs import interactions_of, lists_of
from tasks.recommendation.data.lists import Lists, ListSchema
from tasks.recommendation.data.multitask_log import MultitaskLog
from tasks.recommendation.data.readers.block_rows import BlockDataset
from tasks.recommendation.data.source import LogSource
from tasks.recommendation.data.taste_types import TasteTypes


class RecommendationData(SourceDataModule):
    """Impressions with several labels each, out of a generated, packaged or own log.

    Args:
        source: the log; None means `MultitaskLog`, which is generated.
        batch_size: rows per training step.
        mixing: how training batches mix domains: concat (in proportion to size), balanced (each domain equally often)
            or one_domain (each batch from one domain). A source read block by block knows concat alone.
        options: further arguments of `SourceDataModule`.

    Raises:
        ValueError: a domain the source does not have, roles that overlap, or a mixing that the source does not know.
    """

    eval_factor = 4
    source: LogSource

    def __init__(
        self,
        *,
        source: LogSource | None = None,
        batch_size: int = 512,
        mixing: DomainMixing = "concat",
        **options: Any,
    ) -> None:
        super().__init__(source=source or MultitaskLog(), batch_size=batch_size, mixing=mixing, **options)
        if self.source.streaming and mixing != "concat":
            raise ValueError(
                f"mixing={mixing!r} needs all rows at hand; a source read block by block allows concat only"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """Domain names per role, and the sizes of the columns: dense_dim, fields, bags, tasks, categories."""
        return {**super().facts, **self.source.schema.facts()}

    def batches_of(self, inputs: Any) -> list[Any]:
        """Return a batch of rows of one's own, see `interactions_of`."""
        return [interactions_of(inputs, cast(Schema, self.source.schema))]

    def collate(self, items: Any) -> Any:
        """Return the batch: rows come whole, except for single rows asked for one by one."""
        return type(items[0]).cat(items) if isinstance(items, list) else items

    def stream_plan(self) -> StreamPlan:
        """Say what ``moeapps data optimize`` writes: the rows of the log, in blocks."""
        return streams.plan(self, self.source)

    def train_sampler(
        self, parts: list[Dataset[Any]], rank: int, world_size: int, *, repeat: bool = False
    ) -> MixingSampler:
        """Return the order of training rows; a log read block by block is shuffled in windows of blocks."""
        if not self.source.streaming:
            return super().train_sampler(parts, rank, world_size, repeat=repeat)
        tables = cast(list[BlockDataset], parts)
        return WindowSampler(
            [size for table in tables for size in table.sizes],
            self.batch_size,
            window=tables[0].window,
            num_workers=self.num_workers,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            repeat=repeat,
        )


class ListData(RecommendationData):
    """Lists of candidates, each for one user with a history, out of a generated, packaged or own log.

    Args:
        source: the log; None means `TasteTypes`, which is generated.
        batch_size: lists per training step.
        options: as of `RecommendationData`.

    Raises:
        ValueError: the source gives impressions, not lists.
    """

    def __init__(self, *, source: LogSource | None = None, batch_size: int = 256, **options: Any) -> None:
        source = source or TasteTypes()
        if not isinstance(source.schema, ListSchema):
            raise ValueError(
                f"{type(source).__name__} gives impressions with several labels; lists come from TasteTypes or "
                "MovieLensLists, impressions go to RecommendationData"
            )
        super().__init__(source=source, batch_size=batch_size, **options)

    def batches_of(self, inputs: Any) -> list[Any]:
        """Return a batch of lists of one's own, see `lists_of`."""
        return [lists_of(inputs, cast(ListSchema, self.source.schema))]

    def dataset(self, domain: str, split: Split) -> Dataset[Any]:
        """Return the lists of one domain.

        Raises:
            ValueError: a source of one's own gave what is no list, e.g. a candidate that lies in its own history.
        """
        found = super().dataset(domain, split)
        if isinstance(found, TableDataset) and isinstance(found.table, Lists):
            cast(ListSchema, self.source.schema).check(found.table, f"{domain}, {split}")
        return found
