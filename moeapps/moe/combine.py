# SPDX-License-Identifier: Apache-2.0
"""Combiners: what becomes of the experts' outputs. The weighted sum, or the stack that an aggregator reads.

Shared experts are the last rows of the bank and join the routing here, as further assignments of every row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.backends import Backend, apply
from moeapps.moe.experts import Experts
from moeapps.moe.feed_forward import FeedForward
from moeapps.moe.joined import JoinedExperts
from moeapps.moe.record import record_experts
from moeapps.moe.routing import AnyRouting, DenseRouting, Routing, SlotRouting


@dataclass(frozen=True)
class Work:
    """One call of a bank: everything a combiner needs besides the routing.

    Attributes:
        experts: the bank, shared experts last.
        x: rows [N, ...], or [E, N, ...] when ``per_expert``.
        side: further inputs with N rows each.
        num_shared: how many of the last experts are shared.
        token_mask: bool [N]; False rows get exactly 0, from shared experts too.
        backend: for sparse routings.
        weight_at: whether a weight multiplies the output of its expert or the input.
        per_expert: whether each expert has its own view of the rows (dense routings).
    """

    experts: Experts
    x: Tensor
    side: tuple[Tensor, ...] = ()
    num_shared: int = 0
    token_mask: Tensor | None = None
    backend: Backend = "auto"
    weight_at: Literal["output", "input"] = "output"
    per_expert: bool = False


def _shared_weight(routing: AnyRouting, work: Work, dtype: torch.dtype) -> Tensor:
    """Weights [N, S] of the shared experts: the routing's, or 1; 0 for masked rows."""
    weight_NS = routing.shared_weight_NS
    if weight_NS is None:
        weight_NS = torch.ones(routing.num_rows, work.num_shared, dtype=dtype, device=work.x.device)
    return weight_NS if work.token_mask is None else weight_NS.where(work.token_mask.unsqueeze(-1), 0)


def with_shared(routing: Routing, work: Work) -> Routing:
    """The routing over the whole bank: each row gets an assignment to every shared expert, after its own."""
    num_shared = work.num_shared
    if num_shared == 0:
        return routing
    num_rows, num_all = routing.num_rows, routing.num_experts + num_shared
    expert_M = routing.expert_M.where(routing.expert_M < routing.num_experts, num_all)
    device = expert_M.device
    ids_NS = torch.arange(routing.num_experts, num_all, device=device).expand(num_rows, -1)
    if work.token_mask is not None:
        ids_NS = ids_NS.where(work.token_mask.unsqueeze(-1), num_all)
    weight_NS = _shared_weight(routing, work, routing.weight_M.dtype)
    if routing.top_k is not None and routing.target_M is None:
        k = routing.top_k + num_shared
        return Routing(
            row_M=torch.arange(num_rows * k, device=device) // k,
            expert_M=torch.cat([expert_M.view(num_rows, routing.top_k), ids_NS], -1).reshape(-1),
            weight_M=torch.cat([routing.weight_M.view(num_rows, routing.top_k), weight_NS], -1).reshape(-1),
            num_rows=num_rows,
            num_experts=num_all,
            top_k=k,
        )
    row_M = torch.arange(num_rows, device=device).repeat_interleave(num_shared)
    if routing.target_M is not None:
        raise ValueError("a routing with target_M cannot be joined by shared experts, whose output row is not defined")
    return Routing(
        row_M=torch.cat([routing.row_M, row_M]),
        expert_M=torch.cat([expert_M, ids_NS.reshape(-1)]),
        weight_M=torch.cat([routing.weight_M, weight_NS.reshape(-1)]),
        num_rows=num_rows,
        num_experts=num_all,
    )


def _run(work: Work, routing: Routing) -> Tensor:
    """The weighted sum over the assignments; banks of different widths run one after the other."""
    if isinstance(work.experts, JoinedExperts):
        parts = work.experts.restrict(routing)
        return torch.stack([_run(replace(work, experts=bank), part) for bank, part in parts]).sum(0)
    if work.per_expert:
        raise ValueError(
            "per_expert=True gives each expert its own rows, which a sparse routing cannot use; use Dense."
        )
    return apply(work.experts, work.x, routing, side=work.side, backend=work.backend, weight_at=work.weight_at)


