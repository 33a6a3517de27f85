# SPDX-License-Identifier: Apache-2.0
"""The recorder: what every MoE layer routed, without threading a tuple through the model.

``with MoERecorder(net) as recorder: net(x)`` fills ``recorder.records``, one :class:`Record` per call of a layer, in
call order. Losses, metrics, reports and figures are pure functions of records. Nothing is copied and nothing is
computed twice: a record holds references to tensors that the forward pass made anyway. With no recorder open a layer
pays two look-ups of a context variable.

Shape legend: N rows, E experts, o width of an expert's output.
"""

from __future__ import annotations

from collections.abc import Collection
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moeapps.moe.routing import AnyRouting, DenseRouting, Routing, SlotRouting

if TYPE_CHECKING:
    from moeapps.moe.layer import MoELayer

_ACTIVE: ContextVar[MoERecorder | None] = ContextVar("moeapps_recorder", default=None)
Kept = Literal["output", "experts"]


class Place(NamedTuple):
    """Where in a network a layer stands: the name of its stage and its numbers, outermost first."""

    stage: str
    numbers: tuple[int, ...]


def place_of(name: str) -> Place:
    """Read the place of a layer from its qualified name; the only code that looks into such names.

    The stage is what stands before the first number; without a number it is the last part of the name.

    Example:
        >>> place_of("net.encoder.2.blocks.1.attn.proj")
        Place(stage='encoder', numbers=(2, 1))
        >>> place_of("net.layer")
        Place(stage='layer', numbers=())
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    stage = parts[-1] if not numbers else parts[numbers[0] - 1] if numbers[0] else "layers"
    return Place(stage, tuple(int(parts[i]) for i in numbers))


@dataclass(frozen=True, eq=False)
class Record:
    """One call of one MoE layer, by reference.

    Args:
        name: qualified name of the layer inside the module given to the recorder.
        routing: what the router returned (features and logits are not detached).
        layer: the layer, for its router, its experts and their settings.
        token_mask: bool [N], False for rows that do not count; None means all count.
        group: int64 [N], the domain, sample or condition of each row; None if the caller did not say.
        output: what the layer gave (its last answer where one routing is applied several times); None unless asked for.
        expert_output: [N, E, o], what the experts gave where all run on all rows; None unless asked for.

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
    output: Any = None
    expert_output: Tensor | None = None

    @property
    def place(self) -> Place:
        """Stage and numbers of the layer."""
        return place_of(self.name)

    @property
    def index(self) -> int:
        """Number of the layer's stage (encoder 0, 1, ...; block 0, 1, ...); 0 for a layer without one."""
        return next(iter(self.place.numbers), 0)

    def work(self) -> Tensor:
        """How the work on each row is spread over the experts that worked: float64 [N, E].

        Rows sum to 1 (0 without any work): evenly over the chosen experts, by the size of the weight where all experts
        run (gates without a norm may be negative).
        """
        weight_NE = self.routing.assignment().detach()
        work_NE = (weight_NE != 0).double() if isinstance(self.routing, Routing) else weight_NE.double().abs()
        return work_NE / work_NE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)

    def chosen(self) -> Tensor:
        """The expert with the largest weight of those that a row uses, int64 [N]; -1 where it uses none.

        Weights may be negative. Sparse rows use what they are assigned to, dense ones what is allowed to some gate.
        """
        weight_NE, used_NE = self.routing.assignment().detach(), self._used()
        best_N = weight_NE.masked_fill(~used_NE, float("-inf")).max(dim=1).indices
        return best_N.where(used_NE.any(dim=1), -1)

    def _used(self) -> Tensor:
        """Which experts each row uses, whatever their weight: bool [N, E]."""
        routing = self.routing
        if isinstance(routing, SlotRouting):
            return routing.assignment() != 0  # a masked row reads no slot
        if isinstance(routing, DenseRouting):
            weight = routing.weight
            allowed = torch.ones_like(weight, dtype=torch.bool) if routing.allowed is None else routing.allowed
            return allowed.expand(weight.shape).reshape(-1, *weight.shape[-2:]).any(0)
        used = torch.zeros(routing.num_rows, routing.num_experts + 1, dtype=torch.bool, device=routing.expert_M.device)
        return used.index_put((routing.row_M, routing.expert_M), used.new_ones(()))[:, :-1]


class MoERecorder:
    """Context manager that collects one :class:`Record` per call of an MoE layer.

    The recorder belongs to the thread (context) that opened it; the innermost open recorder receives the records.
    Layers that run again while a backward pass is under way (activation checkpointing) are not recorded a second time,
    so counts and gradients are the same with and without checkpointing. Reentrant checkpointing runs the first pass
    without gradients, so a loss on its records would be silently constant: that raises.

    Args:
        module: the module whose layer names are used; None names layers ``MoELayer``, ``MoELayer_1`` ... in order of
            first call.
        keep: what records hold besides the routing: ``output`` of the layer, outputs of its ``experts`` (of layers
            whose experts all run on all rows).

    Raises:
        RuntimeError: when a layer is recorded with gradients off although they were on when the recorder was opened.

    Example:
        >>> with MoERecorder() as recorder:
        ...     pass
        >>> recorder.records
        []
    """

    def __init__(self, module: nn.Module | None = None, *, keep: Collection[Kept] = ()) -> None:
        self.module = module
        self.keep = frozenset(keep)
        self.records: list[Record] = []
        self._names: dict[int, str] = {}
        self._tokens: list[tuple[Token[MoERecorder | None], bool]] = []
        self._grad = True
        self._heard: Tensor | None = None

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

    def keep_output(self, routing: AnyRouting, output: Any) -> None:
        """Complete the record of a routing by what came of it, as far as that was asked for."""
        heard, self._heard = self._heard, None
        for i, record in reversed(list(enumerate(self.records))):
            if record.routing is routing:
                kept = output if "output" in self.keep else None
                self.records[i] = replace(record, output=kept, expert_output=heard)
                return

    def hear(self, expert_output: Tensor) -> None:
        """Hold the outputs of experts until their layer is done."""
        if "experts" in self.keep:
            self._heard = expert_output

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


def record_experts(y_NEo: Tensor) -> Tensor:
    """Hand outputs of all experts [N, E, o] to the open recorder, if it asked for them, and return them."""
    recorder = _ACTIVE.get()
    if recorder is not None and recorder.keep:
        recorder.hear(y_NEo)
    return y_NEo


def record_output(routing: AnyRouting, output: Any) -> None:
    """Hand what a layer gave for a routing to the open recorder, if it asked for outputs.

    Args:
        routing: the routing; a record of it must be there, else nothing is kept.
        output: what the layer returns.
    """
    recorder = _ACTIVE.get()
    if recorder is not None and recorder.keep:
        recorder.keep_output(routing, output)
