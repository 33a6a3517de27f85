# SPDX-License-Identifier: Apache-2.0
"""What every collection of clips provides: its domains, their labels, and the clips of a domain and split."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from moeapps.data.domain import Split
from moeapps.data.source import DomainSource
from tasks.audio.data.prompt import Kind, Prompt


@dataclass(frozen=True)
class Clip:
    """A piece of sound.

    Attributes:
        wave: float32 [n], within -1 and 1, one channel.
        prompt: what it is.
        name: file or number it comes from.
        ends: the recording ends with it; False for a piece out of the middle.
    """

    wave: Tensor
    prompt: Prompt
    name: str
    ends: bool = True


class AudioSource(DomainSource):
    """Base class of the collections of clips that `AudioData` can read.

    Attributes:
        sample_rate: samples per second of every clip.
    """

    sample_rate: int

    @abstractmethod
    def kind(self, domain: str) -> Kind:
        """Say whether a domain is speech or music."""

    @abstractmethod
    def labels(self, domains: Sequence[str]) -> list[str]:
        """Return the labels ``name=value`` of these domains' prompts, each once; known before any clip is made."""

    @abstractmethod
    def identity(self, domain: str) -> Any:
        """Return plain values that say which clips a domain has: equal values, equal clips."""

    @abstractmethod
    def clips(self, domain: str, split: Split, cache: Path | None) -> list[Clip]:
        """Return the clips of one domain and split.

        Domains of every role have a ``train`` split: that of an unseen one is what a few steps of tuning are given.
        """

    @override
    def dataset(self, domain: str, split: Split, cache: Path | None) -> Any:
        return self.clips(domain, split, cache)

    def parts(self, domain: str) -> Sequence[str]:
        """Return the collections a domain is made of; domains that share one may not have different roles."""
        return [domain]
