# SPDX-License-Identifier: Apache-2.0
"""Segmentation losses. N voxels, C classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.point_cloud.data.labels import IGNORE


def lovasz_softmax(probs_NC: Tensor, target_N: Tensor) -> Tensor:
    """Lovász-softmax loss: the convex extension of 1 - IoU, averaged over the classes present in ``target_N``.

    For class c with errors m_i = |1[y_i = c] - p_ic| sorted in decreasing order, the loss is sum_i m_(i) g_i, where
    g_i is the growth of the Jaccard loss when the i-th largest error is added to the set of mistakes. For hard
    predictions it is exactly 1 - IoU of the class; for perfect ones 0.

    Args:
        probs_NC: probabilities, rows sum to 1.
        target_N: int64 class indices; rows with -1 are dropped.

    Returns:
        Scalar in [0, 1]; NaN (without a gradient) when no row is labelled.

    Source: Berman, Triki, Blaschko 2018, equations 9 and 11.
    """
    keep = target_N != IGNORE
    probs_NC, target_N = probs_NC[keep], target_N[keep]
    if not len(target_N):
        return probs_NC.new_full((), torch.nan)
    present = torch.unique(target_N)
    truth = (target_N[None, :] == present[:, None]).to(probs_NC.dtype)  # (C', N)
    errors = (truth - probs_NC.T[present]).abs()
    errors, rank = errors.sort(dim=1, descending=True)
    truth = truth.gather(1, rank)
    total = truth.sum(dim=1, keepdim=True)
    intersection = total - truth.cumsum(dim=1)
    union = total + (1 - truth).cumsum(dim=1)
    jaccard = 1 - intersection / union
    growth = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], dim=1)
    loss: Tensor = (errors * growth).sum(dim=1).mean()
    return loss


def segmentation_loss(logits_NC: Tensor, target_N: Tensor, *, lovasz_weight: float = 1.0) -> dict[str, Tensor]:
    """Cross-entropy and Lovász-softmax of the voxels of one domain, label -1 ignored.

    Args:
        logits_NC: logits over the domain's label set.
        target_N: int64 class indices, -1 ignored.
        lovasz_weight: factor of the Lovász term (code of the paper: 1; its text speaks of cross-entropy alone).

    Returns:
        ``{"ce", "lovasz", "loss"}``, scalars; NaN (without a gradient) where nothing is labelled. Where something is,
        they are never NaN: what is left out of means must not be what a network that diverged gives, so that is inf.
    """
    logits_NC = logits_NC.float() if logits_NC.dtype in (torch.float16, torch.bfloat16) else logits_NC
    count = (target_N != IGNORE).sum()
    if not count:
        return dict.fromkeys(("ce", "lovasz", "loss"), logits_NC.new_full((), torch.nan))
    ce = F.cross_entropy(logits_NC, target_N, ignore_index=IGNORE, reduction="sum") / count
    lovasz = lovasz_softmax(logits_NC.softmax(dim=1), target_N)
    parts = {"ce": ce, "lovasz": lovasz, "loss": ce + lovasz_weight * lovasz}
    return {name: value.masked_fill(value.isnan(), torch.inf) for name, value in parts.items()}


def mean_over_domains(losses: dict[str, Tensor]) -> Tensor:
    """Mean over the domains of a batch, so that each weighs the same whatever its number of points.

    Args:
        losses: one scalar per domain present in the batch; NaN where a domain has no label, which is left out.

    Returns:
        Scalar; NaN where no domain has a label.

    Raises:
        ValueError: No domain.
    """
    if not losses:
        raise ValueError("no domain in the batch: every scan needs a domain and at least one point")
    stacked = torch.stack(list(losses.values()))
    return stacked[~stacked.isnan()].mean()
