# SPDX-License-Identifier: Apache-2.0
"""What every collection of clips provides: its domains, their labels, and the clips of a domain and split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from moeapps.data.domain import Role, Split
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


class AudioSource(ABC):
    """Base class of the collections of clips that `AudioData` can read.

    Attributes:
        default_roles: domains per role where the data module names none.
        sample_rate: samples per second of every clip.
    """

    default_roles: ClassVar[dict[Role, list[str]]] = {}
    sample_rate: int

    @property
    @abstractmethod
    def domains(self) -> list[str]:
        """All names a role may hold."""

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

    @abstractmethod
    def describe(self, domain: str) -> str:
        """Say where a domain's clips come from, for results files."""

    def parts(self, domain: str) -> Sequence[str]:
        """Return the collections a domain is made of; domains that share one may not have different roles."""
        return [domain]

    def missing(self, domain: str, cache: Path | None) -> str | None:
        """Return why an OPTIONAL domain cannot be had, or None."""
        return None

    def prepare(self, domains: Sequence[str], cache: Path | None) -> None:  # noqa: B027 - a user's files need none
        """Fetch or generate what is not in the cache yet; called once, by one process."""

    def check(self, domains: Sequence[str]) -> None:
        """Raise ValueError where a name is not one of `domains`."""
        for name in domains:
            if name not in self.domains:
                raise ValueError(f"{type(self).__name__} has no domain {name!r}; allowed: {', '.join(self.domains)}")
