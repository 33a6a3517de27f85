# SPDX-License-Identifier: Apache-2.0
"""From logits to a token: temperature, the k best, the fewest that hold a probability; noise is an argument.

Shape legend: X tokens, sorted by probability where said.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: logits are divided by it; 0 takes the best token.
        top_k: only the k best can be drawn; None means all (paper: 45).
        top_p: only the fewest that hold this probability can be drawn, in (0, 1]; 1 means all.

    Raises:
        ValueError: for a number outside its range.

    Source: docs/papers/unimoe_audio.md, equation 13.

    Example:
        >>> logits, middle = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.5])
        >>> [int(Sampling(top_k=k).draw(logits, middle)) for k in (1, 3)]
        [1, 1]
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or (self.top_k is not None and self.top_k < 1) or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}: use a temperature of 0 or "
                "more, top_k of 1 or more (or None), and 0 < top_p <= 1"
            )

    def draw(self, logits_X: Tensor, uniform: Tensor) -> Tensor:
        """Draw a token for each row of logits by its number in [0, 1).

        Args:
            logits_X: (..., X); minus infinity forbids a token, one must be allowed.
            uniform: (...); where it falls among the probabilities, best first, decides.

        Returns:
            int64 (...).
        """
        if self.temperature == 0 or self.top_k == 1:
            return logits_X.argmax(-1)
        share_X, index_X = self.ranked(logits_X)
        reached_X = share_X.cumsum(-1)
        place = (reached_X <= uniform.unsqueeze(-1) * reached_X[..., -1:]).sum(-1, keepdim=True)
        last = (share_X > 0).sum(-1, keepdim=True) - 1
        return index_X.gather(-1, place.minimum(last)).squeeze(-1)

    def ranked(self, logits_X: Tensor) -> tuple[Tensor, Tensor]:
        """What each token weighs in a draw, best first, 0 for those that cannot be drawn; and which tokens they are.

        The weights of a row need not sum to 1.
        """
        exact = torch.promote_types(logits_X.dtype, torch.float32)
        sorted_X, index_X = torch.sort(logits_X.to(exact), dim=-1, descending=True, stable=True)
        # Below the best one: a small temperature then makes minus infinity of it, and not infinity of the best.
        return self._kept(((sorted_X - sorted_X[..., :1]) / self.temperature).softmax(-1)), index_X

    def _kept(self, share_X: Tensor) -> Tensor:
        """Probabilities, best first, with those that cannot be drawn at 0."""
        if self.top_k is not None:
            share_X = share_X.where(torch.arange(share_X.shape[-1], device=share_X.device) < self.top_k, 0)
        if self.top_p < 1:
            total = share_X.sum(-1, keepdim=True)
            before_X = share_X.cumsum(-1) - share_X
            share_X = share_X.where(before_X < self.top_p * total, 0)
        return share_X
