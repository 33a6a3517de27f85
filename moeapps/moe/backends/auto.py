# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: what was measured, and what each backend cannot do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from moeapps.moe.backends import table
from moeapps.moe.backends.dense import dense, is_dense
from moeapps.moe.backends.few import MAX_ASSIGNMENTS, few_rows
from moeapps.moe.backends.grouped_mm import grouped_mm, grouped_mm_refusal, grouped_mm_static
from moeapps.moe.backends.loop import loop
from moeapps.moe.backends.onehot import onehot
from moeapps.moe.derivatives import is_batched, is_transformed
from moeapps.moe.eager import runs_eagerly
from moeapps.moe.fast.segments import segments, segments_refusal
from moeapps.moe.fast.static import every_expert, segments_static
from moeapps.moe.plan import Plan, plan_of

if TYPE_CHECKING:
    from moeapps.moe.experts import Experts
    from moeapps.moe.feed_forward import FeedForward
    from moeapps.moe.routing import Routing

Backend = Literal["auto", "loop", "segments", "grouped_mm", "onehot"]
Choice = Literal["loop", "segments", "grouped_mm", "onehot", "dense"]


@dataclass(frozen=True)
class Thresholds:
    """What decides on the CPU beside the measured table (``table.py``).

    Attributes:
        dense_work: Multiply-adds of the first layer per expert, below which rows that all choose every expert are
            computed without dispatch.
        shared_work: Multiply-adds of the first layer per busy expert, from which ``segments`` is taken where torch has
            several threads: it gives whole experts to each; ``grouped_mm`` lets all threads meet in every product,
            which on a busy machine takes many times longer.
        stack_bytes: Size of the first layer of the whole bank, from which fresh gradients cost more in page faults than
            in arithmetic; ``segments`` asks for huge pages.
    """

    dense_work: float
    shared_work: float
    stack_bytes: float


THRESHOLDS = Thresholds(dense_work=2e7, shared_work=4e6, stack_bytes=32 << 20)


def apply(
    experts: Experts | FeedForward,
    x_ND: Tensor,
    routing: Routing,
    *,
    side: tuple[Tensor, ...] = (),
    backend: Backend = "auto",
    weight_at: Literal["output", "input"] = "output",
) -> Tensor:
    """Apply a bank to a sparse routing: ``y[t] = sum over m with target t of w_m E_m(x[row_m])``.

    Usually that is ``run`` with the plan of the routing, which takes the counts to the host once. A handful of rows
    without gradients needs no plan (``few_rows``). Three cases do
    without the host (``static``): a traced call (``torch.compile(fullgraph=True)``, ``torch.export``), whose graph must
    not depend on what was routed; bfloat16 on CUDA, where waiting for the counts would leave the device idle; and
    ``torch.func.vmap`` over routings, which differ from sample to sample: there every expert runs on every row.

    Args:
        experts: The bank.
        x_ND: Rows (N, D); for ``ModuleExperts`` (N, ...).
        routing: The routing of these rows.
        side: Further inputs with N rows each.
        backend: As for ``run``.
        weight_at: As for ``run``.

    Returns:
        (num_targets, O).

    Raises:
        ValueError: As ``run`` does.

    Example:
        >>> from moeapps.moe import LinearScore, MLPExperts, Router, TopK
        >>> x_ND = torch.randn(5, 8)
        >>> apply(MLPExperts(4, 8, 16), x_ND, Router(LinearScore(8, 4), TopK(2))(x_ND)).shape
        torch.Size([5, 8])
    """
    if torch.compiler.is_compiling() or x_ND.is_cuda:
        _check(experts, x_ND, routing, backend, weight_at)
        y = _apply_static(experts, x_ND, routing, side, backend, weight_at == "input")
        if y is not None:
            return y
    elif is_transformed() and (is_batched(routing.expert_M) or is_batched(routing.row_M)):
        _check(experts, x_ND, routing, backend, weight_at)
        if backend not in ("auto", "loop"):
            raise ValueError(f"backend={backend!r} cannot run here: {_NO_VMAP}; use backend='auto' or 'loop'.")
        return every_expert(experts, x_ND, routing, side=side, at_input=weight_at == "input")
    elif backend == "auto" and not side and routing.expert_M.shape[0] <= MAX_ASSIGNMENTS:
        y = _apply_few(experts, x_ND, routing, weight_at)
        if y is not None:
            return y
    return run(experts, x_ND, plan_of(routing), side=side, backend=backend, weight_at=weight_at)


