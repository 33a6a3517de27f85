# SPDX-License-Identifier: Apache-2.0
"""Scores of one domain with and without adaptation, over all draws of its support.

Shape legend: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef
from typing_extensions import override

SCORES = ("accuracy", "accuracy_before", "gain", "macro_f1")


class ClassScores(Metric):
    """Accuracy after and before adaptation, what was gained, and the macro-F1 over the classes that occur.

    Images without a label (-1) are not counted; without any, the scores are not numbers.

    Args:
        num_classes: K.
        beside: names of further adapters, whose accuracy is ``accuracy_<name>``.

    Example:
        >>> scores = ClassScores(2)
        >>> scores.update(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
        >>> float(scores.compute()["gain"])
        1.0
    """

    full_state_update = False
    higher_is_better = True
    right: Tensor
    true: Tensor
    said: Tensor
    before: Tensor
    others: Tensor
    told: Tensor

    def __init__(self, num_classes: int, beside: Sequence[str] = ()) -> None:
        super().__init__()
        self.beside = list(beside)
        self.larger_is_better = dict.fromkeys([*SCORES, *(f"accuracy_{name}" for name in beside)], True)
        for name in ("right", "true", "said"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("before", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("told", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("others", torch.zeros(len(self.beside), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(
        self, after_BK: Tensor, before_BK: Tensor, label_B: Tensor, others: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add images: logits after and before adaptation, labels, and logits of the adapters beside."""
        known_B = label_B >= 0
        label_B, said_B = label_B[known_B], after_BK.argmax(1)[known_B]
        size = len(self.right)
        self.right += torch.bincount(label_B[said_B == label_B], minlength=size)
        self.true += torch.bincount(label_B, minlength=size)
        self.said += torch.bincount(said_B, minlength=size)
        self.before += (before_BK.argmax(1)[known_B] == label_B).sum()
        if others:
            self.told += len(label_B)
        for place, name in enumerate(self.beside if others else []):
            self.others[place] += (cast(Mapping[str, Tensor], others)[name].argmax(1)[known_B] == label_B).sum()

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the four scores."""
        total = self.true.sum().double()
        after, before = self.right.sum() / total, self.before / total
        f1_K = 2 * self.right.double() / (self.said + self.true)
        return {
            "accuracy": after,
            "accuracy_before": before,
            "gain": after - before,
            "macro_f1": f1_K[self.true > 0].mean(),
            **{f"accuracy_{name}": right / self.told for name, right in zip(self.beside, self.others, strict=True)},
        }


class ValueScores(Metric):
    """Pearson's r of measured values after and before adaptation, and what was gained.

    Images without a value (not a number) are not counted. Fewer than two, or values that do not vary have no r. Sums
    are float64: those of float32 see a spread where predictions are all alike, and lose one beside a large mean.
    """

    full_state_update = False
    higher_is_better = True
    larger_is_better: ClassVar[dict[str, bool]] = dict.fromkeys(("pearson", "pearson_before", "gain"), True)
    least: Tensor
    most: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.after, self.before = (PearsonCorrCoef().set_dtype(torch.float64) for _ in range(2))
        # Of predictions after and before, and of values: what does not vary is known exactly.
        self.add_state("least", torch.full((3,), torch.inf, dtype=torch.float64), dist_reduce_fx="min")
        self.add_state("most", torch.full((3,), -torch.inf, dtype=torch.float64), dist_reduce_fx="max")

    @override
    def update(
        self, after_B1: Tensor, before_B1: Tensor, value_B: Tensor, others: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add images: predictions after and before adaptation, and values."""
        rows_3B = torch.stack([part.double() for part in (after_B1[:, 0], before_B1[:, 0], value_B)])
        rows_3B = rows_3B[:, ~value_B.isnan()]
        if rows_3B.shape[1]:
            self.after.update(rows_3B[0], rows_3B[2])
            self.before.update(rows_3B[1], rows_3B[2])
            self.least = torch.minimum(self.least, rows_3B.amin(1))
            self.most = torch.maximum(self.most, rows_3B.amax(1))

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the three scores."""
        varies_3 = self.most > self.least  # of all processes, so that they agree on what to ask
        after, before = (
            r.compute() if bool(varies_3[place] & varies_3[2]) else torch.full_like(self.most[0], torch.nan)
            for place, r in enumerate((self.after, self.before))
        )
        return {"pearson": after, "pearson_before": before, "gain": after - before}

    @override
    def reset(self) -> None:
        super().reset()
        self.after.reset()
        self.before.reset()


def adaptation_metrics(num_classes: int, beside: list[str], *, measured: bool) -> MetricCollection:
    """Metrics of one domain; ``beside`` names further adapters."""
    return MetricCollection({"scores": ValueScores() if measured else ClassScores(num_classes, beside)})
