# SPDX-License-Identifier: Apache-2.0
"""A small classifier that says which domain a clip is of: trained on real clips on first use, kept in the cache.

Its features take the place of those of large pretrained networks, so that nothing has to be downloaded. Distances of
two judges cannot be compared: results carry the judge's hash.

Shape legend: N pieces of clips, n samples, M mel bands, T frames, C domains.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import Split

log = logging.getLogger("moeapps")
VERSION = 1
NUM_FEATURES = 32
NUM_MELS = 40
PIECE = 1.0
"""Seconds that are judged at a time."""


@dataclass
class Judging:
    """How the judge is trained.

    Args:
        steps: optimizer steps.
        batch_size: pieces per step, the domains equally often.
        lr: peak step size of AdamW; it rises over a tenth of the run and falls to 0 linearly.
        width: channels of the first layer.
        seed: seed of weights and pieces.

    Raises:
        ValueError: a number below 1, or a step size not above 0.
    """

    steps: int = 300
    batch_size: int = 32
    lr: float = 3e-3
    width: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.width) < 1 or not self.lr > 0:
            raise ValueError(f"{self}: steps, batch_size and width are 1 or more, lr is above 0")


class Judge(nn.Module):
    """Log-mel, three strided convolutions, mean and spread over time, a map to `NUM_FEATURES` features, then scores.

    Args:
        sample_rate: samples per second.
        num_domains: C.
        width: channels of the first layer.
    """

    def __init__(self, sample_rate: int, num_domains: int, width: int = 16) -> None:
        super().__init__()
        self.sample_rate = sample_rate

        def layer(ins: int, outs: int) -> list[nn.Module]:
            return [nn.Conv1d(ins, outs, 5, 2, 2, bias=False), nn.BatchNorm1d(outs), nn.ReLU()]

        self.body = nn.Sequential(
            *layer(NUM_MELS, 4 * width), *layer(4 * width, 4 * width), *layer(4 * width, 4 * width)
        )
        self.drop = nn.Dropout(0.2)
        self.features_of = nn.Linear(8 * width, NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, num_domains)
        self.key = ""

    def forward(self, piece: Tensor) -> Tensor:
        """Features float32 [N, 32] of pieces [N, n]."""
        heard = self.body(log_mel(piece, self.sample_rate))
        pooled = torch.cat([heard.mean(2), heard.var(2, unbiased=False).add(1e-5).sqrt()], dim=1)
        features: Tensor = self.features_of(self.drop(pooled))
        return features

    def scores(self, features: Tensor) -> Tensor:
        """Scores of the domains [N, C] of features [N, 32]."""
        found: Tensor = self.head(F.relu(features))
        return found

    @torch.no_grad()
    def features(self, waves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Features of every piece of clips, and of which clip each is: float32 [N, 32], int64 [N]."""
        self.eval()
        pieces = [cut(wave, self.sample_rate) for wave in waves]
        row = torch.arange(len(waves)).repeat_interleave(torch.tensor([len(part) for part in pieces]))
        empty = torch.empty(0, NUM_FEATURES)
        return torch.cat([empty, *(self(part) for part in torch.cat(pieces).split(256))]), row

    @torch.no_grad()
    def domains(self, waves: Sequence[Tensor]) -> Tensor:
        """Likeliest domain int64 [len(waves)] of each clip, by the mean log-probability of its pieces."""
        features, row = self.features(waves)
        told = self.scores(features).log_softmax(1)
        return torch.zeros(len(waves), told.shape[1]).index_add_(0, row, told).argmax(1)