def _parts(work: Work) -> tuple[Experts | FeedForward, FeedForward] | None:
    """The routed experts and the shared ones; None where these are no stack of their own or take more than rows."""
    if work.num_shared == 0 or work.side or work.weight_at == "input" or work.per_expert:
        return None
    if isinstance(work.experts, JoinedExperts):
        routed, *others = work.experts.each()
        stack = others[0].feed_forward() if len(others) == 1 else None
        return None if stack is None or stack.num_experts != work.num_shared else (routed, stack)
    stack = work.experts.feed_forward()
    return None if stack is None else stack.split(stack.num_experts - work.num_shared)


def _apart(work: Work, routing: Routing, routed: Experts | FeedForward, shared: FeedForward) -> Tensor:
    """The routed experts by a backend; to them the shared ones, each by two plain products over all rows."""
    y_No = apply(routed, work.x, routing, backend=work.backend, weight_at=work.weight_at)
    given = routing.shared_weight_NS is not None or work.token_mask is not None
    weights = _shared_weight(routing, work, y_No.dtype).to(y_No.dtype).unsqueeze(-1).unbind(1) if given else ()
    for s in range(work.num_shared):
        y_So = shared.one(s, work.x)
        y_No = torch.addcmul(y_No, weights[s], y_So) if given else y_No + y_So
    return y_No


def _dense_weight(routing: DenseRouting, work: Work) -> Tensor:
    """Weights [..., N, E + S] over the whole bank."""
    if work.num_shared == 0:
        return routing.weight
    weight_NS = _shared_weight(routing, work, routing.weight.dtype)
    return torch.cat([routing.weight, weight_NS.expand(*routing.weight.shape[:-1], -1)], dim=-1)


