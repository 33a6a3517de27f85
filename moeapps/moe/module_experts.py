# SPDX-License-Identifier: Apache-2.0
"""Experts that are modules of any kind."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from moeapps.moe.experts import Experts
from moeapps.moe.feed_forward import counts_on_host


class ModuleExperts(Experts):
    """Experts that are modules of any kind, unlike each other if need be (vector fields, frozen specialists).

    Each module maps a row tensor (R, ...) and its side inputs (R, ...) to (R, O).

    Args:
        modules: The experts. The same object may not appear twice.
        in_dim: Width of a row; None takes it from the first ``nn.Linear`` of the first expert.
        out_dim: Width of an output row; None takes it from the last ``nn.Linear`` of the first expert.
        row_dims: Dimensions of one row: 1 for vectors, 3 for images.
        flops_per_row: Forward operations of one expert on one row; None counts the ``nn.Linear`` layers, two per
            weight, averaged over the experts.

    Raises:
        ValueError: If the list is empty, an expert appears twice, or a width is neither given nor found.

    Example:
        >>> experts = ModuleExperts([nn.Linear(8, 6), nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 6))])
        >>> experts.every(torch.zeros(5, 8)).shape
        torch.Size([5, 2, 6])
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        row_dims: int = 1,
        flops_per_row: int | None = None,
    ) -> None:
        if not modules:
            raise ValueError("ModuleExperts got an empty list; give it at least one module.")
        if len({id(m) for m in modules}) != len(modules):
            raise ValueError("ModuleExperts got the same module twice; give each expert a module of its own (copy it).")
        linears = [m for m in modules[0].modules() if isinstance(m, nn.Linear)]
        if (in_dim is None or out_dim is None) and not linears:
            raise ValueError("the experts have no nn.Linear to read their widths from; pass in_dim and out_dim.")
        super().__init__(
            len(modules),
            linears[0].in_features if in_dim is None else in_dim,
            linears[-1].out_features if out_dim is None else out_dim,
        )
        self.experts = nn.ModuleList(modules)
        self.row_dims = row_dims
        self._flops_per_row = flops_per_row

    @property
    def flops_per_row(self) -> int:
        """Forward operations on one row, as given, or counted over the linear layers and averaged over the experts."""
        if self._flops_per_row is not None:
            return self._flops_per_row
        weights = sum(m.weight.numel() for m in self.experts.modules() if isinstance(m, nn.Linear))
        return 2 * weights // self.num_experts

    def reset_parameters(self) -> None:
        """Call ``reset_parameters`` of every submodule that has it."""
        for module in self.experts.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def grouped(self, x_MD: Tensor, counts: Sequence[int] | Tensor, *side: Tensor) -> Tensor:
        """Apply each expert to its own rows; see ``Experts.grouped``.

        An expert without rows is not called (many networks refuse an empty batch), yet its parameters get gradients
        that are exactly zero, as those of a stacked bank do.
        """
        counts = counts_on_host(counts)
        outputs = []
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            rows = slice(start, start + count)
            start += count
            if count:
                outputs.append(expert(x_MD[rows], *(s[rows] for s in side)))
        y_MO = torch.cat(outputs) if outputs else x_MD.new_zeros(0, self.out_dim)
        idle = [e for e, count in zip(self.experts, counts, strict=True) if not count]
        return _with_zero_gradients(y_MO, idle)

    def every(self, x: Tensor, *side: Tensor) -> Tensor:
        """Apply every expert to every row; see ``Experts.every``. Rows have ``row_dims`` dimensions."""
        own_view = x.dim() == self.row_dims + 2
        return torch.stack([m(x[e] if own_view else x, *side) for e, m in enumerate(self.experts)], dim=1)

    def _keep(self, ids: list[int]) -> None:
        self.experts = nn.ModuleList([copy.deepcopy(self.experts[i]) for i in ids])


def _with_zero_gradients(y: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """Connect the parameters of idle modules to ``y`` through empty sums, whose gradient is exactly zero."""
    idle = [p.reshape(-1)[:0].sum().to(y.dtype) for m in modules for p in m.parameters() if p.requires_grad]
    return y + torch.stack(idle).sum() if idle else y
