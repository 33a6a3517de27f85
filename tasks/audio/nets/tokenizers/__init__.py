# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: from a wave to the codes of several books and back, all with one interface."""

from tasks.audio.nets.tokenizers.base import Tokenizer
from tasks.audio.nets.tokenizers.mel_rvq import MelRVQ

__all__ = ["MelRVQ", "Tokenizer"]
