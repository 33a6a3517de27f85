# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: one table of thresholds, and what each backend cannot do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moeapps.moe.backends.grouped_mm import grouped_mm, grouped_mm_refusal
from moeapps.moe.backends.loop import loop
from moeapps.moe.backends.onehot import onehot
from moeapps.moe.backends.segments import segments

if TYPE_CHECKING:
    from moeapps.moe.backends.plan import Plan
    from moeapps.moe.experts import Experts, FeedForward

Backend = Literal["auto", "loop", "segments", "grouped_mm", "onehot"]

# Rows per busy expert from which `segments` is at least as fast as `grouped_mm` (python -m benchmarks.core).
SEGMENT_MIN_ROWS: dict[str, int] = {"cpu": 96}
_DEFAULT_MIN_ROWS = 0


def run(
    experts: Experts,
    x_ND: Tensor,
    plan: Plan,
    *,
    side: tuple[Tensor, ...] = (),
    backend: Backend = "auto",
    weight_at: Literal["output", "input"] = "output",
) -> Tensor:
    """Apply a bank to the assignments of a plan: ``y[t] = sum over m with target t of w_m E_m(x[row_m])``.

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
        ValueError: If x has not the plan's rows, the name is unknown or the named backend cannot run this case.
    """
    if x_ND.shape[0] != plan.num_rows:
        raise ValueError(f"x has {x_ND.shape[0]} rows, but the routing was made for {plan.num_rows}; route this x.")
    if weight_at not in ("output", "input"):
        raise ValueError(f"weight_at={weight_at!r} is unknown; use 'output' or 'input'.")
    at_input = weight_at == "input"
    ffn = experts.feed_forward() if not side else None
    chosen = choose_backend(ffn, x_ND, plan) if backend == "auto" else backend
    if chosen == "loop":
        return loop(experts, x_ND, plan, side=side, at_input=at_input)
    if chosen == "onehot":
        return onehot(experts, x_ND, plan, side=side, at_input=at_input)
    refusal = _refusal(chosen, ffn, x_ND)
    if refusal is not None or ffn is None:
        raise ValueError(f"backend={backend!r} cannot run here: {refusal}; use backend='auto'.")
    compute = segments if chosen == "segments" else grouped_mm
    return compute(ffn, x_ND, plan, at_input=at_input)


def choose_backend(ffn: FeedForward | None, x_ND: Tensor, plan: Plan) -> Backend:
    """Choose the fastest backend that gives right results and derivatives here.

    ``loop`` serves whatever is not a stacked two-layer bank, float64 (reference accuracy) and transforms that a custom
    function does not support (``torch.func``, forward mode). Otherwise the rows per busy expert decide.

    Args:
        ffn: Stacked weights of the bank, None if it has none.
        x_ND: Rows (N, D).
        plan: Sorted assignments.
    """
    if ffn is None or x_ND.dtype == torch.float64 or _is_transformed():
        return "loop"
    busy = sum(count > 0 for count in plan.counts)
    rows = plan.num_assignments / busy if busy else 0.0
    enough = rows >= SEGMENT_MIN_ROWS.get(x_ND.device.type, _DEFAULT_MIN_ROWS)
    preferred: tuple[Backend, ...] = ("segments", "grouped_mm") if enough else ("grouped_mm", "segments")
    return next((name for name in preferred if _refusal(name, ffn, x_ND) is None), "loop")


def _refusal(backend: Backend, ffn: FeedForward | None, x_ND: Tensor) -> str | None:
    """Why a fast backend cannot run this case, or None when it can."""
    if backend == "grouped_mm":
        return grouped_mm_refusal(ffn, x_ND)
    if backend != "segments":
        return "it is not one of auto, loop, segments, grouped_mm, onehot"
    if ffn is None:
        return "the experts are not a stacked two-layer network, or side inputs were given"
    if not ffn.activation.recomputable:
        return f"the activation {ffn.activation.name} has parameters or is random, and segments computes it twice"
    return None


def _is_transformed() -> bool:
    """Whether a ``torch.func`` transform or a forward-mode level is active."""
    functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return functorch or torch.autograd.forward_ad._current_level >= 0
