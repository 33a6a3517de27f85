# SPDX-License-Identifier: Apache-2.0
"""A small vocoder for MelRVQ's tokens: a convolutional network that ends in an inverse Fourier transform.

The tokens stay those of the MelRVQ, so a language model trained on them can be heard through either decoder. Letters:
B clips, T frames, S = T * phase_oversampling finer frames, M mel bands, F frequencies, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from tasks.audio.nets.tokenizers.base import Tokenizer
from tasks.audio.nets.tokenizers.mel_rvq import MelRVQ
from tasks.audio.nets.tokenizers.spectrum import inverse_stft, magnitude, mel_distance

_WINDOWS = (128, 256, 512)  # of the spectra that are compared beside the mel distance


class VocodedRVQ(Tokenizer):
    """MelRVQ with a learned decoder: magnitudes near those of the mel frames, and phases of their own.

    The network sees the dequantised log-mel frames, corrects the magnitudes that the mel inverse gives, and says the
    phase of each frequency; an inverse short-time Fourier transform makes the wave, as in Vocos (arXiv 2306.00814). It
    is trained on the distance of mel spectra and of magnitudes at several windows; there is no discriminator.

    Args:
        rvq: tokenizer whose tokens are heard; `fit` fits it first if nobody did.
        dim: D, width of the network.
        depth: blocks of the network.
        steps: training steps of `fit`.
        batch_size: pieces of clips per step.
        frames: frames per piece; shorter clips are repeated.
        rate: peak learning rate of AdamW, falling along a cosine.
        seed: of the first weights and of the pieces drawn.

    Raises:
        ValueError: a size below 1, or a rate that is not above 0.
    """

    def __init__(
        self,
        rvq: MelRVQ | None = None,
        *,
        dim: int = 128,
        depth: int = 4,
        steps: int = 1000,
        batch_size: int = 8,
        frames: int = 32,
        rate: float = 2e-3,
        seed: int = 0,
    ) -> None:
        rvq = rvq or MelRVQ(num_codebooks=8)
        super().__init__(
            sample_rate=rvq.sample_rate, hop=rvq.hop, num_codebooks=rvq.num_codebooks, num_codes=rvq.num_codes
        )
        sizes = {"dim": dim, "depth": depth, "steps": steps, "batch_size": batch_size, "frames": frames, "rate": rate}
        for name, size in sizes.items():
            if not size > 0:
                raise ValueError(f"VocodedRVQ: {name}={size}; it must be above 0")
        self.rvq = rvq
        self.dim, self.depth, self.seed = dim, depth, seed
        self.steps, self.batch_size, self.frames, self.rate = steps, batch_size, frames, rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = VocoderNet(rvq.num_mels, rvq.n_fft // 2 + 1, dim=dim, depth=depth)

    @override
    def settings(self) -> dict[str, Any]:
        names = ("dim", "depth", "steps", "batch_size", "frames", "rate", "seed")
        own = {name: getattr(self, name) for name in names}
        return {"tokenizer": "VocodedRVQ", "rvq": self.rvq.settings(), **own}

    @override
    def _encode(self, wave_Bn: Tensor) -> Tensor:
        return self.rvq.encode(wave_Bn)

    @override
    def _decode(self, codes_BKT: Tensor) -> Tensor:
        return self._wave(self.rvq.dequantised(codes_BKT))

    def _wave(self, log_mel_BTM: Tensor) -> Tensor:
        rvq = self.rvq
        magnitude_BFS = rvq.magnitude_of(log_mel_BTM)
        log_mel_BMS = F.interpolate(log_mel_BTM.mT, scale_factor=rvq.phase_oversampling, mode="linear")
        gain_BFS, phase_BFS = self.net((log_mel_BMS - rvq.mean_M[:, None]) / 2)
        spectrum_BFS = torch.polar((magnitude_BFS * gain_BFS.clamp(-4, 4).exp()).float(), phase_BFS.float())
        return inverse_stft(spectrum_BFS, rvq.n_fft, rvq.hop // rvq.phase_oversampling)

    @override
    def _fit(self, waves: Sequence[Tensor]) -> None:
        if not self.rvq.fitted:
            self.rvq.fit(waves)
        for _ in self.training_losses(waves):
            pass

    def training_losses(self, waves: Sequence[Tensor]) -> Sequence[float]:
        """Train the network for all steps on checked clips and return the loss of each."""
        generator = torch.Generator().manual_seed(self.seed)
        optimiser = torch.optim.AdamW(self.net.parameters(), lr=self.rate, betas=(0.8, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        losses = []
        with torch.enable_grad():
            for _ in range(self.steps):
                wave_Bn = self._pieces(waves, generator)
                loss = self._loss(wave_Bn)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                losses.append(float(loss.detach()))
        return losses

    def _pieces(self, waves: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Pieces [B, frames * hop] of random clips, each clip at its scaled loudness."""
        samples, found = self.frames * self.hop, []
        for place in torch.randint(len(waves), (self.batch_size,), generator=generator).tolist():
            wave = self.rvq.scaled(waves[place])
            wave = wave.repeat(-(-samples // len(wave)))
            start = int(torch.randint(len(wave) - samples + 1, (), generator=generator))
            found.append(wave[start : start + samples])
        return torch.stack(found).to(self.rvq.mean_M.device)

    def _loss(self, wave_Bn: Tensor) -> Tensor:
        heard_Bn = self._wave(self.rvq.dequantised(self.rvq.encode(wave_Bn)))
        loss = mel_distance(heard_Bn, wave_Bn, self.sample_rate)
        for n_fft in _WINDOWS:
            wanted, found = (magnitude(wave, n_fft, n_fft // 4) for wave in (wave_Bn, heard_Bn))
            loss = loss + (found - wanted).norm() / wanted.norm().clamp_min(1e-6) / len(_WINDOWS)
        return loss


class VocoderNet(nn.Module):
    """Convolutional blocks over log-mel frames and two heads: the logarithm of a gain, and a phase.

    Args:
        num_mels: M.
        num_frequencies: F.
        dim: D.
        depth: number of blocks.

    Shape:
        [B, M, S] -> logarithm of a gain [B, F, S], zero before training, and phase [B, F, S] in radians.
    """

    def __init__(self, num_mels: int, num_frequencies: int, *, dim: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv1d(num_mels, dim, 7, padding=3)
        self.blocks = nn.ModuleList(_Block(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.gain = nn.Linear(dim, num_frequencies)
        self.phase = nn.Linear(dim, 2 * num_frequencies)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.gain.bias)

    @override
    def forward(self, log_mel_BMS: Tensor) -> tuple[Tensor, Tensor]:
        x_BSD = self.embed(log_mel_BMS).mT
        for block in self.blocks:
            x_BSD = block(x_BSD)
        x_BSD = self.norm(x_BSD)
        real, imaginary = self.phase(x_BSD).chunk(2, -1)
        return self.gain(x_BSD).mT, torch.atan2(imaginary, real).mT


class _Block(nn.Module):
    """A ConvNeXt block over time: depthwise convolution, norm, and a feed-forward network, added to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))

    @override
    def forward(self, x_BSD: Tensor) -> Tensor:
        mixed_BSD: Tensor = self.feed_forward(self.norm(self.depthwise(x_BSD.mT).mT))
        return x_BSD + mixed_BSD