def _every(work: Work, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [N, E, o] of all experts, and the weights that remain to be applied to them."""
    x = work.x
    rows = x.shape[1] if work.per_expert else x.shape[0]
    if weight.shape[-2] != rows:
        raise ValueError(f"x has {rows} rows, but the routing was made for {weight.shape[-2]}; route this x.")
    if work.weight_at == "input":
        if weight.ndim != 2:
            raise ValueError(
                "weight_at='input' needs one gate: several gates cannot each scale the one input of an expert."
            )
        x = x * weight.T.to(x.dtype).reshape(*weight.T.shape, *(1,) * (x.ndim - (2 if work.per_expert else 1)))
        weight = torch.ones_like(weight)
    if work.token_mask is not None:
        return record_experts(work.experts.every_counted(x, work.token_mask, *work.side)), weight
    return record_experts(work.experts.every(x, *work.side)), weight


class Combiner(nn.Module):
    """Base of combiners: ``combine(work, routing) -> output of the layer``.

    Example:
        >>> isinstance(Sum(), Combiner)
        True
    """

    def forward(self, work: Work, routing: AnyRouting) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the bank and join what comes out.

        Args:
            work: the bank and its input.
            routing: over the routed experts; shared ones are added here.
        """
        raise NotImplementedError


class Sum(Combiner):
    r"""The weighted sum :math:`y_n = \sum_m w_m E_m(x_n)` over a row's experts, the shared ones included.

    Args:
        shared: how shared experts are computed beside sparsely routed ones: ``joined`` to their assignments, or
            ``apart``, without bringing rows to them and back (faster where every row is small; banks whose shared
            experts are no stack, side inputs and weights at the input are joined all the same).

    Shape:
        [N, o]; [G, N, o] for a dense routing with gates; [num_targets, o] for a routing with targets.

    Raises:
        ValueError: if the routing was made for another number of rows, or does not fit the options of the layer; for
            another value of ``shared``.

    Example:
        >>> from moeapps.moe import ConstantScore, Dense, MLPExperts, MoELayer, Router
        >>> layer = MoELayer(Router(ConstantScore(2), Dense()), MLPExperts(2, 8, 16), combiner=Sum())
        >>> layer(torch.zeros(3, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(self, *, shared: Literal["joined", "apart"] = "joined") -> None:
        super().__init__()
        if shared not in ("joined", "apart"):
            raise ValueError(f"shared={shared!r}, but it must be 'joined' or 'apart'.")
        self.shared = shared

    @override
    def forward(self, work: Work, routing: AnyRouting) -> Tensor:
        if isinstance(routing, Routing):
            parts = _parts(work) if self.shared == "apart" and routing.target_M is None else None
            if parts is not None:
                return _apart(work, routing, *parts)
            return _run(work, with_shared(routing, work))
        if isinstance(routing, DenseRouting):
            y_NEo, weight = _every(work, _dense_weight(routing, work))
            return torch.einsum("...ne,neo->...no", weight.to(y_NEo.dtype), y_NEo)
        return self._slots(work, routing)

    @staticmethod
    def _slots(work: Work, routing: SlotRouting) -> Tensor:
        """Each expert on its own slots; where experts are shared, one run over all slots and one over all rows."""
        if work.side or work.weight_at == "input" or work.per_expert or work.x.ndim != 2:
            raise ValueError(
                "a SlotRouting mixes rows [N, d]: it takes no side inputs, no weight_at='input' and no per_expert."
            )
        num_rows, num_experts, num_slots = routing.dispatch.shape
        if work.x.shape[0] != num_rows:
            raise ValueError(f"x has {work.x.shape[0]} rows, but the routing was made for {num_rows}; route this x.")
        slots_ESd = torch.einsum("nes,nd->esd", routing.dispatch.to(work.x.dtype), work.x)
        if work.num_shared == 0:
            y_SEo = work.experts.every(slots_ESd)
            return torch.einsum("nes,seo->no", routing.combine.to(y_SEo.dtype), y_SEo)
        row_M = torch.arange(num_experts * num_slots, device=slots_ESd.device)
        own = Routing(
            row_M,
            row_M // num_slots,
            torch.ones_like(slots_ESd[..., 0]).flatten(),
            len(row_M),
            work.experts.num_experts,
        )
        y_So = _run(replace(work, x=slots_ESd.flatten(0, 1)), own)
        y_No = torch.einsum("nes,eso->no", routing.combine.to(y_So.dtype), y_So.unflatten(0, (num_experts, num_slots)))
        none_M = row_M[:0]
        empty = Routing(none_M, none_M, routing.combine.flatten()[:0], num_rows, num_experts)
        shared = replace(empty, shared_weight_NS=routing.shared_weight_NS)
        return y_No + _run(work, with_shared(shared, work))


class Stack(Combiner):
    r"""The outputs side by side, ``(y [N, K, o], mask bool [N, K])``, for attention or transformer aggregators.

    Absent experts (sentinels, not allowed) are 0 and False. K is k (+ shared) for a sparse routing by row, E (+ shared)
    for a dense one; gates come first, [G, N, E, o].

    Args:
        weighted: multiply each output by its weight, so that a learned router gets gradient; weights of 1 change
            nothing.

    Raises:
        ValueError: for routings without a fixed number of experts per row (expert choice over the batch, slots).

    Source: Meta-DMoE, whose aggregator reads one token per expert (docs/papers/meta_dmoe.md, equation 2).

    Example:
        >>> from moeapps.moe import LinearScore, MLPExperts, MoELayer, Router, TopK
        >>> layer = MoELayer(Router(LinearScore(8, 4), TopK(2)), MLPExperts(4, 8, 16), combiner=Stack())
        >>> [tuple(t.shape) for t in layer(torch.zeros(3, 8))]
        [(3, 2, 8), (3, 2)]
    """

    def __init__(self, *, weighted: bool = True) -> None:
        super().__init__()
        self.weighted = weighted

    @override
    def forward(self, work: Work, routing: AnyRouting) -> tuple[Tensor, Tensor]:
        if isinstance(routing, DenseRouting):
            return self._dense(work, routing)
        if not isinstance(routing, Routing) or routing.top_k is None or routing.target_M is not None:
            raise ValueError(
                "Stack needs a fixed number of experts per row: use TopK, TopP or Dense, or the Sum combiner."
            )
        full = with_shared(routing, work)
        num = full.expert_M.shape[0]
        weight_M = full.weight_M if self.weighted else torch.ones_like(full.weight_M)
        place_M = torch.arange(num, device=full.expert_M.device)
        full = replace(full, weight_M=weight_M, target_M=place_M, num_targets=num)
        assert full.top_k is not None
        mask_NK = (full.expert_M < full.num_experts).view(full.num_rows, full.top_k)  # -1 is not defined without rows
        return _run(work, full).unflatten(0, mask_NK.shape), mask_NK

    def _dense(self, work: Work, routing: DenseRouting) -> tuple[Tensor, Tensor]:
        weight = _dense_weight(routing, work)
        mask = torch.ones_like(weight, dtype=torch.bool)
        if routing.allowed is not None:
            mask[..., : routing.num_experts] = routing.allowed
        if work.token_mask is not None:
            mask = mask & work.token_mask.unsqueeze(-1)
        y_NEo, weight = _every(work, weight if self.weighted or work.weight_at == "input" else torch.ones_like(weight))
        return (y_NEo * weight.to(y_NEo.dtype).unsqueeze(-1)).where(mask.unsqueeze(-1), 0), mask
