# SPDX-License-Identifier: Apache-2.0
"""The network of UniMoE-Audio: a decoder over the delayed tokens of a codec, with a mixture in place of every FFN.

Source: UniMoE-Audio (arXiv 2510.13344; docs/papers/unimoe_audio.md); facts of the layout from HITsz-TMG/Uni-MoE
``UniMoE-Audio/utils``. Differs: the prompt is labels and bytes of text in front of the audio, where the paper has the
chat template of a pretrained language model, its vision tower and its own tokens.

Shape legend: B clips, K codebooks, V codes of a book, T frames, L steps, S symbols of a prompt, R = S + L rows,
D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moeapps.moe import LayerFactory, MoELayer
from tasks.audio.data.prompt import PADDING
from tasks.audio.nets.attention import Attention, Rotary, rotary
from tasks.audio.nets.cache import Cache, LayerCache
from tasks.audio.nets.delay import DelayPattern, audiocraft
from tasks.audio.nets.language_model import CodecLM, empty_prompts

STD = 0.02
"""Of embeddings and of the last layer at the start, as published; layers between have it over sqrt(D / 2048)."""


class Block(nn.Module):
    """x + Attn(RMSNorm(x)), then h + MoE(RMSNorm(h)).

    Args:
        dim: D.
        num_heads: H.
        num_kv_heads: G; None means H.
        moe: makes what takes the place of the FFN.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int | None, moe: LayerFactory) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, num_kv_heads)
        self.ffn = moe(dim)

    def forward(
        self,
        x_BRD: Tensor,
        angles: Rotary,
        mask_BRA: Tensor,
        *,
        real_BR: Tensor | None = None,
        group_BR: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """One block: [B, R, D] -> [B, R, D]; rows that are not real get no expert."""
        x_BRD = x_BRD + self.attn(self.norm1(x_BRD), angles, mask_BRA, cache)
        h_BRD = self.norm2(x_BRD)
        if isinstance(self.ffn, MoELayer):
            y_BRD: Tensor = self.ffn(h_BRD, token_mask=real_BR, group=group_BR)
        else:
            y_BRD = self.ffn(h_BRD)
        return x_BRD + y_BRD


class AudioLM(CodecLM):
    """Predict every book's next token from a prompt and the steps so far.

    Rows of the layers are, clip by clip, the S symbols of its prompt and then its L steps. Padding (left of a prompt,
    and steps at which every book has ended) is seen by no row and goes to no expert.

    Args:
        facts: from the data module; read are ``num_codebooks``, K, ``num_codes``, V, and ``num_symbols`` of a prompt.
        dim: D, a multiple of ``2 num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        num_kv_heads: heads of keys and values (paper: 2 of 16); None means as many.
        moe: width -> layer in place of every block's FFN.
        delays: steps that each book is behind; None means 0, 1, 2, ... (paper: 0, 8, 9, ...).
        prompt_dropout: share of the prompts that training empties; needed for guidance.
        theta: base of the rotary angles.

    Shape:
        prompt int64 [B, S], inputs int64 [B, K, L] -> logits [B, L, K, V + 3]; those at step l are of step l + 1.

    Raises:
        ValueError: sizes that do not divide each other, another number of delays, a share outside [0, 1].

    Source: UniMoE-Audio (docs/papers/unimoe_audio.md, equations 8 to 11).
    """

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        moe: LayerFactory,
        dim: int = 96,
        depth: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        delays: list[int] | None = None,
        prompt_dropout: float = 0.15,
        theta: float = 10_000.0,
    ) -> None:
        books: int = facts["num_codebooks"]
        super().__init__(DelayPattern(audiocraft(books) if delays is None else delays, facts["num_codes"]))
        if len(self.delay.delays) != books:
            raise ValueError(f"delays={delays}, but the data have {books} codebooks; give one delay for each")
        if depth < 1 or not 0 <= prompt_dropout <= 1:
            raise ValueError(f"depth={depth}, prompt_dropout={prompt_dropout}: use 1 or more, and a share in [0, 1]")
        self.num_codebooks, self.dim, self.theta, self.prompt_dropout = books, dim, theta, prompt_dropout
        self.symbols = nn.Embedding(facts["num_symbols"], dim)
        self.tokens = nn.EmbeddingBag(books * self.delay.num_tokens, dim, mode="sum")
        self.blocks = nn.ModuleList(Block(dim, num_heads, num_kv_heads, moe) for _ in range(depth))
        self.head_dim = dim // num_heads
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, books * self.delay.num_tokens, bias=False)
        self.register_buffer("first_K1", self.delay.num_tokens * torch.arange(books).unsqueeze(-1), persistent=False)
        self.reset_parameters()

    first_K1: Tensor

    def reset_parameters(self) -> None:
        """Draw embeddings and head from N(0, 0.02), attention from N(0, 0.905 / sqrt(D)); experts keep their own."""
        for module in (self.symbols, self.tokens, self.head):
            nn.init.normal_(module.weight, std=STD)
        for part in self.modules():
            if isinstance(part, Attention):
                for linear in (part.qkv, part.out):
                    nn.init.normal_(linear.weight, std=STD * math.sqrt(2048 / self.dim))

    def dropped(self, prompt_BS: Tensor) -> Tensor:
        """Prompts of which training empties some."""
        if not self.training or self.prompt_dropout == 0 or prompt_BS.shape[1] == 0:
            return prompt_BS
        drop_B1 = torch.rand(len(prompt_BS), 1, device=prompt_BS.device) < self.prompt_dropout
        return empty_prompts(prompt_BS).where(drop_B1, prompt_BS)

    # The network ----------------------------------------------------------------------------------------------------

    def forward(self, prompt_BS: Tensor, inputs_BKL: Tensor, domain: Tensor | None = None) -> Tensor:
        """Logits of the steps after those given.

        Args:
            prompt_BS: symbols, 0 at the left of a shorter one.
            inputs_BKL: tokens, from `targets`.
            domain: int64 [B]; only for layers that route by it.
        """
        y_BRD = self._run(self.dropped(prompt_BS), inputs_BKL, domain)
        return self._logits(y_BRD[:, prompt_BS.shape[1] :])

    @torch.no_grad()
    def prefill(
        self, prompt_BS: Tensor, inputs_BKL: Tensor, *, room: int, domain: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """Logits [B, K, V + 3] of the step after those given, and a cache with room for so many further steps."""
        rows = prompt_BS.shape[1] + inputs_BKL.shape[-1] + room
        layers = [self._layer_cache(block, len(prompt_BS), rows) for block in self.blocks]
        cache = Cache(layers, torch.ones(len(prompt_BS), 0, dtype=torch.bool, device=prompt_BS.device))
        y_BRD = self._run(prompt_BS, inputs_BKL, domain, cache)
        return self._logits(y_BRD[:, -1:]).squeeze(1), cache

    @torch.no_grad()
    def step(self, token_BK: Tensor, cache: Cache, domain: Tensor | None = None) -> Tensor:
        """Logits [B, K, V + 3] of the step after this one, which is added to the cache."""
        y_BRD = self._run(token_BK.new_zeros(len(token_BK), 0), token_BK.unsqueeze(-1), domain, cache)
        return self._logits(y_BRD).squeeze(1)

    def _run(self, prompt_BS: Tensor, inputs_BKL: Tensor, domain: Tensor | None, cache: Cache | None = None) -> Tensor:
        x_BRD = torch.cat([self.symbols(prompt_BS), self._embed(inputs_BKL)], dim=1)
        real_BR = torch.cat([prompt_BS != PADDING, (inputs_BKL != self.delay.pad).any(1)], dim=1)
        first = 0 if cache is None else cache.length
        if cache is not None:
            cache.extend(real_BR)
        mask_BRA = _visible(real_BR if cache is None else cache.real_BR, real_BR.shape[1])
        angles = rotary(first, x_BRD.shape[1], self.head_dim, self.theta, x_BRD)
        group_BR = None if domain is None else domain.unsqueeze(-1).expand_as(real_BR)
        for i, block in enumerate(self.blocks):
            kept = None if cache is None else cache.layers[i]
            x_BRD = block(x_BRD, angles, mask_BRA, real_BR=real_BR, group_BR=group_BR, cache=kept)
        return x_BRD

    def _embed(self, inputs_BKL: Tensor) -> Tensor:
        """Sum of the books' embeddings: [B, K, L] -> [B, L, D]."""
        row_NK = (inputs_BKL + self.first_K1).transpose(1, 2).flatten(0, 1)
        y: Tensor = self.tokens(row_NK).view(len(inputs_BKL), inputs_BKL.shape[-1], self.dim)
        return y

    def _logits(self, y_BLD: Tensor) -> Tensor:
        """One linear head for all books, in parallel: [B, L, D] -> [B, L, K, V + 3]."""
        y: Tensor = self.head(self.norm(y_BLD)).unflatten(-1, (self.num_codebooks, -1))
        return y

    def _layer_cache(self, block: nn.Module, num_clips: int, rows: int) -> LayerCache:
        assert isinstance(block, Block)
        return LayerCache(num_clips, block.attn.num_kv_heads, rows, self.head_dim, self.head.weight)


def _visible(real_BA: Tensor, num_rows: int) -> Tensor:
    """Which of all rows the last R see, bool [B, R, A]: real ones up to themselves, and themselves even as padding."""
    num_all = real_BA.shape[1]
    own_RA = torch.ones(num_rows, num_all, dtype=torch.bool, device=real_BA.device)
    before_RA = own_RA.tril(num_all - num_rows)
    own_RA = before_RA & own_RA.triu(num_all - num_rows)
    return (before_RA & real_BA.unsqueeze(1)) | own_RA
