# SPDX-License-Identifier: Apache-2.0
"""One bank made of several: routed and shared experts of different widths, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.experts import Experts
from moeapps.moe.routing import Routing


class JoinedExperts(Experts):
    """Banks side by side under one numbering: expert ids run through the first bank, then the second, and so on.

    Each bank keeps its own stacked weights and its own fast backend; a routing is restricted to the ids of each in
    turn.

    Args:
        banks: at least one, all of the same input and output width.

    Raises:
        ValueError: if there is no bank, or their widths differ, or one needs all rows.

    Source: UniMoE-Audio, whose shared experts have half the width of the routed ones
        (docs/papers/unimoe_audio.md, equation 4).

    Example:
        >>> from moeapps.moe import GLUExperts
        >>> JoinedExperts([GLUExperts(4, 8, 16), GLUExperts(2, 8, 8)]).num_experts
        6
    """

    def __init__(self, banks: Sequence[Experts]) -> None:
        widths = {(bank.in_dim, bank.out_dim) for bank in banks}
        if len(widths) != 1:
            raise ValueError(
                f"the banks have (in, out) widths {sorted(widths)}; give at least one bank, all of one width."
            )
        if not all(bank.supports_grouped for bank in banks):
            raise ValueError("banks that must see all rows (batch statistics) cannot be joined; use one bank of them.")
        super().__init__(sum(bank.num_experts for bank in banks), *widths.pop())
        self.banks = nn.ModuleList(banks)

    def each(self) -> list[Experts]:
        """The banks, in order."""
        return [bank for bank in self.banks if isinstance(bank, Experts)]

    def _spans(self) -> Iterator[tuple[Experts, int]]:
        """Each bank with the id of its first expert."""
        start = 0
        for bank in self.each():
            yield bank, start
            start += bank.num_experts

    def restrict(self, routing: Routing) -> list[tuple[Experts, Routing]]:
        """For each bank the same assignments, in its own ids; those of other banks are sentinels."""
        parts = []
        for bank, start in self._spans():
            local_M = routing.expert_M - start
            mine_M = (local_M >= 0) & (local_M < bank.num_experts)
            local_M = local_M.where(mine_M, bank.num_experts)
            parts.append((bank, replace(routing, expert_M=local_M, num_experts=bank.num_experts)))
        return parts

    @property
    def flops_per_row(self) -> int:
        """Forward operations of one expert on one row, averaged over all experts."""
        return sum(bank.num_experts * bank.flops_per_row for bank in self.each()) // self.num_experts

    @override
    def grouped(self, x_MD: Tensor, counts: Sequence[int] | Tensor, *side: Tensor) -> Tensor:
        counts = counts.tolist() if isinstance(counts, Tensor) else list(counts)
        outputs, row = [], 0
        for bank, start in self._spans():
            own = counts[start : start + bank.num_experts]
            rows = slice(row, row + sum(own))
            outputs.append(bank.grouped(x_MD[rows], own, *(s[rows] for s in side)))
            row = rows.stop
        return torch.cat(outputs)

    @override
    def every(self, x: Tensor, *side: Tensor) -> Tensor:
        if x.ndim == 2:
            return torch.cat([bank.every(x, *side) for bank in self.each()], dim=1)
        return torch.cat([bank.every(x[s : s + bank.num_experts], *side) for bank, s in self._spans()], dim=1)

    def select(self, ids: Iterable[int]) -> JoinedExperts:
        """Copy the named experts into a new bank; ids must keep the order of the banks."""
        chosen = list(ids)
        super().select(chosen)
        if chosen != sorted(chosen):
            raise ValueError(f"ids={chosen}, but joined banks keep their order; give ascending ids.")
        parts = [(bank, [i - s for i in chosen if 0 <= i - s < bank.num_experts]) for bank, s in self._spans()]
        return JoinedExperts([bank.select(own) for bank, own in parts if own])

    @override
    def reset_parameters(self) -> None:
        for bank in self.each():
            bank.reset_parameters()

    def _keep(self, ids: list[int]) -> None:
        """Nothing of its own to keep: ``select`` builds from the banks."""
