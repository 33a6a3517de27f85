# SPDX-License-Identifier: Apache-2.0
"""What a task's step gives, and what it tells of the rows that layers route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

Stage = Literal["train", "val", "test"]


class Factor(NamedTuple):
    """Something that rows differ in.

    Args:
        label_N: its label of each row, int64 [N], -1 for none.
        num_labels: how many labels there are.
        names: of the labels, for people; empty where their numbers say enough.
    """

    label_N: Tensor
    num_labels: int
    names: tuple[str, ...] = ()


@dataclass
class StepOutput:
    """What one batch gave.

    Args:
        loss: scalar; the task's own loss without auxiliary losses.
        batch_size: items in the batch (scans, clips, rows); the weight of this batch in means.
        metric_args: arguments of the metrics' ``update``, in order.
        logs: further scalars, logged as ``train/<name>`` while training.
        units: values per test unit, metric name -> (units,), for intervals within a run; optional.
        parts: metric -> int64 [n] numbers of test units (below 2^32; parts of one unit, in any batch, share it) and
            [n, G, 3] what each adds to the score, see `moeapps.evaluation.units`; for scores that are no mean over
            units.
        labelled: items of the batch with a label (with anything that can be scored), over which ``loss`` is a mean and
            with which it weighs in means; None for all. With 0 the loss is not defined: in evaluation it is left out,
            while training it is a zero that carries a graph.
        answer: gives, from this pass, what ``predict_step`` would return for the batch; for figures of a test.
    """

    loss: Tensor
    batch_size: int
    metric_args: tuple[Any, ...] = ()
    logs: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)
    labelled: int | None = None
    parts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    answer: Callable[[], Any] | None = None

    @property
    def weight(self) -> int:
        """Items over which the loss is a mean."""
        return self.batch_size if self.labelled is None else self.labelled
