# SPDX-License-Identifier: Apache-2.0
"""Prompts and their symbols: what is written is read, and what is not known has a defined place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.audio.data.prompt import EMPTY, UNKNOWN, Prompt, PromptVocabulary

VOCABULARY = PromptVocabulary(["kind=speech", "kind=music", "language=it", "tempo=fast"])
BYTE = 3 + 4


def test_symbols_are_labels_then_bytes() -> None:
    prompt = Prompt("speech", {"language": "it"}, "sì")

    assert VOCABULARY.encode(prompt) == [3, 5, BYTE + ord("s"), BYTE + 0xC3, BYTE + 0xAC]
    assert len(VOCABULARY) == 3 + 4 + 256
    assert VOCABULARY.decode(VOCABULARY.encode(prompt)) == "speech language=it: sì"


def test_no_prompt_and_a_label_that_is_not_known_have_symbols_of_their_own() -> None:
    assert VOCABULARY.encode(None) == [EMPTY]
    assert VOCABULARY.decode([EMPTY]) == ""
    assert VOCABULARY.encode(Prompt("music", {"language": "ru", "tempo": "fast"})) == [4, UNKNOWN, 6]
    assert VOCABULARY.decode([4, UNKNOWN, 6]) == "music ?=? tempo=fast"


@given(st.text())
def test_any_text_comes_back_from_its_symbols(text: str) -> None:
    prompt = Prompt("speech", {}, text)
    symbols = VOCABULARY.encode(prompt)

    assert all(0 <= symbol < len(VOCABULARY) for symbol in symbols)
    told = VOCABULARY.decode(symbols)
    assert told == (f"speech: {prompt.text}" if prompt.text else "speech")
    assert Prompt.parse(told) == prompt


def test_text_is_composed_collapsed_and_made_sayable() -> None:
    assert Prompt("speech", {}, " e\u0301  a\n\tb\0c ").text == "é a b c"
    assert Prompt("speech", {}, "a\ud800b").text == "a?b"


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt("music"),
        Prompt("music", {"tempo": "fast", "mode": "minor"}, "C#m F"),
        Prompt("speech", {"voice": "ru_1.b"}, "привет: 你好"),
    ],
)
def test_a_prompt_that_is_shown_can_be_given(prompt: Prompt) -> None:
    assert Prompt.parse(str(prompt)) == prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("noise",), "kind='noise' is not allowed.*speech, music"),
        (("music", {"kind": "x"}), "label kind='x' is not allowed"),
        (("music", {"tempo": "very fast"}), "label tempo='very fast' is not allowed"),
        (("music", {"tempo": ""}), "label tempo='' is not allowed"),
    ],
)
def test_wrong_prompts_are_told(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompt(*arguments)


@pytest.mark.parametrize("line", ["", "   ", "hello", "speech hello: there", ": x"])
def test_lines_that_are_no_prompt_are_told(line: str) -> None:
    with pytest.raises(ValueError, match="is not understood; write it as"):
        Prompt.parse(line)


def test_labels_twice_and_symbols_out_of_range_are_told() -> None:
    with pytest.raises(ValueError, match="labels given twice: a=b"):
        PromptVocabulary(["a=b", "a=b"])
    with pytest.raises(ValueError, match="symbol 263 is out of range; this vocabulary has 263"):
        VOCABULARY.decode([4, 263])
