# SPDX-License-Identifier: Apache-2.0
"""The recorder: what every MoE layer routed, without threading a tuple through the model.

``with MoERecorder(net) as recorder: net(x)`` fills ``recorder.records``, one :class:`Record` per call of a layer, in
call order. Losses and metrics are pure functions of records. Nothing is computed and nothing is copied: a record holds
references to tensors that the forward pass made anyway. With no recorder open a layer pays one look-up of a context
variable.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeapps.moe.routing import AnyRouting

if TYPE_CHECKING:
    from moeapps.moe.layer import MoELayer

_ACTIVE: ContextVar[MoERecorder | None] = ContextVar("moeapps_recorder", default=None)


@dataclass(frozen=True, eq=False)
class Record:
    """One call of one MoE layer, by reference.

    Args:
        name: qualified name of the layer inside the module given to the recorder.
        routing: what the router returned (features and logits are not detached).
        layer: the layer, for its router, its experts and their settings.
        token_mask: bool [N], False for rows that do not count; None means all count.
        group: int64 [N], the domain, sample or condition of each row; None if the caller did not say.

    Example:
        >>> from moeapps.moe.routing import DenseRouting
        >>> Record("blocks.0.moe", DenseRouting(torch.ones(1, 1), 1), nn.Identity()).name
        'blocks.0.moe'
    """

    name: str
    routing: AnyRouting
    layer: MoELayer
    token_mask: Tensor | None = None
    group: Tensor | None = None


class MoERecorder:
    """Context manager that collects one :class:`Record` per call of an MoE layer.

    The recorder belongs to the thread (context) that opened it; the innermost open recorder receives the records.
    Layers that run again while a backward pass is under way (activation checkpointing) are not recorded a second time,
    so counts and gradients are the same with and without checkpointing. Reentrant checkpointing runs the first pass
    without gradients, so a loss on its records would be silently constant: that raises.

    Args:
        module: the module whose layer names are used; None names layers ``MoELayer``, ``MoELayer_1`` ... in order of
            first call.

    Raises:
        RuntimeError: when a layer is recorded with gradients off although they were on when the recorder was opened.

    Example:
        >>> with MoERecorder() as recorder:
        ...     pass
        >>> recorder.records
        []
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.module = module
        self.records: list[Record] = []
        self._names: dict[int, str] = {}
        self._tokens: list[tuple[Token[MoERecorder | None], bool]] = []
        self._grad = True

    def __enter__(self) -> MoERecorder:
        if self.module is not None:
            self._names = {id(child): name or type(child).__name__ for name, child in self.module.named_modules()}
        self._tokens.append((_ACTIVE.set(self), self._grad))
        self._grad = torch.is_grad_enabled()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        token, self._grad = self._tokens.pop()
        _ACTIVE.reset(token)

    def clear(self) -> None:
        """Forget all records (the references to their tensors are dropped)."""
        self.records.clear()

    def add(self, layer: MoELayer, routing: AnyRouting, token_mask: Tensor | None, group: Tensor | None) -> None:
        """Append one record; called by the layer through :func:`record_call`."""
        if self._grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "An MoE layer ran with gradients off inside a recorder that was opened with gradients on, so losses on "
                "its routing would have no gradient. Reentrant activation checkpointing does this: use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False). For a pass that needs no gradient on "
                "purpose, open a MoERecorder of its own inside the no_grad block."
            )
        self.records.append(Record(self._name_of(layer), routing, layer, token_mask, group))

    def _name_of(self, layer: nn.Module) -> str:
        if id(layer) not in self._names:
            stem, used = type(layer).__name__, set(self._names.values())
            number = sum(name == stem or name.startswith(f"{stem}_") for name in used)
            self._names[id(layer)] = stem if number == 0 else f"{stem}_{number}"
        return self._names[id(layer)]


def record_call(
    layer: MoELayer, routing: AnyRouting, *, token_mask: Tensor | None = None, group: Tensor | None = None
) -> None:
    """Hand one call to the open recorder, if any; calls that recompute activations during backward are ignored.

    Args:
        layer: the layer that routed.
        routing: its routing.
        token_mask: bool [N] or None.
        group: int64 [N] or None.
    """
    recorder = _ACTIVE.get()
    if recorder is None:
        return
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return  # a backward pass is under way: this call recomputes one that was recorded
    recorder.add(layer, routing, token_mask, group)
