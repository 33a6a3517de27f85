# SPDX-License-Identifier: Apache-2.0
"""The gates of `gates.py` computed as one product, one softmax and one product, whatever their number.

Used by every network unless it is built with ``fast_gates=False``. The gates of a level are many and small: one by one
they cost a call of Python each. It also knows the gates of the rivals and controls.

Shape legend: N rows, S states (inputs of a level), d width of a state, G gates, E experts, K slots of a gate (the most
experts any gate sees), Q columns (gates, then self-gates).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moeapps.moe import DenseRouting, RouterBase
from moeapps.moe.routers.router import without_autocast
from moeapps.moe.routers.score import Features
from tasks.recommendation.nets.gates import GateMixing, Residual, Table

_NEVER, _ZERO = -1, -2  # what fills a slot of a gate that sees fewer experts: weight 0, or a logit of 0


class StackedGates(RouterBase):
    r"""G gates over one bank, each over the experts it sees, computed as one product, one softmax and one product.

    :math:`w_{ge} = softmax_{e \in sees(g)}(a_{ge})` with :math:`a_{ge} = W_{ge} [z_s]_{s \in reads(g)} + b_{ge}`. With
    ``self_gate`` the weight of an expert that gate g owns gains :math:`softmax_{e \in owns(g)}(a'_{ge})`, or
    :math:`\sigma(a'_{ge})` where it owns one. Only the logits of allowed pairs exist; a sigmoid is the softmax over its
    logit and a 0, so that all gates are one softmax over K slots. What a gate does not see has weight exactly 0.

    Args:
        width: d.
        sees: [G, E], which experts a gate mixes.
        reads: for each gate the states it reads, concatenated.
        owns: [G, E], which experts a gate owns; None owns none.
        mixing: ``softmax``; ``uniform``, equal weights (control: nothing is learned); ``shuffled``, the weights of
            another row of the batch (control: the same weights on average, told nothing of the row); ``constant``,
            learned numbers that do not depend on the row, without softmax (cross-stitch).
        residual: what joins over the owned experts: ``self_gate`` (HoME); ``constant``, learned numbers, or ``ones``
            (AdaTT has either); ``none``.

    Shape:
        features [S, N, d] -> weight [G, N, E]; ``probs_NE`` is the mixing gates' part alone (uniform for constants).

    Raises:
        ValueError: if a gate sees or reads nothing, tables differ in size, or a word is unknown.

    Source: HoME (docs/papers/home.md, equations 1 and 6); AdaTT, whose n learned numbers of a unit start from
        U(+-1/sqrt(n)); cross-stitch networks.
    """

    sparse = False
    takes_gates = True
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    constant: nn.Parameter | None
    mask: Tensor
    index: Tensor
    bias_index: Tensor
    place: Tensor
    place_mixing: Tensor
    fixed: Tensor
    learned_index: Tensor

    def __init__(
        self,
        width: int,
        sees: Table,
        reads: Sequence[Sequence[int]],
        *,
        owns: Table | None = None,
        mixing: GateMixing = "softmax",
        residual: Residual = "none",
    ) -> None:
        super().__init__()
        allowed = _checked(sees, "sees")
        self.num_gates, self.num_experts = allowed.shape
        owned = torch.zeros_like(allowed) if owns is None or residual == "none" else _checked(owns, "owns", empty=True)
        if owned.shape != allowed.shape or len(reads) != self.num_gates or not all(reads):
            raise ValueError(
                f"sees is {tuple(allowed.shape)}, owns {tuple(owned.shape)}, reads {[*map(list, reads)]}: give each "
                f"of the {self.num_gates} gates a row of both tables and at least one state to read."
            )
        if mixing not in ("softmax", "uniform", "shuffled", "constant") or residual not in (
            "none",
            "self_gate",
            "constant",
            "ones",
        ):
            raise ValueError(
                f"mixing={mixing!r}, residual={residual!r}; use softmax, uniform, shuffled or constant, and none, "
                "self_gate, constant or ones."
            )
        self.width, self.mixing, self.residual = width, mixing, residual
        self.pool = "batch" if mixing == "shuffled" else "row"
        self.reads = tuple(tuple(r) for r in reads)
        self.see_all = bool(allowed.all())
        self.register_buffer("mask", allowed.unsqueeze(1), persistent=False)
        self._lay_out(allowed, owned if residual == "self_gate" else torch.zeros_like(owned))
        self._constants(allowed, owned)
        self.reset_parameters()

    # Construction -------------------------------------------------------------------------------------------------

    def _lay_out(self, allowed: Tensor, owned: Tensor) -> None:
        """Give every allowed pair a slot, and say where in the table of weights each slot belongs."""
        columns = [(g, allowed[g].nonzero()[:, 0].tolist()) for g in range(self.num_gates)]
        columns += [(g, row.nonzero()[:, 0].tolist()) for g, row in enumerate(owned) if bool(row.any())]
        self.num_slots = max(2 if len(experts) == 1 and q >= self.num_gates else len(experts)
                             for q, (_, experts) in enumerate(columns))  # fmt: skip
        self.num_columns = len(columns)
        num_states = 1 + max(s for states in self.reads for s in states)
        place = torch.zeros(self.num_slots, self.num_columns, self.num_gates, self.num_experts)
        index = torch.full((num_states, self.num_slots, self.num_columns), _NEVER)
        bias_index = torch.full((self.num_slots, self.num_columns), _NEVER)
        bounds: list[float] = []
        for q, (g, experts) in enumerate(columns):
            for k, e in enumerate(experts):
                place[k, q, g, e] = 1.0
                bias_index[k, q] = len(bounds)
                bounds.append(1 / math.sqrt(self.width * len(self.reads[g])))
                for s in self.reads[g]:
                    index[s, k, q] = 0
            if len(experts) == 1 and q >= self.num_gates:
                bias_index[1, q] = _ZERO
        real = index == 0
        index[real] = torch.arange(int(real.sum()))
        index[~real] = int(real.sum())  # a row of zeros behind the weights
        for fill, row in ((_ZERO, 0), (_NEVER, 1)):  # behind the biases: 0, then minus infinity
            bias_index[bias_index == fill] = len(bounds) + row
        self.register_buffer("place", place.flatten(2).flatten(0, 1), persistent=False)
        mixing_only = place.clone()
        mixing_only[:, self.num_gates :] = 0
        self.register_buffer("place_mixing", mixing_only.flatten(2).flatten(0, 1), persistent=False)
        self.register_buffer("index", index.flatten(1), persistent=False)
        self.register_buffer("bias_index", bias_index.flatten(), persistent=False)
        self._bounds = bounds
        learned = self.mixing in ("softmax", "shuffled")
        self.register_parameter("weight", nn.Parameter(torch.empty(int(real.sum()), self.width)) if learned else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(len(bounds))) if learned else None)

    def _constants(self, allowed: Tensor, owned: Tensor) -> None:
        """Weights that do not depend on the row: cross-stitch units, and AdaTT's mix of a gate's own experts."""
        none = torch.zeros_like(allowed)
        learned = allowed if self.mixing == "constant" else owned if self.residual == "constant" else none
        fixed = owned if self.residual == "ones" else none
        self.has_constants = bool((learned | fixed).any())
        # Mostly one's own, a little of the others, as is usual for cross-stitch units.
        own = torch.eye(*allowed.shape, dtype=torch.bool) & allowed
        stitch = 0.9 * own + 0.1 * (allowed & ~own) / (allowed & ~own).sum(1, keepdim=True).clamp(min=1)
        self._start = stitch[learned]
        self._own_bound = owned.sum(1, keepdim=True).clamp(min=1).rsqrt().expand(owned.shape)[learned]
        self.register_buffer("fixed", fixed.flatten().float(), persistent=False)
        self.register_buffer("learned_index", learned.flatten().nonzero()[:, 0], persistent=False)
        count = int(learned.sum())
        self.register_parameter("constant", nn.Parameter(torch.empty(count)) if count else None)

    def reset_parameters(self) -> None:
        """Every gate as an ``nn.Linear`` of its own fan-in."""
        if self.weight is not None and self.bias is not None:
            bound = torch.tensor(self._bounds)
            with torch.no_grad():
                self.bias.uniform_(-1, 1).mul_(bound.to(self.bias))
                per_row = torch.zeros(len(self.weight))
                real = self.index < len(per_row)
                per_row[self.index[real]] = bound[self.bias_index.expand_as(self.index)[real]]
                self.weight.uniform_(-1, 1).mul_(per_row.unsqueeze(1).to(self.weight))
        if self.constant is not None:
            with torch.no_grad():
                if self.mixing == "constant":
                    self.constant.copy_(self._start)
                else:
                    self.constant.uniform_(-1, 1).mul_(self._own_bound.to(self.constant))

    # Use ----------------------------------------------------------------------------------------------------------

    def mean_k(self) -> float | None:
        """All experts run."""
        return float(self.num_experts)

    def biases_of(self, pairs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Where the biases of the mixing gates for the pairs [G, E] are: each tensor with the places in it."""
        if self.bias is None:
            return []
        place_XGE = self.place_mixing.unflatten(1, (self.num_gates, self.num_experts))
        return [(self.bias, self.bias_index[(place_XGE * pairs.to(place_XGE)).sum((1, 2)) > 0])]

    def forward(
        self,
        features: Features,
        *,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
    ) -> DenseRouting:
        """Weights [G, N, E]."""
        if not isinstance(features, Tensor) or features.ndim != 3 or self.adjust is not None or token_mask is not None:
            raise ValueError("StackedGates read one tensor of states [S, N, d], without token_mask or adjust hook.")
        with without_autocast(features.device):
            z_SNd = features if features.dtype == torch.float64 else features.float()
            weight_NGE, probs_NGE = self._weights(self._shares(z_SNd))
            if self.mixing == "shuffled":  # batches of training are in random order: any turn will do
                weight_NGE, probs_NGE = (w.roll(max(1, len(w) // 2), 0) for w in (weight_NGE, probs_NGE))
            if self.mixing == "constant":
                weight_NGE = torch.zeros_like(weight_NGE)
            if self.has_constants:
                weight_NGE = weight_NGE + self._constant().view(self.num_gates, self.num_experts)
        return DenseRouting(
            weight_NGE.transpose(0, 1),
            self.num_experts,
            allowed=self.mask,
            probs_NE=probs_NGE.transpose(0, 1),
            features_ND=features,
        )

    def _weights(self, share_NKQ: Tensor) -> tuple[Tensor, Tensor]:
        """The applied weights, and those of the mixing gates without residuals, [N, G, E] each."""
        if self.see_all and self.num_columns == self.num_gates:  # slots are experts, columns are gates
            weight_NGE = share_NKQ.transpose(1, 2)
            return weight_NGE, weight_NGE.detach()
        shape = (self.num_gates, self.num_experts)
        dtype = share_NKQ.dtype  # the tables of 0 and 1 follow where the model was cast
        weight_NGE = (share_NKQ.flatten(1) @ self.place.to(dtype)).unflatten(1, shape)
        if self.num_columns == self.num_gates:
            return weight_NGE, weight_NGE.detach()
        return weight_NGE, (share_NKQ.detach().flatten(1) @ self.place_mixing.to(dtype)).unflatten(1, shape)

    def _shares(self, z_SNd: Tensor) -> Tensor:
        """The softmax of every column over its slots, [N, K, Q]."""
        num_rows = z_SNd.shape[1]
        if self.weight is None or self.bias is None:
            logits_NX = _padded(z_SNd.new_zeros(len(self._bounds)), self.bias_index).expand(num_rows, -1)
        else:
            rows_NX = z_SNd[: len(self.index)].transpose(0, 1).flatten(1)
            rows = torch.cat([self.weight, self.weight.new_zeros(1, self.width)]).to(z_SNd.dtype)
            matrix_SXd = rows.index_select(0, self.index.flatten()).view(*self.index.shape, self.width)
            matrix = matrix_SXd.transpose(1, 2).flatten(0, 1)
            logits_NX = torch.addmm(_padded(self.bias.to(z_SNd.dtype), self.bias_index), rows_NX, matrix)
        share_NKQ: Tensor = logits_NX.unflatten(1, (self.num_slots, self.num_columns)).softmax(1)
        return share_NKQ

    def _constant(self) -> Tensor:
        if self.constant is None:
            return self.fixed
        return self.fixed.to(self.constant.dtype).index_add(0, self.learned_index, self.constant)

    def extra_repr(self) -> str:
        """Sizes and settings, for the printed module."""
        return f"gates={self.num_gates}, experts={self.num_experts}, mixing={self.mixing!r}, residual={self.residual!r}"


def _checked(table: Table | Tensor, name: str, *, empty: bool = False) -> Tensor:
    """A table [G, E] of booleans; unless ``empty``, each row of it must hold something."""
    checked = torch.as_tensor(table).bool()
    if checked.ndim != 2 or not (empty or bool(checked.any(1).all())):
        raise ValueError(f"{name} is {tuple(checked.shape)}: it must be [gates, experts], with an expert in every row.")
    return checked


def _padded(bias: Tensor, index: Tensor) -> Tensor:
    """Biases in the order of the slots; a slot that is not used has 0 (half of a sigmoid) or minus infinity."""
    return torch.cat([bias, bias.new_tensor([0.0, float("-inf")])]).index_select(0, index)
