# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses as small modules that YAML names; the mathematics is in `moeapps.moe.objectives`.

``loss(records)`` is what a task adds to its own loss, the weight included; ``loss.value(records)``, logged as
``train/aux/<name>``, is without it. Both add up the layers unless ``reduction`` says ``mean``: the codes that weights
are copied from add each layer's loss, and the mean of n layers acts with 1/n of such a weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe import objectives
from moeapps.moe.ranks import sum_over_ranks
from moeapps.moe.record import Record

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class Anneal:
    """A weight that moves in a straight line to another over the first optimizer steps of a run and then stays there.

    Args:
        final: The weight from then on.
        steps: Optimizer steps that it takes, at least 1.

    Raises:
        ValueError: For a final weight that is not a finite number, or fewer than one step.

    Example:
        >>> [round(Anneal(final=0.001, steps=10_000).at(0.025, step), 4) for step in (0, 5000, 10_000, 20_000)]
        [0.025, 0.013, 0.001, 0.001]
    """

    final: float
    steps: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.final) or self.steps < 1:
            raise ValueError(f"final={self.final}, steps={self.steps}: give a finite weight and 1 step or more")

    def at(self, start: float, step: int) -> float:
        """Give the weight after ``step`` optimizer steps, where it was ``start`` before the first."""
        return start + (self.final - start) * min(1.0, step / self.steps)


class AuxLoss(nn.Module):
    r"""A loss over all recorded layers, :math:`w \sum_l L_l` or :math:`\frac{w}{n} \sum_l L_l` over n records.

    To write one, set ``name`` and override `compute`, or set ``objective`` where a function of the record is all.

    Args:
        weight: Coefficient w; `value` is without it.
        layers: Pattern (``*`` and ``?``) of the names of the layers that take part; it becomes part of the name.
        reduction: ``sum`` or ``mean`` over the records.
        anneal: How w changes with the optimizer steps, which are then counted in a buffer; None keeps it.

    Shape:
        Input: list of records. Output: 0-dim tensor.

    Attributes:
        weight: w as it is now.
        per_layer: name of the layer -> its last value without weight and gradient.

    Raises:
        ValueError: For a weight that is not a finite number, or an unknown reduction.

    Source: added up in DiT-MoE, ProMoE, Point-MoE and AdaMoE (their released code).

    Example:
        >>> ZLoss(0.001, layers="decoder.*").name
        'z.decoder'
    """

    name: str = "aux"
    objective: ClassVar[staticmethod[[Record], Tensor] | None] = None
    steps_taken: Tensor

    def __init__(
        self,
        weight: float = 0.01,
        *,
        layers: str = "*",
        reduction: Reduction = "sum",
        anneal: Anneal | None = None,
    ) -> None:
        super().__init__()
        if not math.isfinite(weight):
            raise ValueError(
                f"weight={weight} of {self.name!r}: give a finite number; 0 logs the value without training on it"
            )
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r} of {self.name!r} is unknown; use sum or mean over the layers")
        self.first_weight = weight
        self.anneal = anneal
        if anneal is not None:
            self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))
        self.layers = layers
        self.reduction = reduction
        self.per_layer: dict[str, Tensor] = {}
        if layers != "*":  # Two losses of one kind on different layers must be logged apart.
            self.name = f"{self.name}.{re.sub(r'[^A-Za-z0-9]+', '_', layers).strip('_')}"

    @property
    def weight(self) -> float:
        """The coefficient as it is now."""
        return self.first_weight if self.anneal is None else self.anneal.at(self.first_weight, int(self.steps_taken))

    def compute(self, record: Record) -> Tensor:
        """Give the loss of one record, 0-dim."""
        if self.objective is None:
            raise NotImplementedError(f"{type(self).__name__} must override compute(record)")
        return self.objective(record)

    def forward(self, records: Sequence[Record]) -> Tensor:
        """Give the weighted loss, ready to be added to another.

        Raises:
            ValueError: If no record matches: a loss over nothing would be silently absent.
        """
        return self.weight * self.value(records)

    def value(self, records: Sequence[Record]) -> Tensor:
        """Give the sum or mean over the records whose layer name matches, without the weight.

        Raises:
            ValueError: If no record matches.
        """
        chosen = self.chosen(records)
        values_L = torch.stack([self.compute(record) for record in chosen])
        self.per_layer = {record.name: value for record, value in zip(chosen, values_L.detach(), strict=True)}
        return values_L.sum() if self.reduction == "sum" else values_L.mean()

    def chosen(self, records: Sequence[Record]) -> list[Record]:
        """Give the records whose layer name matches.

        Raises:
            ValueError: If none does.
        """
        chosen = [record for record in records if fnmatchcase(record.name, self.layers)]
        if not chosen:
            names = sorted({record.name for record in records})
            raise ValueError(
                f"auxiliary loss {self.name!r} with layers={self.layers!r} meets no recorded MoE layer "
                f"(recorded: {names or 'none'}); change the pattern, or remove the loss from aux_losses"
            )
        return chosen

    def on_optimizer_step(self) -> None:
        """Count the step and forget what was gathered over micro-batches; called after each optimizer step."""
        if self.anneal is not None:
            self.steps_taken += 1

    @override
    def extra_repr(self) -> str:
        return f"weight={self.weight}, layers={self.layers!r}, reduction={self.reduction!r}"


