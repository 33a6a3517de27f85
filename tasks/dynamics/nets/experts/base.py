# SPDX-License-Identifier: Apache-2.0
"""Banks of meta-learners: E networks ``f_k(x, context)`` with stacked weights, one kind per class.

Every bank reads the WHOLE context of a row as its side input and cuts out what its expert may read: with
``split_context`` expert k reads the k-th of E equal pieces, without it everything; ``shift_context`` adds one learned
number per expert to what it reads.

Shape letters: E experts, M rows sorted by expert, C rows of one expert (padded), D state size, m context numbers that
an expert reads, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from moeapps.moe import Experts


class MetaExperts(Experts):
    """Base of the banks: cuts contexts, sorts rows into equal blocks, starts all experts from the same weights.

    A subclass makes its stacks and defines ``reset_parameters`` and ``compute``; its ``options`` are those below.

    Args:
        state_dim: D.
        num_experts: E.
        context_dim: whole width of a context.
        split_context: whether expert k reads only its own piece of ``context_dim / E`` numbers.
        shift_context: whether each expert adds one learned number (0 at the start) to what it reads.
        same_init: whether all experts start from the same weights (published: yes).

    Raises:
        ValueError: a context that cannot be divided among the experts, or a size below 1.
    """

    batched: ClassVar[bool] = True
    num_inputs: ClassVar[int] = 1  # states that make a row: the state, or the model's and the observed one

    def __init__(
        self,
        state_dim: int,
        num_experts: int,
        context_dim: int,
        *,
        split_context: bool = True,
        shift_context: bool = True,
        same_init: bool = True,
    ) -> None:
        super().__init__(num_experts, self.num_inputs * state_dim, state_dim)
        if context_dim < 1 or (split_context and context_dim % num_experts):
            raise ValueError(
                f"context_dim={context_dim} cannot be split into {num_experts} equal pieces; use a multiple of "
                f"{num_experts}, e.g. {num_experts * max(1, round(context_dim / num_experts))}, or split_context: false"
            )
        self.context_dim, self.split_context, self.same_init = context_dim, split_context, same_init
        self.piece_dim = context_dim // num_experts if split_context else context_dim
        self.register_parameter("shift", nn.Parameter(torch.zeros(num_experts)) if shift_context else None)
        self.shift: nn.Parameter | None

    # What a subclass provides -------------------------------------------------------------------------------------

    def compute(self, p: dict[str, Tensor], x_ECD: Tensor, piece_ECm: Tensor) -> Tensor:
        """Apply expert k to block k.

        Args:
            p: the stacked weights by name, of all E experts or of the one at work.
            x_ECD: states [E, C, D].
            piece_ECm: what is read of the contexts [E, C, m], shift included.

        Returns:
            [E, C, O].
        """
        raise NotImplementedError

    def stacks(self) -> dict[str, Tensor]:
        """The stacked weights by name, without the shift."""
        return {name: p for name, p in self._parameters.items() if p is not None and name != "shift"}

    # Experts ------------------------------------------------------------------------------------------------------

    def grouped(self, x_MD: Tensor, counts: Sequence[int] | Tensor, *side: Tensor) -> Tensor:
        """Apply each expert to its own rows; ``side`` is the context [M, context_dim].

        Rows are padded to one block per expert, unless that more than doubled the work.
        """
        sizes: list[int] = counts.tolist() if isinstance(counts, Tensor) else list(counts)
        context_Mc = self._context(side)
        E, M, largest = self.num_experts, x_MD.shape[0], max(sizes)
        if E == 1 or E * largest > 2 * M:
            return self._loop(x_MD, sizes, context_Mc)
        expert_M = torch.arange(E, device=x_MD.device).repeat_interleave(
            torch.tensor(sizes, device=x_MD.device), output_size=M
        )
        piece_Mm = self._piece(context_Mc, expert_M)
        if E * largest == M:
            return self.compute(self.stacks(), _blocks(x_MD, E), _blocks(piece_Mm, E)).flatten(0, 1)
        starts = torch.tensor([0, *sizes[:-1]], device=x_MD.device).cumsum(0)
        place_M = torch.arange(M, device=x_MD.device) + (expert_M * largest - starts[expert_M])
        blocks = [
            _blocks(rows.new_zeros(E * largest, rows.shape[1]).index_copy(0, place_M, rows), E)
            for rows in (x_MD, piece_Mm)
        ]
        return self.compute(self.stacks(), *blocks).flatten(0, 1).index_select(0, place_M)

    def bind(self, context_Sc: Tensor, expert_S: Tensor, weight_S: Tensor) -> Callable[[Tensor], Tensor]:
        """Put contexts into experts once, for all the states of a solve: as ``grouped``, and several times as fast.

        Args:
            context_Sc: one context per environment.
            expert_S: the expert of each environment, int64.
            weight_S: factor of its output.

        Returns:
            states [S, R, D] -> [S, R, O].
        """
        own = {name: stack.index_select(0, expert_S) for name, stack in self.stacks().items()}
        piece_S1m, weight_S11 = self._piece(context_Sc, expert_S)[:, None], weight_S[:, None, None]
        return lambda x_SRD: weight_S11 * self.compute(own, x_SRD, piece_S1m.expand(-1, x_SRD.shape[1], -1))

    def every(self, x: Tensor, *side: Tensor) -> Tensor:
        """Apply every expert to every row; ``side`` is the context [N, context_dim]."""
        context_Nc = self._context(side)
        x_END = x if x.dim() == 3 else x.expand(self.num_experts, *x.shape)
        expert_E = torch.arange(self.num_experts, device=x.device)
        # No len(): torch.export would take the number of rows for a constant.
        piece = torch.stack([self._piece(context_Nc, k.expand(context_Nc.shape[0])) for k in expert_E])
        return self.compute(self.stacks(), x_END, piece).transpose(0, 1)

    def pieces(self, context: Tensor) -> Tensor:
        """What each expert reads of contexts [..., context_dim], without the shift: [..., E, m]."""
        if self.split_context:
            return context.reshape(*context.shape[:-1], self.num_experts, self.piece_dim)
        return context.unsqueeze(-2).expand(*context.shape[:-1], self.num_experts, -1)

    def _piece(self, context_Mc: Tensor, expert_M: Tensor) -> Tensor:
        """What the expert of each row reads, [M, m]."""
        piece_Mm = context_Mc
        if self.split_context and self.num_experts > 1:
            index_M1m = expert_M[:, None, None].expand(-1, 1, self.piece_dim)
            piece_Mm = self.pieces(context_Mc).gather(1, index_M1m).squeeze(1)
        return piece_Mm if self.shift is None else piece_Mm + self.shift[expert_M, None]

    def _loop(self, x_MD: Tensor, sizes: list[int], context_Mc: Tensor) -> Tensor:
        """One expert after the other; the first one runs on no row when all idle, so that gradients exist."""
        busy = [k for k, size in enumerate(sizes) if size] or [0]
        rows = list(zip(x_MD.split(sizes), context_Mc.split(sizes), strict=True))
        outputs = []
        for k in busy:
            x_RD, context_Rc = rows[k]
            piece_Rm = self._piece(context_Rc, torch.full((len(x_RD),), k, device=x_MD.device))
            own = {name: stack[k : k + 1] for name, stack in self.stacks().items()}
            outputs.append(self.compute(own, x_RD[None], piece_Rm[None])[0])
        return torch.cat(outputs)

    def _context(self, side: Sequence[Tensor]) -> Tensor:
        if len(side) != 1 or side[0].shape[-1] != self.context_dim:
            raise ValueError(
                f"{type(self).__name__} reads one side input, contexts of {self.context_dim} numbers, but got "
                f"{[tuple(s.shape) for s in side]}"
            )
        return side[0]

    def uniform(self, parameter: Tensor, bound: float) -> None:
        """Draw a stack from U(-bound, bound): once for all experts with ``same_init``."""
        with torch.no_grad():
            draw = torch.empty_like(parameter[:1] if self.same_init else parameter).uniform_(-bound, bound)
            parameter.copy_(draw.expand_as(parameter))


ExpertsFactory = Callable[[int, int, int], MetaExperts]
"""``factory(state_dim, num_experts, context_dim)``."""


def _blocks(rows: Tensor, num: int) -> Tensor:
    """Rows [E * C, d] as blocks [E, C, d]; C may be 0."""
    return rows.view(num, len(rows) // num, rows.shape[1])


def layer_sizes(dim_in: int, width: int, depth: int, dim_out: int) -> list[tuple[int, int]]:
    """Sizes (in, out) of the ``depth`` linear layers of a perceptron."""
    if depth < 1 or width < 1:
        raise ValueError(f"depth={depth} and width={width}, but a perceptron has at least one layer of one unit")
    return list(pairwise([dim_in, *[width] * (depth - 1), dim_out]))
