# SPDX-License-Identifier: Apache-2.0
"""The numbers reported for drawn clips, each beside the same number for real ones.

Shape legend: n samples, K codebooks, T frames, V codes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeapps.data.domain import Split
from tasks.audio.data.batch import NO_CODE
from tasks.audio.data.prompt import Prompt
from tasks.audio.report.drawing import sounds
from tasks.audio.report.judge import Judge, real_waves
from tasks.audio.report.music import adherence
from tasks.audio.report.quality import QUIET, frechet, histograms, jensen_shannon, loudness, mel_windows

MOST_CODED = 40
"""Test clips of a domain that are sent through the tokenizer, at most."""


@dataclass(frozen=True)
class Real:
    """What drawn clips are compared with: the clips of the seen domains.

    Attributes:
        domains: their names; numbers below are places in it.
        train: training waves [n].
        train_domain: int64.
        test: test waves.
        test_domain: int64.
        prompts: of the test clips.
        coded: test waves as the tokenizer gives them back, the first of each domain.
        coded_domain: int64.
        codes: training and test codes int64 [K, T] of each domain, laid end to end.
        num_codes: V.
        sample_rate: samples per second.
    """

    domains: list[str]
    train: list[Tensor]
    train_domain: Tensor
    test: list[Tensor]
    test_domain: Tensor
    prompts: list[Prompt]
    coded: list[Tensor]
    coded_domain: Tensor
    codes: dict[Split, list[Tensor]]
    num_codes: int
    sample_rate: int

    @staticmethod
    def of(data: Any) -> Real:
        """Gather them from an `AudioData`."""
        domains = data.present("seen")
        train, train_domain = real_waves(data, "train")
        test, test_domain = real_waves(data, "test")
        rows = [row for d in range(len(domains)) for row in torch.nonzero(test_domain == d).flatten()[:MOST_CODED]]
        coded = [sounds(data.tokenizer, list(data.tokenizer.encode(test[row].unsqueeze(0))))[0] for row in rows]
        splits: tuple[Split, ...] = ("train", "test")
        codes = {split: [_real_codes(data.codes(name, split).codes) for name in domains] for split in splits}
        prompts = [clip.prompt for name in domains for clip in data.clips(name, "test")]
        numbers = int(data.facts["num_codes"]), int(data.facts["sample_rate"])
        coded_domain = test_domain[torch.tensor([int(row) for row in rows], dtype=torch.int64)]
        return Real(domains, train, train_domain, test, test_domain, prompts, coded, coded_domain, codes, *numbers)


def judge_clips(
    codes: Sequence[Tensor],
    waves: Sequence[Tensor],
    prompts: Sequence[Prompt],
    domain: Sequence[int],
    real: Real,
    judge: Judge,
) -> dict[str, dict[str, float]]:
    """Judge drawn clips.

    Args:
        codes: int64 [K, T] of each.
        waves: float32 [n] of each.
        prompts: what was asked for.
        domain: the domain that the prompt is of, as a place in ``real.domains``.
        real: real clips.
        judge: trained on them.

    Returns:
        ``generation``: numbers over all clips, distances as means over the domains; ``generation.<domain>``: over one
        domain. In each:

        - ``loudness``: median RMS in dBFS; ``quietest``: the lowest; ``real_loudness``; ``silent``: share of the clips
          below -40 dBFS.
        - ``seconds``, ``real_seconds``: mean duration.
        - ``domain_accuracy``: share of the clips that the judge hears as the domain asked for;
          ``real_domain_accuracy`` of real test clips, ``coded_domain_accuracy`` of those through the tokenizer.
        - ``frechet``: distance of `mel_windows` to those of training clips; ``frechet_coded``: of test clips through
          the tokenizer, the least that codes can reach; ``frechet_floor``: of test clips. All of as many windows.
        - ``code_divergence``: Jensen-Shannon divergence of the codes' histograms from those of training clips, in bits;
          ``code_divergence_floor``: of test clips.
        - ``chroma``, ``chroma_shuffled``, ``tempo`` of `adherence`, and ``real_...`` of test clips, where prompts have
          chords and a tempo.
        - ``clips``: how many were drawn.
    """
    asked = torch.tensor(list(domain))
    heard = {"drawn": judge.domains(waves), "test": judge.domains(real.test), "coded": judge.domains(real.coded)}
    windows = {
        "drawn": _windows(waves, asked, real.sample_rate),
        "train": _windows(real.train, real.train_domain, real.sample_rate),
        "test": _windows(real.test, real.test_domain, real.sample_rate),
        "coded": _windows(real.coded, real.coded_domain, real.sample_rate),
    }

    def distances(d: int) -> dict[str, float]:
        """Distances to the training clips of one domain."""
        least = min(len(windows[name][d]) for name in ("drawn", "test", "coded"))
        keys = {"frechet": "drawn", "frechet_coded": "coded", "frechet_floor": "test"}
        found = {key: frechet(windows["train"][d], _spread(windows[name][d], least)) for key, name in keys.items()}
        used = {split: histograms([of[d]], real.num_codes) for split, of in real.codes.items()}
        drawn = histograms([codes[row] for row in _rows(asked, [d])], real.num_codes)
        found["code_divergence"] = jensen_shannon(drawn, used["train"])
        return found | {"code_divergence_floor": jensen_shannon(used["test"], used["train"])}

    def numbers(wanted: list[int]) -> dict[str, float]:
        mine = _rows(asked, wanted)
        test, coded = _rows(real.test_domain, wanted), _rows(real.coded_domain, wanted)
        clips, truth = [waves[row] for row in mine], [real.test[row] for row in test]
        levels = [loudness(wave) for wave in clips]
        found = {
            "loudness": statistics.median(levels),
            "quietest": min(levels),
            "real_loudness": statistics.median(map(loudness, truth)),
            "silent": sum(level < QUIET for level in levels) / len(levels),
            "seconds": sum(map(len, clips)) / len(clips) / real.sample_rate,
            "real_seconds": sum(map(len, truth)) / len(truth) / real.sample_rate,
            "domain_accuracy": _share(heard["drawn"][mine] == asked[mine]),
            "real_domain_accuracy": _share(heard["test"][test] == real.test_domain[test]),
            "coded_domain_accuracy": _share(heard["coded"][coded] == real.coded_domain[coded]),
        }
        apart = [distances(d) for d in wanted]
        found |= {key: statistics.fmean(part[key] for part in apart) for key in apart[0]}
        kept = adherence(clips, [prompts[row] for row in mine], real.sample_rate)
        found |= kept
        if kept:
            truly = adherence(truth, [real.prompts[row] for row in test], real.sample_rate)
            found |= {f"real_{name}": value for name, value in truly.items()}
        return found | {"clips": float(len(mine))}

    present = sorted(set(asked.tolist()))
    groups = {"generation": numbers(present)}
    return groups | {f"generation.{real.domains[d]}": numbers([d]) for d in present}


def _real_codes(codes_BKT: Tensor) -> Tensor:
    """Codes [K, frames of all clips] of a batch."""
    flat = codes_BKT.transpose(0, 1).flatten(1)
    return flat[:, flat[0] != NO_CODE]


def _windows(waves: Sequence[Tensor], domain: Tensor, sample_rate: int) -> dict[int, Tensor]:
    """Windows of each domain."""
    return {d: mel_windows([waves[row] for row in _rows(domain, [d])], sample_rate) for d in domain.unique().tolist()}


def _rows(domain: Tensor, wanted: list[int]) -> list[int]:
    found: list[int] = torch.isin(domain, torch.tensor(wanted)).nonzero().flatten().tolist()
    return found


def _spread(windows: Tensor, count: int) -> Tensor:
    """``count`` windows, evenly over all."""
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def _share(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else float("nan")
