# SPDX-License-Identifier: Apache-2.0
"""The MoE layer: route once, apply as often as you like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.backends import Backend
from moeapps.moe.combine import Combiner, Sum, Work
from moeapps.moe.experts import Experts
from moeapps.moe.losses import AuxLoss, SwitchBalance
from moeapps.moe.record import Record, record_call, record_output
from moeapps.moe.routers.router import RouterBase, check_rows, only_rows, read_rows
from moeapps.moe.routers.score import Features
from moeapps.moe.routing import AnyRouting, DenseRouting, Routing

LayerFactory = Callable[[int], nn.Module]
RouterFactory = Callable[[int], RouterBase]


class MoELayer(nn.Module):
    r"""Experts behind a router, :math:`y_n = \sum_{e \in R(f_n)} w_{ne} E_e(x_n) + \sum_s E_s(x_n)`.

    What is routed on (``features``) is an argument apart from what is processed (``x``). Shared experts are the last
    ``num_shared`` rows of the bank. Each call that routes hands one record to an open :class:`MoERecorder`; a call with
    a ``routing`` of yours does not (the record was made by ``route``).

    Args:
        router: features -> routing.
        experts: the bank, of ``router.num_experts + num_shared`` experts.
        num_shared: always-on experts; their weight is 1 unless the router weighs them.
        combiner: what becomes of the outputs; None means the weighted :class:`Sum`.
        backend: how sparse routings are computed.
        weight_at: whether a weight multiplies the output of its expert, or the input (they differ for non-linear
            experts).

    Shape:
        x (..., d) -> (..., o); (G, ..., o) for a router with gates. ``d`` may be several dimensions for
        ``ModuleExperts``.

    Raises:
        ValueError: if the sizes of router and experts do not fit, or a sparse router meets experts that need all rows.

    Source: docs/papers/core.md, equation 1, which all seven systems share.

    Example:
        >>> import torch
        >>> from moeapps.moe import GLUExperts, LinearScore, Router, TopK
        >>> layer = MoELayer(Router(LinearScore(8, 4), TopK(2)), GLUExperts(4, 8, 16))
        >>> layer(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        router: RouterBase,
        experts: Experts,
        *,
        num_shared: int = 0,
        combiner: Combiner | None = None,
        backend: Backend = "auto",
        weight_at: Literal["output", "input"] = "output",
    ) -> None:
        super().__init__()
        _check_sizes(router, experts, num_shared)
        if backend not in ("auto", "loop", "segments", "grouped_mm", "onehot"):
            raise ValueError(f"backend={backend!r}; use auto, loop, segments, grouped_mm or onehot.")
        if weight_at not in ("output", "input"):
            raise ValueError(f"weight_at={weight_at!r}; use 'output' or 'input'.")
        self.router, self.experts, self.num_shared = router, experts, num_shared
        self.combiner = Sum() if combiner is None else combiner
        self.backend: Backend = backend
        self.weight_at: Literal["output", "input"] = weight_at
        self.register_load_state_dict_pre_hook(_explain_sizes)

    @property
    def num_experts(self) -> int:
        """E, routed experts."""
        return self.router.num_experts

    def route(
        self,
        features: Features,
        *,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
    ) -> AnyRouting:
        """Route rows without applying any expert.

        Args:
            features: what is routed on, (..., d); all leading dimensions are rows. A router with gates also takes
                (G, N, d) or a tuple of tensors, an attention gate its tuple; those are handed over as they are.
            state: memory of a recurrent router; the new one is ``routing.state``.
            token_mask: bool, shaped like the rows; False rows get no work, and nothing else depends on them: they are
                read as 1 (nan and infinity too), and no count, statistic or gradient knows of them.
            group: int64, shaped like the rows, or flat: domain, sample or condition.

        Raises:
            ValueError: for a mask that is not bool, or a mask or group that is not shaped like the rows.
        """
        lead = self._lead(features)
        _check_inputs(lead, token_mask, group)
        return self._route(features, state, _flat(token_mask), _flat(group))

    def _lead(self, features: Features) -> torch.Size:
        """Leading dimensions of what is routed on, which mask and group share."""
        if not isinstance(features, Tensor):
            return features[0].shape[:1]
        if self.router.takes_gates:
            return features.shape[-2:-1]
        return features.shape[: features.ndim - self._feature_dims(features)]

    def _feature_dims(self, features: Tensor) -> int:
        row_dims = self._row_dims
        return row_dims if features.ndim > row_dims else 1

    def _route(
        self, features: Features, state: Tensor | None, mask_N: Tensor | None, group_N: Tensor | None
    ) -> AnyRouting:
        """Route rows whose mask and group are flat."""
        if mask_N is not None:
            check_rows("token_mask", mask_N, (self._lead(features).numel(),), torch.bool)
        if not isinstance(features, Tensor):
            features = tuple(read_rows(member, mask_N) for member in features)
        elif self.router.takes_gates:
            features = read_rows(features, mask_N, features.ndim - 2)
        else:
            features = _rows(features, features.ndim - self._feature_dims(features))
            features = read_rows(features, mask_N)
        routing: AnyRouting = self.router(features, state=state, token_mask=mask_N, group=group_N)
        record_call(self, routing, token_mask=mask_N, group=group_N)
        return routing

    def forward(
        self,
        x: Tensor,
        features: Features | None = None,
        *,
        routing: AnyRouting | None = None,
        side: Sequence[Tensor] = (),
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
        state: Tensor | None = None,
        per_expert: bool = False,
    ) -> Any:
        """Apply the layer.

        Args:
            x: what is processed, (..., d).
            features: what is routed on; None means x.
            routing: from ``route`` (or made by hand), to be applied as it is; then features, group and state are
                unused.
            side: further inputs of the experts, with the leading dimensions of x.
            token_mask: bool, shaped like the rows; False rows get exactly 0, and nothing else depends on them (see
                ``route``): experts read 1 there, and batch statistics leave them out. With a ``routing`` it should be
                the mask that this was made with.
            group: int64, shaped like the rows, or flat.
            state: memory of a recurrent router.
            per_expert: x is (E + num_shared, ..., d), each expert with its own view of the rows (dense routings).

        Returns:
            What the combiner gives, with the leading dimensions of x: (..., o) for the weighted sum.

        Raises:
            ValueError: for a mask that is not bool, or a mask or group that is not shaped like the rows.
        """
        num_lead = x.ndim - self._row_dims
        lead = x.shape[1 if per_expert else 0 : num_lead]
        _check_inputs(lead, token_mask, group)
        mask_N = _flat(token_mask)
        x = x.reshape(x.shape[0], -1, *x.shape[num_lead:]) if per_expert else _rows(x, num_lead)
        x = read_rows(x, mask_N, 1 if per_expert else 0)
        if routing is None:
            if per_expert and features is None:
                raise ValueError("with per_expert=True every expert has its own x: give what to route on as features=.")
            routing = self._route(x if features is None else features, state, mask_N, _flat(group))
        rows = tuple(read_rows(s.reshape(-1, *s.shape[len(lead) :]), mask_N) for s in side)
        work = Work(
            experts=self.experts,
            x=x,
            side=rows,
            num_shared=self.num_shared,
            token_mask=mask_N,
            backend=self.backend,
            weight_at=self.weight_at,
            per_expert=per_expert,
        )
        y = self.combiner(work, routing)
        plain = mask_N is None and len(lead) == 1
        if not plain and (not isinstance(routing, Routing) or routing.target_M is None):
            at = routing.weight.ndim - 2 if isinstance(routing, DenseRouting) else 0
            parts = tuple(_restored(only_rows(p, mask_N, at), at, lead) for p in (y if isinstance(y, tuple) else (y,)))
            y = parts if isinstance(y, tuple) else parts[0]
        record_output(routing, y)
        return y

    def with_aux(
        self,
        x: Tensor,
        features: Features | None = None,
        *,
        losses: Sequence[AuxLoss] | None = None,
        side: Sequence[Tensor] = (),
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """Apply the layer and give what is to be added to the loss: ``y, aux = layer.with_aux(x)``.

        For a network of several layers open a :class:`MoERecorder` around its call instead; ``losses`` take its
        records.

        Args:
            x: what is processed, (..., d).
            features: what is routed on; None means x.
            losses: what aux adds up, weights included; None means ``SwitchBalance(0.01)`` where rows choose their
                experts, and nothing where the load is even by construction.
            side: as in ``forward``, and so the others.
            token_mask: bool, shaped like the rows.
            group: int64, shaped like the rows, or flat.
            state: memory of a recurrent router.

        Returns:
            What ``forward`` gives, and a 0-dim tensor.
        """
        routing = self.route(x if features is None else features, state=state, token_mask=token_mask, group=group)
        y = self(x, routing=routing, side=side, token_mask=token_mask)
        if losses is None:
            losses = [SwitchBalance(0.01)] if isinstance(routing, Routing) and routing.top_k is not None else []
        record = Record(type(self).__name__, routing, self, _flat(token_mask), _flat(group))
        return y, sum((loss([record]) for loss in losses), x.new_zeros(()))

    @property
    def _row_dims(self) -> int:
        return self.experts.row_dims

    @override
    def extra_repr(self) -> str:
        return f"num_shared={self.num_shared}, backend={self.backend!r}, weight_at={self.weight_at!r}"


def _check_inputs(lead: torch.Size, token_mask: Tensor | None, group: Tensor | None) -> None:
    """Refuse a mask that is not shaped like the rows, and group ids that are neither that nor flat."""
    check_rows("token_mask", token_mask, lead, torch.bool)
    if group is not None:
        check_rows("group", group, (lead.numel(),) if group.ndim == 1 else lead)


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1)


