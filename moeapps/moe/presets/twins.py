# SPDX-License-Identifier: Apache-2.0
"""The dense twin, derived from the mixture it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from moeapps.moe.experts import Experts, GLUExperts, MLPExperts
from moeapps.moe.joined import JoinedExperts
from moeapps.moe.layer import LayerFactory, MoELayer
from moeapps.moe.presets.systems import point_moe
from moeapps.moe.routers import ConstantScore, Dense, Router

Match = Literal["flops", "params"]


@dataclass(frozen=True)
class TwinOf:
    """The mixture that a twin was made for, so that a run can report how well it is matched.

    Args:
        match: ``flops`` or ``params``.
        flops_per_row: forward operations of the mixture's experts and linear router on one row.
        params: parameters of the mixture's layer.
    """

    match: Match
    flops_per_row: int
    params: int


class DenseTwin(MoELayer):
    """One expert that is always on in place of a mixture.

    Args:
        experts: a bank of one expert.
        twin_of: what it stands for.
    """

    def __init__(self, experts: Experts, twin_of: TwinOf) -> None:
        super().__init__(Router(ConstantScore(1), Dense("ones")), experts)
        self.twin_of = twin_of


def dense_twin(*, moe: LayerFactory | None = None, match: Match = "flops") -> LayerFactory:
    """The twin of a mixture without a choice: one expert of its kind that is always on, as wide as the match asks for.

    The width is read off the mixture, layer by layer: the sum of the hidden widths of the experts that work on a row,
    shared ones included (``flops``), or of all experts (``params``). The router's own product is not made up for; run
    summaries say what it comes to.

    Args:
        moe: the mixture's factory, as the network gets it; None means ``point_moe()`` with nothing said.
        match: equal active FLOPs or equal parameters.

    Raises:
        ValueError: an unknown ``match``; when a layer is made, a mixture whose experts are no stacked two-layer
            networks of one kind, or whose router has no mean number of experts per row.

    Example:
        >>> dense_twin(moe=point_moe(num_experts=4, top_k=2))(8).experts.hidden_dim
        16
    """
    if match not in ("flops", "params"):
        raise ValueError(f"match={match!r}: a twin has equal 'flops' or equal 'params'; choose one.")
    mixture = point_moe() if moe is None else moe

    def build(dim: int) -> DenseTwin:
        with torch.device("meta"):  # only its sizes are read: no memory, no random numbers
            layer = mixture(dim)
        if not isinstance(layer, MoELayer):
            raise ValueError(f"moe makes a {type(layer).__name__}, which has no twin; give the factory of a mixture.")
        parts = _parts(layer.experts)
        like = parts[0]
        if len({(type(part), part.activation, part.b_in is None) for part in parts}) > 1:
            raise ValueError("the mixture's experts differ in more than width; write its twin with presets.dense.")
        width, bias = _width(layer, parts, match), like.b_in is not None
        bank = type(like)(1, dim, width, out_dim=like.out_dim, activation=like.activation, bias=bias)
        return DenseTwin(bank, TwinOf(match, _flops(layer, parts), sum(p.numel() for p in layer.parameters())))

    return build


def _parts(bank: Experts) -> list[GLUExperts | MLPExperts]:
    """The stacks of a bank."""
    found = list(bank.banks) if isinstance(bank, JoinedExperts) else [bank]
    stacks = [part for part in found if isinstance(part, GLUExperts | MLPExperts)]
    if len(stacks) < len(found):
        names = ", ".join(sorted({type(part).__name__ for part in found}))
        raise ValueError(f"experts of {names} have no hidden width to match; write the twin of this mixture by hand.")
    return stacks


def _widths(parts: list[GLUExperts | MLPExperts]) -> list[int]:
    """Hidden width of every expert, shared ones last."""
    return [part.hidden_dim for part in parts for _ in range(part.num_experts)]


def _width(layer: MoELayer, parts: list[GLUExperts | MLPExperts], match: Match) -> int:
    widths = _widths(parts)
    if match == "params":
        return sum(widths)
    routed, shared = widths[: layer.num_experts], widths[layer.num_experts :]
    return round(_mean_k(layer) * sum(routed) / len(routed)) + sum(shared)


def _mean_k(layer: MoELayer) -> float:
    k = layer.router.mean_k()
    if k is None:
        raise ValueError(
            f"{type(layer.router).__name__} does not say how many experts a row has; name a mixture with a fixed "
            "number (top_k), or write the twin with presets.dense."
        )
    return k


def _flops(layer: MoELayer, parts: list[GLUExperts | MLPExperts]) -> int:
    """Forward operations on one row: of the experts that work on it and of the router's matrices."""
    per_unit = parts[0].flops_per_row / parts[0].hidden_dim
    router = sum(2 * p.numel() for p in layer.router.parameters() if p.dim() == 2)
    return round(per_unit * _width(layer, parts, "flops")) + router