class SwitchBalance(AuxLoss):
    """`switch_balance`: E·Σ f P, 1 when balanced.

    Args:
        weight: Coefficient of each layer's loss; 0.01 in Switch Transformers and most since.
        per_group: Balance within each sample (or whatever group the network gives) rather than over the batch.
        layers: Pattern of layer names.
        reduction: ``sum`` or ``mean`` over the layers.

    Example:
        >>> from moeapps.moe import LinearScore, MLPExperts, MoELayer, MoERecorder, Router, TopK
        >>> layer = MoELayer(Router(LinearScore(8, 4, init_std=0.0), TopK(2)), MLPExperts(4, 8, 8))
        >>> with MoERecorder() as recorder:
        ...     _ = layer(torch.randn(6, 8))
        >>> round(SwitchBalance(0.01)(recorder.records).item(), 5)
        0.01
    """

    name = "switch_balance"

    def __init__(
        self, weight: float = 0.01, *, per_group: bool = False, layers: str = "*", reduction: Reduction = "sum"
    ) -> None:
        super().__init__(weight, layers=layers, reduction=reduction)
        self.per_group = per_group

    @override
    def compute(self, record: Record) -> Tensor:
        return objectives.switch_balance(record, per_group=self.per_group)


class GlobalBatchBalance(AuxLoss):
    """`switch_balance` with f counted over the batch of an optimizer step: all ranks, and the micro-batches so far.

    Small micro-batches of one domain each then need not be balanced one by one, so experts may specialise by domain. f
    has no gradient, so only E counts per layer travel. Ranks see each other at once; of the micro-batches on one rank
    the first sees only itself and the last sees all. In evaluation nothing is gathered and f is the batch's own.

    Args:
        weight: Coefficient.
        layers: Pattern of layer names.
        reduction: ``sum`` or ``mean`` over the layers.

    Source: Qiu et al. (2025), Demons in the Detail.

    Example:
        >>> GlobalBatchBalance(0.01).name
        'global_balance'
    """

    name = "global_balance"

    def __init__(self, weight: float = 0.01, *, layers: str = "*", reduction: Reduction = "sum") -> None:
        super().__init__(weight, layers=layers, reduction=reduction)
        self._seen: dict[str, Tensor] = {}

    def compute(self, record: Record) -> Tensor:
        """Give `switch_balance` of one record with the counts of the step so far."""
        counts_E = objectives.column_counts(record)
        if self.training:
            counts_E = sum_over_ranks(counts_E)
            if record.name in self._seen:
                counts_E = counts_E + self._seen[record.name]
            self._seen[record.name] = counts_E
        return objectives.switch_balance(record, counts_E=counts_E)

    @override
    def on_optimizer_step(self) -> None:
        super().on_optimizer_step()
        self._seen.clear()


