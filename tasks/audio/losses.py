# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of the codes, a book at a time.

Shape legend: B clips, L steps, K codebooks, U symbols of a book (its codes, end, padding, begin).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.audio.nets.language_model import IGNORED


def code_nats(logits_BLKU: Tensor, target_BLK: Tensor) -> Tensor:
    """Negative log-likelihood of every target in nats.

    Args:
        logits_BLKU: [B, L, K, U], of the step that follows each step.
        target_BLK: int64 [B, L, K], `IGNORED` where there is none.

    Returns:
        float32 (or float64) [B, L, K], 0 where there is no target.
    """
    exact = torch.promote_types(logits_BLKU.dtype, torch.float32)
    flat = F.cross_entropy(
        logits_BLKU.to(exact).flatten(0, 2), target_BLK.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(target_BLK)


def codec_loss(nats_BLK: Tensor, target_BLK: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Sum over the books of the mean over a book's targets.

    Args:
        nats_BLK: of `code_nats`.
        target_BLK: int64 [B, L, K].
        weights: factor of each book; None is 1 for all (paper).

    Returns:
        0-dim; about K ln V for a network that knows nothing. A book without a target adds 0.

    Source: UniMoE-Audio (docs/papers/unimoe_audio.md), released code: labels of every channel, the mean of each channel
        added up.
    """
    counts_K = (target_BLK != IGNORED).sum((0, 1))
    means_K = nats_BLK.sum((0, 1)) / counts_K.clamp(min=1)
    return means_K.sum() if weights is None else (means_K * torch.as_tensor(weights).to(means_K)).sum()
