# SPDX-License-Identifier: Apache-2.0
"""Counts of codes as networks: what a domain's codes tell without a prompt, and what the code before tells.

Shape legend: B clips, K codebooks, V codes of a book, X = V + 3 tokens, L steps, S symbols of a prompt, G domains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeapps.moe.ranks import sum_over_ranks
from tasks.audio.nets.delay import DelayPattern, audiocraft
from tasks.audio.nets.language_model import IGNORED, CodecLM

if TYPE_CHECKING:
    from tasks.audio.data.batch import AudioBatch

TINY = 1e-30
"""Probability of tokens that are never to be predicted: of no weight, and its logarithm is finite."""


class UnigramLM(CodecLM):
    """How often each code of a book occurs in the domain: the floor that every network must beat.

    Counts are of the training batches, gathered by `targets`; further epochs multiply them alike. A domain that was not
    trained on has those of all seen domains of its kind (of all, where there is none). The end is counted like a code
    of the first book.

    Args:
        facts: from the data module; read are ``num_codebooks``, K, ``num_codes``, V, ``domains`` and ``kinds``.
        delays: as of `AudioLM`.
        prior: added to each code's count, above 0.

    Raises:
        ValueError: a prior of 0 or less.
    """

    counts: Tensor
    pool_GG: Tensor
    legal_KX: Tensor

    def __init__(self, facts: dict[str, Any], *, delays: list[int] | None = None, prior: float = 0.5) -> None:
        books: int = facts["num_codebooks"]
        super().__init__(DelayPattern(audiocraft(books) if delays is None else delays, facts["num_codes"]))
        if not prior > 0:
            raise ValueError(f"prior={prior}, but a code that was not seen needs some probability; use one above 0")
        self.prior = prior
        pool_GG = pools(facts)
        legal_KX = torch.zeros(books, self.delay.num_tokens, dtype=torch.bool)
        legal_KX[:, : self.delay.num_codes] = True
        legal_KX[0, self.delay.end] = True
        self.register_buffer("pool_GG", pool_GG, persistent=False)
        self.register_buffer("legal_KX", legal_KX, persistent=False)
        self.register_buffer("counts", torch.zeros(len(pool_GG), books, self.delay.num_tokens, dtype=torch.int64))
        self.nothing = nn.Parameter(torch.zeros(()))  # an optimizer needs a parameter; its gradient is 0

    def targets(self, batch: AudioBatch) -> tuple[Tensor, Tensor]:
        """Inputs and targets as of `AudioLM`; while training, count them."""
        inputs_BKL, target_BLK = super().targets(batch)
        if self.training:
            self.count(inputs_BKL, target_BLK, batch.domain)
        return inputs_BKL, target_BLK

    def count(self, inputs_BKL: Tensor, target_BLK: Tensor, domain: Tensor) -> None:
        """Add what is to be predicted to the counts."""
        _add(self.counts, domain[:, None, None], self._book(target_BLK), target_BLK, where=target_BLK != IGNORED)

    def forward(self, prompt_BS: Tensor, inputs_BKL: Tensor, domain: Tensor | None = None) -> Tensor:
        """Logits [B, L, K, X]: logarithms of probabilities.

        Raises:
            ValueError: no domain is given.
        """
        log_GKX = self.log_probabilities()
        return log_GKX[_known(domain, self)].unsqueeze(1).expand(-1, inputs_BKL.shape[-1], -1, -1) + 0 * self.nothing

    def log_probabilities(self) -> Tensor:
        """Of each code of a book in a domain, [G, K, X]."""
        count_GKX = torch.einsum("gh,hkx->gkx", self.pool_GG, self.counts.double()) + self.prior
        count_GKX = count_GKX.where(self.legal_KX, 0)
        return (count_GKX / count_GKX.sum(-1, keepdim=True)).clamp(min=TINY).log().to(self.nothing.dtype)

    @torch.no_grad()
    def prefill(
        self, prompt_BS: Tensor, inputs_BKL: Tensor, *, room: int, domain: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Logits of the next step; nothing need be kept."""
        return self(prompt_BS, inputs_BKL[..., -1:], domain)[:, -1], None

    @torch.no_grad()
    def step(self, token_BK: Tensor, cache: None, domain: Tensor | None = None) -> Tensor:
        """Logits of the step after this one."""
        logits: Tensor = self(token_BK[:, :0], token_BK.unsqueeze(-1), domain)[:, -1]
        return logits

    def _book(self, target_BLK: Tensor) -> Tensor:
        return torch.arange(target_BLK.shape[-1], device=target_BLK.device).expand_as(target_BLK)


