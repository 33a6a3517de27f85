# SPDX-License-Identifier: Apache-2.0
"""Chain of experts: one bank applied several times, with a router per step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from moeapps.moe.experts import Experts
from moeapps.moe.layer import MoELayer
from moeapps.moe.routers.router import RouterBase


class Chain(nn.Module):
    r"""The same experts in T steps: :math:`x_t = x_{t-1} + MoE_t(x_{t-1})`, each step with a router of its own.

    The compute is that of T times k experts per row. Each step leaves a record of its own (``steps.0``, ``steps.1``
    ...).

    Args:
        routers: one per step.
        experts: the bank all steps share; input and output widths are equal.
        num_shared: always-on experts, at the end of the bank.
        add_input: return :math:`x_T`; False returns :math:`x_T - x_0`, for a block that adds its own residual.

    Shape:
        x (..., d) -> (..., d).

    Raises:
        ValueError: if there is no router, or the experts change the width.

    Source: chain of experts (docs/papers/core.md, equation 20; its training settings were not found).

    Example:
        >>> import torch
        >>> from moeapps.moe import GLUExperts, LinearScore, Router, TopK
        >>> chain = Chain([Router(LinearScore(8, 4), TopK(2)) for _ in range(2)], GLUExperts(4, 8, 16))
        >>> chain(torch.zeros(3, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self, routers: Sequence[RouterBase], experts: Experts, *, num_shared: int = 0, add_input: bool = True
    ) -> None:
        super().__init__()
        if not routers:
            raise ValueError("a Chain has one router per step; give it at least one.")
        if experts.in_dim != experts.out_dim:
            raise ValueError(
                f"the experts map {experts.in_dim} to {experts.out_dim}, but steps of a Chain keep the width."
            )
        self.steps = nn.ModuleList(MoELayer(router, experts, num_shared=num_shared) for router in routers)
        self.add_input = add_input

    def forward(self, x: Tensor, *, token_mask: Tensor | None = None, group: Tensor | None = None) -> Tensor:
        """All steps; masked rows stay as they are.

        Args:
            x: (..., d).
            token_mask: bool, shaped like the rows.
            group: int64, shaped like the rows.
        """
        y = x
        for step in self.steps:
            y = y + step(y, token_mask=token_mask, group=group)
        return y if self.add_input else y - x
