# SPDX-License-Identifier: Apache-2.0
"""The router: score, noise, hook, choice and capacity, in full precision even under autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.routers.capacity import Capacity
from moeapps.moe.routers.chooser import Chooser, Pool, widest
from moeapps.moe.routers.noise import Noise
from moeapps.moe.routers.score import Features, Score
from moeapps.moe.routing import AnyRouting, Routing

Adjust = Callable[[Tensor, Features], Tensor]


def completed(routing: AnyRouting, state: object, features_ND: Tensor | None) -> AnyRouting:
    """As ``dataclasses.replace`` of the two, without checking again what has not changed."""
    same: AnyRouting = object.__new__(type(routing))
    vars(same).update(vars(routing), state=state, features_ND=features_ND)
    return same


class RouterBase(nn.Module):
    """What a layer needs of a router: how many experts it routes to, and ``forward``.

    Attributes:
        num_experts: E, routed experts.
        num_shared: shared experts that the routing weighs; 0 leaves them at weight 1, however many there are.
        sparse: whether rows go to some experts only.
        takes_gates: whether features may come one per gate, [G, N, d] or a tuple; they are then never reshaped.
        adjust: hook ``(logits, features) -> logits`` for test-time rerouting; None does nothing. Minus infinity forbids
            a column to a row, which needs one that is allowed.
        pool: what else decides a row's experts in evaluation: nothing (``row``), the rows of its ``group``, or the
            whole ``batch``, so that its mates change its output.

    Example:
        >>> from moeapps.moe import LinearScore, TopK
        >>> isinstance(Router(LinearScore(8, 4), TopK(2)), RouterBase)
        True
    """

    num_experts: int
    num_shared: int = 0
    sparse: bool = True
    takes_gates: bool = False
    adjust: Adjust | None = None
    pool: Pool = "row"

    def mean_k(self) -> float | None:
        """Experts per row, where it is known beforehand; None where the data decide."""
        return None

    def forward(
        self,
        features: Features,
        *,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
    ) -> AnyRouting:
        """Route.

        Args:
            features: what is routed on, usually [N, d].
            state: memory of a recurrent score.
            token_mask: bool [N]; False rows get no work and are in no count, statistic or competition. They must be
                finite, as the layer makes them: a gradient of 0 times nan is nan.
            group: int64 [N]: domain, sample or condition of each row.
        """
        raise NotImplementedError


def check_rows(name: str, values: Tensor | None, rows: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Refuse a mask or group ids that are not one value per row.

    Raises:
        ValueError: for another shape or, where one is asked for, another dtype.
    """
    if values is None:
        return
    if tuple(values.shape) != tuple(rows) or dtype not in (None, values.dtype):
        wanted = "" if dtype is None else f" of {dtype}"
        raise ValueError(
            f"{name} is {tuple(values.shape)} of {values.dtype}, but the rows are {tuple(rows)}; give it that "
            f"shape{wanted}, one value per row."
        )


def only_rows(values: Tensor, mask_N: Tensor | None, at: int = 0, *, fill: float = 0.0) -> Tensor:
    """The values with ``fill`` in masked rows, which get no gradient.

    Args:
        values: any shape; rows are dimension ``at``.
        mask_N: bool [N]; None changes nothing.
        at: see above.
        fill: what stands in masked rows.
    """
    if mask_N is None:
        return values
    return values.masked_fill(~mask_N.view(-1, *[1] * (values.ndim - at - 1)), fill)


def read_rows(values: Tensor, mask_N: Tensor | None, at: int = 0) -> Tensor:
    """What routers and experts read: 1 in masked rows, since a norm has no second derivative at 0; numbers only."""
    return only_rows(values, mask_N, at, fill=1.0) if values.is_floating_point() else values


def full_precision(features: Features) -> Features:
    """Floating-point features in float32 at least; float64 stays, other dtypes are untouched."""
    if isinstance(features, tuple):
        return tuple(_full(member) for member in features)
    return _full(features)


def _full(member: Tensor) -> Tensor:
    return member.float() if member.dtype in (torch.float16, torch.bfloat16) else member


def device_of(features: Features) -> torch.device:
    """Device of the features."""
    return features.device if isinstance(features, Tensor) else features[0].device


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off; nothing at all where it is off already, since entering it takes as long as a product."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


class Router(RouterBase):
    """Score, then choose: ``R = capacity(choose(adjust(noise(score(features)))))``.

    Logits, probabilities and weights are float32 under any autocast (float64 features stay float64).

    Args:
        score: features -> logits.
        choose: logits -> routing.
        noise: in training only; None for none.
        capacity: ceiling per expert; None drops nothing.

    Shape:
        features [N, d] -> a routing of N rows over ``num_experts``.

    Raises:
        ValueError: if the chooser does not fit the columns of the score, or capacity is asked of a chooser without k
            experts per row.

    Example:
        >>> from moeapps.moe.routers import LinearScore, TopK
        >>> router = Router(LinearScore(8, 4), TopK(2))
        >>> int(router(torch.randn(3, 8)).counts().sum())
        6
    """

    def __init__(
        self, score: Score, choose: Chooser, noise: Noise | None = None, capacity: Capacity | None = None
    ) -> None:
        super().__init__()
        self.score, self.choose, self.noise, self.capacity = score, choose, noise, capacity
        self.num_experts = choose.bind(score.num_outputs)
        self.num_shared, self.sparse = choose.num_shared, choose.sparse
        self.pool = widest(score.pool, choose.pool)
        self.adjust: Adjust | None = None
        if capacity is not None and not choose.by_row:
            raise ValueError(
                f"capacity is for choosers that give each row k experts (TopK, TopP), not for {type(choose).__name__}, "
                "which bounds the rows of an expert itself or runs all; leave capacity out."
            )

    @override
    def mean_k(self) -> float | None:
        return self.choose.mean_k()

    @override
    def forward(
        self,
        features: Features,
        *,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
    ) -> AnyRouting:
        with without_autocast(device_of(features)):
            read = full_precision(features)
            if self.noise is not None:
                read = self.noise.on_features(read)
            mask = {"token_mask": token_mask} if self.score.reads_mask else {}
            scored = self.score(read, group=group, state=state, **mask)
            logits, state = scored if isinstance(scored, tuple) else (scored, None)
            check_rows("token_mask", token_mask, logits.shape[:-1], torch.bool)
            if self.noise is not None:
                logits = self.noise.on_logits(logits, read)
            if self.adjust is not None:
                logits = self.adjust(logits, features)
            routing: AnyRouting = self.choose(logits, token_mask=token_mask, group=group)
            if self.capacity is not None and isinstance(routing, Routing):
                routing = self.capacity(routing)
        return completed(routing, state, features if isinstance(features, Tensor) else None)