class BigramLM(UnigramLM):
    """How often each code of a book follows each other one in the domain, smoothed by the unigram.

    The probability of b after a is (n(a, b) + m p(b)) / (n(a) + m), with p that of `UnigramLM`; its own book is all
    that a code knows.

    Args:
        facts: as of `UnigramLM`.
        delays: as of `AudioLM`.
        prior: of the unigram.
        smoothing: m, how many pairs the unigram counts as, above 0.

    Raises:
        ValueError: a prior or smoothing of 0 or less.

    Source: MacKay & Peto 1995, A hierarchical Dirichlet language model.
    """

    pairs: Tensor

    def __init__(
        self, facts: dict[str, Any], *, delays: list[int] | None = None, prior: float = 0.5, smoothing: float = 32.0
    ) -> None:
        super().__init__(facts, delays=delays, prior=prior)
        if not smoothing > 0:
            raise ValueError(f"smoothing={smoothing}, but pairs that were not seen need the unigram; use one above 0")
        self.smoothing = smoothing
        groups, books, tokens = self.counts.shape
        self.register_buffer("pairs", torch.zeros(groups, books, tokens, tokens, dtype=torch.int32))

    def count(self, inputs_BKL: Tensor, target_BLK: Tensor, domain: Tensor) -> None:
        """Add codes, and pairs with the token before, to the counts."""
        super().count(inputs_BKL, target_BLK, domain)
        before_BLK = inputs_BKL.transpose(1, 2)
        book_BLK = self._book(target_BLK)
        _add(self.pairs, domain[:, None, None], book_BLK, before_BLK, target_BLK, where=target_BLK != IGNORED)

    def forward(self, prompt_BS: Tensor, inputs_BKL: Tensor, domain: Tensor | None = None) -> Tensor:
        """Logits [B, L, K, X]: logarithms of probabilities."""
        known_B, before_BLK = _known(domain, self), inputs_BKL.transpose(1, 2)
        alone_B1KX = self.log_probabilities()[known_B].unsqueeze(1).exp()
        pair_BLKX = torch.zeros(*before_BLK.shape, self.delay.num_tokens, device=before_BLK.device)
        for other in range(len(self.pool_GG)):  # a domain at a time: few are pooled, and their tables are large
            share_B = self.pool_GG[known_B, other]
            rows_R = share_B.nonzero().squeeze(-1)
            if len(rows_R):
                pair_BLKX[rows_R] += self.pairs[other][self._book(before_BLK[rows_R]), before_BLK[rows_R]]
        total_BLK1 = pair_BLKX.sum(-1, keepdim=True)
        share_BLKX = (pair_BLKX + self.smoothing * alone_B1KX) / (total_BLK1 + self.smoothing)
        return share_BLKX.clamp(min=TINY).log() + 0 * self.nothing


def pools(facts: dict[str, Any]) -> Tensor:
    """Whose counts a domain is predicted by, float64 [G, G] of 0 and 1: its own, or those of its kind that are seen."""
    roles, kinds = facts["domains"], facts["kinds"]
    names = [name for role in ("seen", "validation", "unseen") for name in roles.get(role, [])]
    seen = roles["seen"]
    pool_GG = torch.zeros(len(names), len(names), dtype=torch.float64)
    for row, name in enumerate(names):
        alike = [other for other in seen if kinds[other] == kinds[name]] or seen
        for other in [name] if name in seen else alike:
            pool_GG[row, names.index(other)] = 1
    return pool_GG


def _known(domain: Tensor | None, net: nn.Module) -> Tensor:
    if domain is None:
        raise ValueError(f"{type(net).__name__} knows codes by domain alone; call it with domain=batch.domain")
    return domain


def _add(counts: Tensor, *index: Tensor, where: Tensor) -> None:
    """Count the places of all processes, in place."""
    flat = torch.zeros_like(where, dtype=torch.int64)
    for size, part in zip(counts.shape, index, strict=True):
        flat = flat * size + part
    found = torch.bincount(flat[where], minlength=counts.numel())
    counts += sum_over_ranks(found).view_as(counts).to(counts.dtype)
