# SPDX-License-Identifier: Apache-2.0
"""DiffMoE's router: experts choose among the tokens of the batch, and a capacity predictor learns what they choose.

Shape legend: N tokens, D width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moeapps.moe import LinearScore, Routing
from moeapps.moe.ranks import rows_of_all_ranks, sum_over_ranks
from moeapps.moe.routers.chooser import Pool, is_recomputed, pairs_to_routing, rows_that_count, share_of
from moeapps.moe.routers.router import RouterBase, device_of, full_precision, without_autocast
from moeapps.moe.routers.score import Features, applied
from moeapps.moe.wide import WideBuffers, wide_dtype

NORMAL_STD = 0.006
"""Standard deviation of the router weights of EC-DiT and DiffMoE at the start.

Source: docs/papers/promoe.md, equations 12 and 13.
"""


@dataclass(frozen=True, eq=False)
class CapacityRouting(Routing):
    """A routing with the capacity predictor's logit of each pair.

    Args:
        capacity_NE: its logits [N, E]; None for an empty one.
        counted_N: bool [N], the tokens that were routed; None means all.
    """

    capacity_NE: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    counted_N: Tensor | None = None


class DiffMoERouter(WideBuffers, RouterBase):
    r"""Each expert takes its best tokens of the whole batch; a second network learns which, for evaluation.

    Training: expert e takes its :math:`\lfloor N C / E \rfloor` best tokens by softmax score; the predictor's logits
    :math:`c` (of detached tokens) are trained on the selection by `CapacityLoss`, and a threshold follows the k-th
    largest :math:`\sigma(c)`. Evaluation: ``token`` takes the pairs with :math:`\sigma(c)_{ne} > \theta_e`;
    ``batch`` (published) takes the :math:`n_e = \#\{n: \sigma(c)_{ne} > \theta_e\}` best tokens of the batch, so that
    an image depends on its mates. Masked tokens are in no count. On several processes each takes its own best tokens,
    and the threshold follows the k-th largest of all of them together.

    Args:
        dim: width D.
        num_experts: E.
        capacity: C, mean number of experts per token in training.
        evaluation: as above.
        decay: of the threshold (DiffMoE: 0.95).

    Source: DiffMoE (docs/papers/promoe.md, equation 13): weights N(0, 0.006^2), thresholds start at 0.
    """

    wide: ClassVar[tuple[str, ...]] = ("threshold",)
    threshold: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity: float = 1.0,
        evaluation: Literal["token", "batch"] = "token",
        decay: float = 0.95,
    ) -> None:
        super().__init__()
        if evaluation not in ("token", "batch") or not capacity > 0 or not 0 <= decay < 1:
            raise ValueError(
                f"evaluation={evaluation!r}, capacity={capacity}, decay={decay}: use token or batch, a capacity above "
                "0 and a decay in [0, 1)"
            )
        self.num_experts, self.capacity, self.evaluation, self.decay = num_experts, capacity, evaluation, decay
        self.pool: Pool = "row" if evaluation == "token" else "batch"
        self.score = LinearScore(dim, num_experts, init_std=NORMAL_STD)
        self.predictor = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, num_experts))
        self.register_buffer("threshold", torch.zeros(num_experts, dtype=wide_dtype()))

    def mean_k(self) -> float | None:
        """The capacity, which training holds."""
        return min(self.capacity, float(self.num_experts))

    def forward(
        self,
        features: Features,
        *,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
    ) -> CapacityRouting:
        """The routing of these tokens, with the predictor's logits."""
        assert isinstance(features, Tensor)
        with without_autocast(device_of(features)):
            read = full_precision(features)
            assert isinstance(read, Tensor)
            logits_NE = self.score.forward(read)
            capacity_NE = applied(self.predictor, read.detach())
        weight_NE = logits_NE.softmax(-1)
        rank_NE = weight_NE.detach()
        sure_NE = capacity_NE.detach().sigmoid()
        if token_mask is not None:
            rank_NE = rank_NE.masked_fill(~token_mask.unsqueeze(-1), float("-inf"))
            sure_NE = sure_NE.masked_fill(~token_mask.unsqueeze(-1), -1.0)  # below any probability
        taken_NE = self._taken(rank_NE, sure_NE, rows_that_count(rank_NE, token_mask))
        plain = pairs_to_routing(taken_NE, weight_NE, logits_NE, weight_NE)
        shared = {f.name: getattr(plain, f.name) for f in fields(plain)} | {"features_ND": features}
        return CapacityRouting(**shared, capacity_NE=capacity_NE, counted_N=token_mask)

    def _taken(self, rank_NE: Tensor, sure_NE: Tensor, rows: Tensor) -> Tensor:
        """Which pairs are taken, where ``rows`` tokens count."""
        over_NE = sure_NE > self.threshold
        if not self.training and self.evaluation == "token":
            return over_NE & rank_NE.isfinite()
        num_rows = len(rank_NE)
        if self.training:
            count_E = share_of(rows, self.capacity, self.num_experts).expand(self.num_experts)
            if not is_recomputed():
                self._follow(rows_of_all_ranks(sure_NE), sum_over_ranks(rows))
        else:
            count_E = over_NE.sum(0)
        order_NE = rank_NE.sort(dim=0, descending=True, stable=True).indices
        place_NE = torch.zeros_like(order_NE).scatter(
            0, order_NE, torch.arange(num_rows, device=order_NE.device).unsqueeze(-1).expand_as(order_NE)
        )
        return (place_NE < count_E) & rank_NE.isfinite()

    def _follow(self, sure_NE: Tensor, rows: Tensor) -> None:
        """Move the thresholds towards the k-th largest probability; without any token they stay."""
        if not len(sure_NE):
            return
        k = share_of(rows, self.capacity, self.num_experts).minimum(rows)
        kth_E = sure_NE.sort(dim=0, descending=True).values.index_select(0, (k - 1).clamp(min=0).view(1))[0]
        moved_E = self.threshold.lerp(kth_E.to(self.threshold.dtype), 1 - self.decay)
        self.threshold.copy_(moved_E.where(rows > 0, self.threshold))