def _apply_few(
    experts: Experts | FeedForward, x_ND: Tensor, routing: Routing, weight_at: Literal["output", "input"]
) -> Tensor | None:
    """The output of a handful of rows without a plan, or None where it cannot be had so."""
    if torch.is_grad_enabled() or routing.top_k is None or routing.target_M is not None or is_transformed():
        return None
    _check(experts, x_ND, routing, "auto", weight_at)
    ffn = experts.feed_forward()
    if ffn is None:
        return None
    ffn, x_ND = _autocast(ffn, x_ND)
    return few_rows(ffn, x_ND, routing, at_input=weight_at == "input")


def _apply_static(
    experts: Experts | FeedForward,
    x_ND: Tensor,
    routing: Routing,
    side: tuple[Tensor, ...],
    backend: Backend,
    at_input: bool,
) -> Tensor | None:
    """The output without a look at the routing on the host, or None where that is not possible or not worth it."""
    traced, exported = torch.compiler.is_compiling(), torch.compiler.is_exporting()
    ffn = None if side else experts.feed_forward()
    if ffn is not None:
        ffn, x_ND = _autocast(ffn, x_ND)
        if backend in ("auto", "grouped_mm") and x_ND.is_cuda and grouped_mm_refusal(ffn, x_ND) is None:
            return grouped_mm_static(ffn, x_ND, routing, at_input=at_input)
        if traced and backend in ("auto", "segments") and ffn.activation.tabulated:
            return segments_static(ffn, x_ND, routing, at_input=at_input)
    if exported or (traced and experts.batched and backend == "auto"):
        return every_expert(experts, x_ND, routing, side=side, at_input=at_input)
    return None


@runs_eagerly
def run(
    experts: Experts | FeedForward,
    x_ND: Tensor,
    plan: Plan,
    *,
    side: tuple[Tensor, ...] = (),
    backend: Backend = "auto",
    weight_at: Literal["output", "input"] = "output",
) -> Tensor:
    """Apply a bank to the assignments of a plan; see ``apply``, which calls this.

    Under autocast a stacked bank computes in the autocast dtype, like ``nn.Linear``; float64 stays float64. Under
    ``torch.compile`` the graph breaks here, and nothing is compiled again when the routing changes.

    Args:
        experts: The bank.
        x_ND: Rows (N, D); for ``ModuleExperts`` (N, ...).
        plan: Sorted assignments, from ``sort_assignments``.
        side: Further inputs with N rows each, gathered like x.
        backend: ``auto`` chooses; ``loop`` does everything at moderate speed; ``segments`` and ``grouped_mm`` need
            stacked experts; ``onehot`` is the oracle of the tests.
        weight_at: Whether the weight multiplies the output of the expert, or its input: ``E_m(w_m x)``.

    Returns:
        (num_targets, O).

    Raises:
        ValueError: If x, the plan and the bank do not fit each other, a name is unknown or the named backend cannot run
            this case.
    """
    _check(experts, x_ND, plan, backend, weight_at)
    at_input = weight_at == "input"
    ffn = None if side else experts.feed_forward()
    if ffn is not None:
        ffn, x_ND = _autocast(ffn, x_ND)
    chosen: Choice = choose_backend(ffn, x_ND, plan) if backend == "auto" else backend
    if chosen == "loop":
        return loop(experts, x_ND, plan, side=side, at_input=at_input)
    if chosen == "onehot":
        return onehot(experts, x_ND, plan, side=side, at_input=at_input)
    refusal = None if backend == "auto" else _refusal(chosen, ffn, x_ND)
    if refusal is not None or ffn is None:
        raise ValueError(f"backend={backend!r} cannot run here: {refusal}; use backend='auto'.")
    compute = {"segments": segments, "grouped_mm": grouped_mm, "dense": dense}[chosen]
    return compute(ffn, x_ND, plan, at_input=at_input)


