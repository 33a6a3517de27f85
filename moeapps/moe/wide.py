# SPDX-License-Identifier: Apache-2.0
"""Numbers that half precision is too coarse for: buffers that no cast of a model makes narrower than float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn


class WideBuffers(nn.Module):
    """Base of modules with buffers that stay as they are where the model is cast to half precision.

    Tables of numbers close together, and what moves by less than half precision resolves: the bias of a choice, its
    threshold. Other casts hold for them as for the rest. Name it before other bases.

    Attributes:
        wide: names of the buffers.

    Example:
        >>> class Clock(WideBuffers):
        ...     wide = ("time",)
        >>> clock = Clock()
        >>> clock.register_buffer("time", torch.zeros(1, dtype=torch.float64))
        >>> clock.bfloat16().time.dtype, clock.float().time.dtype
        (torch.float64, torch.float32)
    """

    wide: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers.get(name) for name in self.wide}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers.get(name)
            if buffer is not None and after is not None and after.element_size() < 4 <= buffer.element_size():
                self._buffers[name] = buffer.to(after.device)
        return self


def wide_dtype() -> torch.dtype:
    """The dtype of new tensors, float32 at least: a trainer in half precision makes that the default."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)
