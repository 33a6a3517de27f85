# SPDX-License-Identifier: Apache-2.0
"""What a clip is to be: labels and a text, and the symbols a model reads."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["speech", "music"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PADDING, EMPTY, UNKNOWN = 0, 1, 2
_NUM_SPECIAL = 3
_NUM_BYTES = 256
_NAME = r"[\w.#+-]+"


@dataclass(frozen=True)
class Prompt:
    """What a clip is: its kind, its labels, and its words (speech) or chords (music).

    Args:
        kind: speech or music.
        labels: name -> value, such as ``language: it``; letters, digits and ``_.#+-``.
        text: transcript, chords, or nothing. White space is collapsed and characters are composed (Unicode NFC);
            what UTF-8 cannot say becomes a question mark.

    Raises:
        ValueError: another kind, a malformed label, or one named ``kind``.
    """

    kind: Kind
    labels: dict[str, str] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not allowed; a prompt is one of {', '.join(KINDS)}")
        for name, value in self.labels.items():
            if name == "kind" or not re.fullmatch(_NAME, name) or not re.fullmatch(_NAME, value):
                raise ValueError(
                    f"label {name}={value!r} is not allowed; use letters, digits and _.#+-, and no name 'kind'"
                )
        words = unicodedata.normalize("NFC", self.text.encode("utf-8", "replace").decode("utf-8"))
        object.__setattr__(self, "text", " ".join(words.replace("\0", " ").split()))

    @property
    def label_names(self) -> list[str]:
        """All labels as ``name=value``; the kind first."""
        return [f"kind={self.kind}", *(f"{name}={value}" for name, value in self.labels.items())]

    @staticmethod
    def parse(line: str) -> Prompt:
        """Read ``speech language=it voice=Carlo: buongiorno``; the colon and the text may be missing.

        Raises:
            ValueError: it does not begin with a kind, or a word before the colon is no label.
        """
        head, _, text = line.partition(":")
        words = head.split()
        if not words or words[0] not in KINDS or any("=" not in word for word in words[1:]):
            raise ValueError(
                f"prompt {line!r} is not understood; write it as 'speech language=it: buongiorno' or 'music tempo=fast'"
            )
        return Prompt(words[0], dict(_pair(word) for word in words[1:]), text)

    def __str__(self) -> str:
        head = " ".join([self.kind, *self.label_names[1:]])
        return f"{head}: {self.text}" if self.text else head


def _pair(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, value


class PromptVocabulary:
    """Symbols of prompts: 0 padding, 1 no prompt, 2 a label that is not known, then the labels, then 256 bytes.

    Args:
        labels: known labels as ``name=value``, each once.

    Raises:
        ValueError: a label twice.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice:
            raise ValueError(f"labels given twice: {', '.join(twice)}; name each once")
        self._id = {label: _NUM_SPECIAL + i for i, label in enumerate(self.labels)}

    def __len__(self) -> int:
        """Number of symbols."""
        return self.first_byte + _NUM_BYTES

    @property
    def first_byte(self) -> int:
        """Symbol of byte 0."""
        return _NUM_SPECIAL + len(self.labels)

    def encode(self, prompt: Prompt | None) -> list[int]:
        """Return the symbols of a prompt, labels first; None, which is no prompt, gives ``[EMPTY]``."""
        if prompt is None:
            return [EMPTY]
        labels = [self._id.get(label, UNKNOWN) for label in prompt.label_names]
        return labels + [self.first_byte + byte for byte in prompt.text.encode("utf-8")]

    def decode(self, symbols: Sequence[int]) -> str:
        """Return a prompt for people, as `Prompt.parse` reads it; a label that is not known is ``?=?``.

        Raises:
            ValueError: a symbol out of range.
        """
        wrong = [symbol for symbol in symbols if not 0 <= symbol < len(self)]
        if wrong:
            raise ValueError(f"symbol {wrong[0]} is out of range; this vocabulary has {len(self)} symbols")
        if EMPTY in symbols:
            return ""
        known = dict(enumerate(self.labels, _NUM_SPECIAL)) | {UNKNOWN: "?=?"}
        head = " ".join(known[symbol].removeprefix("kind=") for symbol in symbols if symbol in known)
        text = bytes(s - self.first_byte for s in symbols if s >= self.first_byte).decode("utf-8", "replace")
        return f"{head}: {text}" if text else head