def choose_backend(ffn: FeedForward | None, x_ND: Tensor, plan: Plan) -> Choice:
    """Choose the fastest backend that gives right results and derivatives here.

    ``loop`` serves whatever is not a stacked two-layer bank, float64 (reference accuracy) and transforms that a custom
    function does not support (``torch.func``, forward mode). One expert, and few rows that all choose every expert,
    need no dispatch. On the CPU a table of rows per busy expert and width decides, measured per instruction set;
    elsewhere ``grouped_mm`` has no loop over experts on the host, and is preferred wherever it can run. ``ffn`` is None
    for a bank without stacked weights.
    """
    if ffn is None or x_ND.dtype == torch.float64 or is_transformed():
        return "loop"
    work = plan.num_assignments * ffn.w_in[0].numel() / max(plan.num_experts - plan.counts.count(0), 1)
    if (plan.num_experts == 1 or work < THRESHOLDS.dense_work) and is_dense(plan):
        return "dense"
    heavy = x_ND.device.type == "cpu" and _prefers_segments(ffn, work, x_ND.dtype)
    preferred: tuple[Choice, ...] = ("segments", "grouped_mm") if heavy else ("grouped_mm", "segments")
    return next((name for name in preferred if _refusal(name, ffn, x_ND) is None), "loop")


def _prefers_segments(ffn: FeedForward, work: float, dtype: torch.dtype) -> bool:
    """Whether ``segments`` is the faster one on the CPU, at ``work`` multiply-adds per busy expert."""
    if ffn.w_in.numel() * ffn.w_in.element_size() >= THRESHOLDS.stack_bytes:
        return True
    if torch.get_num_threads() > 1 and work >= THRESHOLDS.shared_work:
        return True
    weights = ffn.w_in[0].numel()
    return table.preferred(work / weights, weights, dtype) == "segments"


def _check(experts: Experts | FeedForward, x_ND: Tensor, plan: Plan | Routing, backend: str, weight_at: str) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(get_args(Backend))}.")
    if weight_at not in ("output", "input"):
        raise ValueError(f"weight_at={weight_at!r} is unknown; use 'output' or 'input'.")
    if x_ND.shape[0] != plan.num_rows:
        raise ValueError(f"x has {x_ND.shape[0]} rows, but the routing was made for {plan.num_rows}; route this x.")
    if experts.num_experts != plan.num_experts:
        raise ValueError(
            f"the bank has {experts.num_experts} experts, but the routing names {plan.num_experts}; give both the same "
            "number."
        )


def _autocast(ffn: FeedForward, x_ND: Tensor) -> tuple[FeedForward, Tensor]:
    """Cast a bank and its rows as autocast would cast a linear layer, and check that their dtypes agree."""
    device = x_ND.device.type
    if torch.is_autocast_enabled(device) and x_ND.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x_ND = x_ND.to(dtype)
        ffn = replace(
            ffn,
            w_in=ffn.w_in.to(dtype),
            b_in=None if ffn.b_in is None else ffn.b_in.to(dtype),
            w_out=ffn.w_out.to(dtype),
            b_out=None if ffn.b_out is None else ffn.b_out.to(dtype),
        )
    if x_ND.dtype != ffn.w_in.dtype:
        raise ValueError(
            f"x is {x_ND.dtype}, but the experts are {ffn.w_in.dtype}; convert one of them, or use torch.autocast."
        )
    return ffn, x_ND


_NO_VMAP = "torch.func.vmap gives every sample a routing of its own, which the host cannot read"


def _refusal(backend: Choice, ffn: FeedForward | None, x_ND: Tensor) -> str | None:
    """Why a fast backend cannot run this case, or None when it can."""
    if ffn is None:
        return "the experts are not a stacked two-layer network, or side inputs were given"
    if backend == "grouped_mm":
        return grouped_mm_refusal(ffn, x_ND)
    if backend == "segments" and is_transformed():
        return "torch.func and forward mode cannot use its hand-written backward"
    return segments_refusal(ffn) if backend == "segments" else None
