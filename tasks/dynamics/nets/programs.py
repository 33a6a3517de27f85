# SPDX-License-Identifier: Apache-2.0
"""One evaluation of the experts as a module of plain tensors, for export."""

from __future__ import annotations

from torch import Tensor, nn

from tasks.dynamics.model import MixER


class StateProgram(nn.Module):
    """dx/dt, or the next state, [S, N, D] from contexts [S, c] and states [S, N, D] (of a sequence model 2 D wide)."""

    def __init__(self, net: MixER) -> None:
        super().__init__()
        self.net = net

    def forward(self, context: Tensor, state: Tensor) -> Tensor:
        """Route by the context, and apply."""
        routing = self.net.layer.router(context)
        side = (context[:, None].expand(-1, state.shape[1], -1),)
        y: Tensor = self.net.layer(state, routing=routing.repeat_rows(state.shape[1]), side=side)
        return y