def _rows(values: Tensor, num_lead: int) -> Tensor:
    """All leading dimensions as one."""
    return values if num_lead == 1 else values.reshape(-1, *values.shape[num_lead:])


def _restored(y: Tensor, at: int, lead: torch.Size) -> Tensor:
    """The rows at dimension ``at`` in the leading dimensions of the input."""
    return y if len(lead) == 1 else y.reshape(*y.shape[:at], *lead, *y.shape[at + 1 :])


def _check_sizes(router: RouterBase, experts: Experts, num_shared: int) -> None:
    if num_shared < 0 or experts.num_experts != router.num_experts + num_shared:
        raise ValueError(
            f"the bank has {experts.num_experts} experts, but the router knows {router.num_experts} and "
            f"num_shared={num_shared}; "
            f"the bank must hold {router.num_experts + max(num_shared, 0)}, routed experts first and shared ones last."
        )
    if router.num_shared not in (0, num_shared):
        raise ValueError(
            f"the router weighs {router.num_shared} shared experts, but num_shared={num_shared}; make them equal."
        )
    if router.sparse and not experts.supports_grouped:
        raise ValueError(
            f"{type(experts).__name__} must see all rows (batch statistics), but the router sends each row to some "
            "experts only; use a Dense chooser or MultiGate, or experts without batch statistics."
        )


def _bank_size(keys: Iterable[tuple[str, torch.Size]]) -> int | None:
    """Number of experts, from the names and shapes of a bank's parameters."""
    sizes: set[int] = set()
    modules: set[str] = set()
    for name, shape in keys:
        if name.startswith("experts."):
            modules.add(name.split(".")[1])
        elif len(shape) >= 2:
            sizes.add(shape[0])
    return len(modules) or (sizes.pop() if len(sizes) == 1 else None)


def _explain_sizes(module: MoELayer, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Say in plain words that a checkpoint has another number of experts, before torch lists the shapes."""
    bank = prefix + "experts."
    found = _bank_size((key[len(bank) :], v.shape) for key, v in state_dict.items() if key.startswith(bank))
    if found is not None and found != module.experts.num_experts:
        error_msgs: list[str] = rest[-1]
        error_msgs.append(
            f"the checkpoint of {prefix.rstrip('.') or 'this MoELayer'} holds {found} experts, but the layer was built "
            f"with {module.experts.num_experts} (shared ones included): build it with "
            f"num_experts={found - module.num_shared}, or load into a layer of that size and cut the bank with "
            "experts.select(ids)."
        )