class ChosenBalance(AuxLoss):
    """`chosen_balance`: E·Σ g Q over chosen columns, the mean number chosen when balanced.

    Args:
        weight: Coefficient; UniMoE-Audio lowers it from 0.025 to 0.001 in 10,000 steps.
        layers: Pattern of layer names.
        reduction: ``mean`` over the layers, as in the released code, or ``sum``.
        anneal: How the weight changes with the optimizer steps; None keeps it.

    Example:
        >>> ChosenBalance(0.025).name
        'chosen_balance'
    """

    name = "chosen_balance"
    objective = staticmethod(objectives.chosen_balance)

    def __init__(
        self,
        weight: float = 0.025,
        *,
        layers: str = "*",
        reduction: Reduction = "mean",
        anneal: Anneal | None = None,
    ) -> None:
        super().__init__(weight, layers=layers, reduction=reduction, anneal=anneal)


class ImportanceLoss(AuxLoss):
    """`importance_cv2`: cv² of the summed weights, 0 when balanced; the one balance loss that dense gates have too.

    Example:
        >>> ImportanceLoss(0.01).name
        'importance'
    """

    name = "importance"
    objective = staticmethod(objectives.importance_cv2)


class LoadLoss(AuxLoss):
    """`load_cv2`: cv² of the smooth load, 0 when balanced.

    Args:
        weight: Coefficient.
        noise_std: σ in units of the logits; 1/E when None.
        layers: Pattern of layer names.
        reduction: ``sum`` or ``mean`` over the layers.

    Example:
        >>> LoadLoss(0.01).name
        'load'
    """

    name = "load"

    def __init__(
        self, weight: float = 0.01, *, noise_std: float | None = None, layers: str = "*", reduction: Reduction = "sum"
    ) -> None:
        super().__init__(weight, layers=layers, reduction=reduction)
        self.noise_std = noise_std

    @override
    def compute(self, record: Record) -> Tensor:
        return objectives.load_cv2(record, noise_std=self.noise_std)


class ZLoss(AuxLoss):
    """`z_loss`: mean logsumexp²; a weight of 0.001 is usual.

    Example:
        >>> ZLoss(0.01).name
        'z'
    """

    name = "z"
    objective = staticmethod(objectives.z_loss)

    def __init__(self, weight: float = 0.001, *, layers: str = "*", reduction: Reduction = "sum") -> None:
        super().__init__(weight, layers=layers, reduction=reduction)


class EntropyLoss(AuxLoss):
    """`token_entropy`: minimised by decided routers, needed with top-p above all; a weight of 1e-4 is usual there.

    Example:
        >>> EntropyLoss(0.01).name
        'entropy'
    """

    name = "entropy"
    objective = staticmethod(objectives.token_entropy)

    def __init__(self, weight: float = 1e-4, *, layers: str = "*", reduction: Reduction = "sum") -> None:
        super().__init__(weight, layers=layers, reduction=reduction)


class BatchEntropyLoss(AuxLoss):
    """`batch_entropy_gap`: log E − H(mean p), 0 when balanced.

    Example:
        >>> BatchEntropyLoss(0.01).name
        'batch_entropy'
    """

    name = "batch_entropy"
    objective = staticmethod(objectives.batch_entropy_gap)


class MutualInformationLoss(AuxLoss):
    """The NEGATIVE of `mutual_information`: a positive weight maximises the information.

    Example:
        >>> MutualInformationLoss(0.01).name
        'mutual_information'
    """

    name = "mutual_information"

    @override
    def compute(self, record: Record) -> Tensor:
        return -objectives.mutual_information(record)
