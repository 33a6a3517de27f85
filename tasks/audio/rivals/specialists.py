# SPDX-License-Identifier: Apache-2.0
"""One network per domain: what joint training is compared with.

Shape legend: B clips, K codebooks, V codes of a book, X = V + 3 tokens, L steps, S symbols of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tasks.audio.model import AudioLM
from tasks.audio.nets.language_model import CodecLM
from tasks.audio.rivals.counts import pools


class Specialists(CodecLM):
    """A network for each seen domain, which learns from its clips alone.

    A domain that was not trained on is predicted by all specialists of its kind (by all, where there is none): the mean
    of their log-probabilities, normalised.

    Args:
        facts: from the data module; read are ``domains`` and ``kinds``, and what ``net`` reads.
        net: facts -> the network of one domain.

    Raises:
        ValueError: there is no seen domain.
    """

    in_parts: ClassVar[bool] = True
    rows_GE: Tensor

    def __init__(self, facts: dict[str, Any], *, net: Callable[[dict[str, Any]], AudioLM]) -> None:
        seen: list[str] = facts["domains"]["seen"]
        if not seen:
            raise ValueError("facts names no seen domain; specialists need one at least")
        nets = [net(facts) for _ in seen]
        super().__init__(nets[0].delay)
        self.nets = nn.ModuleList(nets)
        self.register_buffer("rows_GE", pools(facts)[:, : len(seen)], persistent=False)

    def forward(self, prompt_BS: Tensor, inputs_BKL: Tensor, domain: Tensor | None = None) -> Tensor:
        """Logits [B, L, K, X] of the steps after those given."""
        share_BE = self._shares(domain)
        return self._joined(
            share_BE, [self._net(e)(prompt_BS[rows], inputs_BKL[rows]) for e, rows in self._rows(share_BE)]
        )

    @torch.no_grad()
    def prefill(
        self, prompt_BS: Tensor, inputs_BKL: Tensor, *, room: int, domain: Tensor | None = None
    ) -> tuple[Tensor, list[Any]]:
        """Logits [B, K, X] of the next step, and a cache for each specialist that is asked."""
        share_BE = self._shares(domain)
        found = [self._net(e).prefill(prompt_BS[rows], inputs_BKL[rows], room=room) for e, rows in self._rows(share_BE)]
        return self._joined(share_BE, [logits for logits, _ in found]), [cache for _, cache in found]

    @torch.no_grad()
    def step(self, token_BK: Tensor, cache: list[Any], domain: Tensor | None = None) -> Tensor:
        """Logits [B, K, X] of the step after this one."""
        share_BE = self._shares(domain)
        found = [
            self._net(e).step(token_BK[rows], own) for (e, rows), own in zip(self._rows(share_BE), cache, strict=True)
        ]
        return self._joined(share_BE, found)

    def _net(self, e: int) -> AudioLM:
        net = self.nets[e]
        assert isinstance(net, AudioLM)
        return net

    def _shares(self, domain: Tensor | None) -> Tensor:
        """What each specialist counts in the mean of a clip, float64 [B, E], 0 for those that are not asked."""
        if domain is None:
            raise ValueError("specialists are chosen by domain; call them with domain=batch.domain")
        share_BE = self.rows_GE[domain]
        return share_BE / share_BE.sum(-1, keepdim=True)

    @staticmethod
    def _rows(share_BE: Tensor) -> list[tuple[int, Tensor]]:
        """The specialists that are asked, each with its clips."""
        asked = [(e, share_B.nonzero().squeeze(-1)) for e, share_B in enumerate(share_BE.unbind(-1))]
        return [(e, rows) for e, rows in asked if len(rows)]

    def _joined(self, share_BE: Tensor, logits: list[Tensor]) -> Tensor:
        """The mean of the specialists' log-probabilities, clip by clip."""
        found = logits[0].new_zeros(len(share_BE), *logits[0].shape[1:])
        for (e, rows), own in zip(self._rows(share_BE), logits, strict=True):
            share = share_BE[rows, e].to(own.dtype).view(-1, *[1] * (own.ndim - 1))
            found = found.index_add(0, rows, share * own.log_softmax(-1))
        return found
