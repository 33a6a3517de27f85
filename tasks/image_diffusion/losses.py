# SPDX-License-Identifier: Apache-2.0
"""Routing losses of ProMoE and its rivals: pure functions of a record, and the modules that YAML names.

All these papers sum over the layers, as `AuxLoss` does unless told otherwise.

Shape legend: N tokens, E experts, D width, G images, M assignments.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from moeapps.moe import AuxLoss, PrototypeScore, Record, Routing
from moeapps.moe.objectives import routed
from moeapps.moe.routers.router import without_autocast
from tasks.image_diffusion.rivals.diffmoe import CapacityRouting
from tasks.image_diffusion.rivals.routers import ClassTable, superclass_of

# --- functions --------------------------------------------------------------------------------------------------------


def routing_contrast(
    prototypes_ED: Tensor, x_ND: Tensor, taken_NE: Tensor, *, tau: float = 0.07, group_N: Tensor | None = None
) -> Tensor:
    r"""Tie every prototype to the mean of the tokens that chose it and push it off the means of the others.

    .. math:: L = -\frac{1}{|A|} \sum_{i \in A} \log \frac{e^{c_{ii} / \tau}}{\sum_{j \in A} e^{c_{ij} / \tau}},
        \quad c_{ij} = \cos(p_i, m_j)

    with :math:`m_i` the mean token of expert i and A the experts that have any; 0 for fewer than two.

    Args:
        prototypes_ED: [E, D].
        x_ND: what was routed on, [N, D].
        taken_NE: bool [N, E], which experts took a token.
        tau: temperature.
        group_N: int64 [N]: means are taken image by image, and the loss is averaged over images and experts (EC); None
            takes them over the batch.

    Returns:
        0-dim tensor, with gradient to prototypes and tokens.

    Source: ProMoE, its equation 6 (docs/papers/promoe.md, equations 4 and 5).
    """
    num_experts = len(prototypes_ED)
    with without_autocast(x_ND.device):
        x_ND, prototypes_ED = x_ND.float(), prototypes_ED.float()
        if group_N is None:
            taken = taken_NE.to(x_ND.dtype)
            sum_GED, count_GE = (taken.T @ x_ND).unsqueeze(0), taken.sum(0, keepdim=True)
        else:
            ids, image_N = torch.unique(group_N, return_inverse=True)
            row_M, expert_M = taken_NE.nonzero(as_tuple=True)
            place_M = image_N[row_M] * num_experts + expert_M
            size = len(ids) * num_experts
            sum_GED = x_ND.new_zeros(size, x_ND.shape[1]).index_add(0, place_M, x_ND.index_select(0, row_M))
            sum_GED = sum_GED.view(len(ids), num_experts, -1)
            count_GE = torch.bincount(place_M, minlength=size).view(len(ids), num_experts).to(x_ND.dtype)
        mean_GED = sum_GED / count_GE.clamp_min(1).unsqueeze(-1)
        active_GE = count_GE > 0
        cosine = torch.einsum("id,gjd->gij", F.normalize(prototypes_ED, dim=-1), F.normalize(mean_GED, dim=-1))
        logits = (cosine / tau).masked_fill(~active_GE.unsqueeze(1), torch.finfo(cosine.dtype).min)
        own_GE = logits.log_softmax(-1).diagonal(dim1=1, dim2=2)
        return -own_GE.where(active_GE, 0.0).sum() / active_GE.sum().clamp_min(1)


def router_similarity(probs_NE: Tensor, taken_NE: Tensor) -> Tensor:
    r"""Push apart experts that prefer the same tokens, more strongly the more often they are chosen together.

    With :math:`P' = P^T P` of the probabilities and :math:`M' = M^T M` of the selection:
    :math:`\frac{1}{N} \sum_{ij} W_{ij} P'_{ij}`, :math:`W_{ii} = E M'_{ii} / \sum_i M'_{ii}`,
    :math:`W_{ij} = (E^2 - E) M'_{ij} / \sum_{i \ne j} M'_{ij}`.

    Args:
        probs_NE: softmax rows [N, E].
        taken_NE: bool [N, E].

    Source: Expert Race (docs/papers/promoe.md, equation 14; secondary).
    """
    num_rows, num_experts = probs_NE.shape
    taken = taken_NE.to(probs_NE.dtype)
    with without_autocast(probs_NE.device):  # bfloat16 does not count beyond 256
        together, alike = taken.T @ taken, probs_NE.T @ probs_NE
    same = torch.eye(num_experts, dtype=torch.bool, device=probs_NE.device)
    own = num_experts * together / together.diagonal().sum().clamp_min(1)
    cross = (num_experts**2 - num_experts) * together / together.masked_fill(same, 0).sum().clamp_min(1)
    return (torch.where(same, own, cross) * alike).sum() / max(1, num_rows)


def num_routed(record: Record) -> int:
    """Experts that the router chooses among, without one that is given to unconditional tokens."""
    return routed(record).routing.num_experts


def taken_pairs(record: Record, num_experts: int) -> Tensor:
    """Which of the first ``num_experts`` experts took each row, bool [N, num_experts]."""
    routing = record.routing
    if not isinstance(routing, Routing):
        raise ValueError(f"layer {record.name!r} runs all experts on all rows; this loss is for sparse routers")
    taken = torch.zeros(routing.num_rows, num_experts + 1, dtype=torch.bool, device=routing.row_M.device)
    place = (routing.row_M, routing.expert_M.clamp(max=num_experts))
    return taken.index_put_(place, taken.new_ones(()))[:, :num_experts]


# --- modules ----------------------------------------------------------------------------------------------------------


class RoutingContrast(AuxLoss):
    """`routing_contrast` of every layer with prototypes.

    Args:
        weight: lambda (paper: 1; 10 for the smallest DDPM model).
        tau: temperature (paper: 0.07).
        per_image: means within each image, for the EC variant.
        options: see `AuxLoss`.

    Raises:
        ValueError: in use, for a layer without prototypes.
    """

    name = "contrast"

    def __init__(self, weight: float = 1.0, *, tau: float = 0.07, per_image: bool = False, **options: Any) -> None:
        super().__init__(weight, **options)
        if not tau > 0:
            raise ValueError(f"tau={tau}, but a temperature is above 0 (paper: 0.07)")
        self.tau, self.per_image = tau, per_image

    def compute(self, record: Record) -> Tensor:
        """Give the loss of one layer; 0 where no conditional token was routed."""
        found = [module for module in record.layer.router.modules() if isinstance(module, PrototypeScore)]
        x_ND = record.routing.features_ND
        if len(found) != 1 or x_ND is None:
            raise ValueError(
                f"the router of layer {record.name!r} has no prototypes (PrototypeScore), which RoutingContrast needs; "
                "remove the loss from aux_losses or choose other layers with its 'layers' pattern"
            )
        prototypes_ED = found[0].prototypes
        taken_NE = taken_pairs(record, len(prototypes_ED))
        group_N = record.group if self.per_image else None
        if self.per_image and group_N is None:
            raise ValueError(f"layer {record.name!r} was called without group, which per_image=True needs")
        return routing_contrast(prototypes_ED, x_ND, taken_NE, tau=self.tau, group_N=group_N)


class RouterSimilarity(AuxLoss):
    """`router_similarity` of every layer.

    Args:
        weight: coefficient; 1e-5 in one re-implementation, the paper's is not known to us.
        options: see `AuxLoss`.
    """

    name = "similarity"

    def __init__(self, weight: float = 1e-5, **options: Any) -> None:
        super().__init__(weight, **options)

    @override
    def compute(self, record: Record) -> Tensor:
        record = routed(record)
        logits_NE = record.routing.logits_NE
        if logits_NE is None:
            raise ValueError(f"layer {record.name!r} routes without logits, which RouterSimilarity needs")
        probs_NE, taken_NE = logits_NE.softmax(-1), taken_pairs(record, logits_NE.shape[1])
        if record.token_mask is not None:
            probs_NE, taken_NE = probs_NE[record.token_mask], taken_NE[record.token_mask]
        return router_similarity(probs_NE, taken_NE)


class CapacityLoss(AuxLoss):
    """Binary cross-entropy of DiffMoE's capacity predictor against the selection of training.

    Args:
        weight: coefficient (DiffMoE: 1). The predictor reads detached tokens, so nothing else is trained by it.
        options: see `AuxLoss`.

    Raises:
        ValueError: in use, for a layer without a capacity predictor.
    """

    name = "capacity"

    def __init__(self, weight: float = 1.0, **options: Any) -> None:
        super().__init__(weight, **options)

    def compute(self, record: Record) -> Tensor:
        """Give the loss of one layer over the tokens that were routed."""
        routing = record.routing
        if not isinstance(routing, CapacityRouting):
            raise ValueError(f"the router of layer {record.name!r} has no capacity predictor; remove CapacityLoss")
        wanted_NE = taken_pairs(record, routing.capacity_NE.shape[1]).to(routing.capacity_NE.dtype)
        loss_NE = F.binary_cross_entropy_with_logits(routing.capacity_NE, wanted_NE, reduction="none")
        if routing.counted_N is None:
            return loss_NE.mean()
        counted_N1 = routing.counted_N.unsqueeze(-1)
        return loss_NE.where(counted_N1, 0.0).sum() / (counted_N1.sum() * loss_NE.shape[1]).clamp_min(1)


class SuperclassLoss(AuxLoss, ClassTable):
    """Cross-entropy of a router's logits against the super-class of the image.

    For class-supervised routing; the table from class to super-class is the data's (``facts["superclass"]``).

    Args:
        weight: coefficient (the paper's is not known to us).
        options: see `AuxLoss`.
    """

    name = "superclass"

    def __init__(self, weight: float = 1.0, **options: Any) -> None:
        super().__init__(weight, **options)

    def compute(self, record: Record) -> Tensor:
        """Give the loss of one layer over the tokens with a class; equal weight for every image."""
        logits_NE = record.routing.logits_NE
        if logits_NE is None or record.group is None:
            raise ValueError(f"layer {record.name!r} routes without logits or group, which SuperclassLoss needs")
        conditional_N = record.group >= 0 if record.token_mask is None else (record.group >= 0) & record.token_mask
        score = superclass_of(self.table, record.group.clamp_min(0)) % num_routed(record)
        own_N = logits_NE.log_softmax(-1).gather(-1, score.unsqueeze(-1)).squeeze(-1)
        return -own_N.where(conditional_N, 0.0).sum() / conditional_N.sum().clamp_min(1)