def log_mel(wave: Tensor, sample_rate: int) -> Tensor:
    """Logarithm of the mel spectrogram [N, 40, T] of waves [N, n], each first brought to one loudness.

    Windows of 32 ms, hops of 16 ms; the floor is 1e-3 of a clip of loudness 0.1, so that what cannot be heard is not
    judged by.
    """
    loud = wave / wave.square().mean(1, keepdim=True).sqrt().clamp(min=1e-3) * 0.1
    size = sample_rate * 32 // 1000
    padded = F.pad(loud, (0, max(0, size - loud.shape[1])))
    spectrum = torch.stft(padded, size, size // 2, window=torch.hann_window(size), return_complex=True).abs()
    bands = torch.einsum("nft,fm->nmt", spectrum, _bank(sample_rate, size // 2 + 1))
    return bands.clamp(min=1e-3).log()


@cache
def _bank(sample_rate: int, num_bins: int) -> Tensor:
    from torchaudio.functional import melscale_fbanks

    with torch.inference_mode(False):
        found: Tensor = melscale_fbanks(num_bins, 50.0, sample_rate / 2, NUM_MELS, sample_rate, norm="slaney")
    return found * 100


def cut(wave: Tensor, sample_rate: int) -> Tensor:
    """Pieces [N, n] of `PIECE` seconds, laid evenly over a clip; a shorter clip is repeated until it fills one."""
    size = round(PIECE * sample_rate)
    if not len(wave):
        return torch.zeros(1, size)
    if len(wave) < size:
        return wave.repeat(-(-size // len(wave)))[:size].unsqueeze(0)
    number = -(-len(wave) // size)
    starts = torch.linspace(0, len(wave) - size, number).long()
    return torch.stack([wave[start : start + size] for start in starts.tolist()])


def real_waves(data: Any, split: Split) -> tuple[list[Tensor], Tensor]:
    """Waves of the seen domains, and the number of the domain of each (place among the seen ones), int64."""
    waves: list[Tensor] = []
    domain: list[int] = []
    for number, name in enumerate(data.present("seen")):
        found = [clip.wave for clip in data.clips(name, split)]
        waves += found
        domain += [number] * len(found)
    return waves, torch.tensor(domain)


@torch.inference_mode(False)  # parameters made while a test runs could otherwise not be trained
def get_judge(data: Any, judging: Judging | None = None) -> Judge:
    """Return the judge of the seen domains of a data module, trained now if the cache has none for these clips.

    Args:
        data: an `AudioData`; its training clips are learned.
        judging: settings.
    """
    judging = judging or Judging()
    waves, domain = real_waves(data, "train")
    rate, number = int(data.facts["sample_rate"]), len(data.present("seen"))
    digest = hashlib.sha256(domain.numpy().tobytes())
    for wave in waves:
        digest.update(wave.numpy().tobytes())
    key = config_hash([VERSION, digest.hexdigest(), rate, judging])
    with isolate_rng():  # the first weights are drawn, and then not used
        judge = Judge(rate, number, judging.width)

    def write(path: Path) -> None:
        torch.save(train_judge(judge, waves, domain, judging).state_dict(), path)

    path = build_once(cache_dir("audio", root=data.cache_dir) / f"judge-{key}.pt", write)
    judge.load_state_dict(torch.load(path, weights_only=True))
    judge.key = key
    return judge.eval()


def train_judge(judge: Judge, waves: Sequence[Tensor], domain: Tensor, judging: Judging) -> Judge:
    """Train on random pieces of clips; weights are drawn anew from the seed, the global random states stay.

    Args:
        judge: what is trained, in place.
        waves: clips [n].
        domain: int64, number of the domain of each clip.
        judging: settings.
    """
    log.info("training the judge of drawn clips: %d clips, %d steps", len(waves), judging.steps)
    members = [torch.nonzero(domain == number).flatten() for number in range(judge.head.out_features)]
    members = [rows for rows in members if len(rows)]
    with isolate_rng(), torch.enable_grad():
        torch.manual_seed(judging.seed)
        for module in judge.modules():
            if isinstance(module, nn.Conv1d | nn.Linear | nn.BatchNorm1d):
                module.reset_parameters()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=judging.lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate((step + 1) / (judging.steps + 1)))
        judge.train()
        for step in range(judging.steps):
            rows = [_pick(members[(step + i) % len(members)]) for i in range(judging.batch_size)]
            pieces = torch.stack([_piece(waves[row], judge.sample_rate) for row in rows])
            scores = judge.scores(judge(pieces))
            loss = F.cross_entropy(scores, domain[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


def _rate(done: float) -> float:
    return min(done / 0.1, (1 - done) / 0.9)


def _pick(rows: Tensor) -> int:
    return int(rows[int(torch.randint(len(rows), ()))])


def _piece(wave: Tensor, sample_rate: int) -> Tensor:
    """A random piece of a clip."""
    size = round(PIECE * sample_rate)
    if len(wave) <= size:
        return cut(wave, sample_rate)[0]
    start = int(torch.randint(len(wave) - size + 1, ()))
    return wave[start : start + size]
