# SPDX-License-Identifier: Apache-2.0
"""What every audio tokenizer is: codes of a wave, a wave of codes, a file and an identity.

Letters: B clips, n samples, K codebooks, V codes per book, T frames.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moeapps.data.cache import config_hash
from moeapps.files import WholeFile


class Tokenizer(nn.Module, ABC):
    """Codes [B, K, T] of waves [B, n], and waves of codes.

    A frame is `hop` samples: n samples give T = ceil(n / hop) frames, and T frames give T * hop samples. The books are
    in residual order: the first K' < K books of a clip are a coarser description of it, which `decode` takes as well.

    Waves and codes are brought to the tokenizer's own device. A subclass implements `_encode`, `_decode`, `_fit` and
    `settings`.

    Args:
        sample_rate: samples per second of every wave.
        hop: samples per frame.
        num_codebooks: K, codes per frame.
        num_codes: V, codes of each book.

    Raises:
        ValueError: an argument below 1.
    """

    def __init__(self, *, sample_rate: int, hop: int, num_codebooks: int, num_codes: int) -> None:
        super().__init__()
        sizes = {"sample_rate": sample_rate, "hop": hop, "num_codebooks": num_codebooks, "num_codes": num_codes}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{type(self).__name__}: {name}={size}; it must be at least 1")
        self.sample_rate = sample_rate
        self.hop = hop
        self.num_codebooks = num_codebooks
        self.num_codes = num_codes
        self.register_buffer("fitted", torch.tensor(False))

    fitted: Tensor

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain values that say how codes are made; their hash names a tokenizer before it is fitted."""

    @abstractmethod
    def _fit(self, waves: Sequence[Tensor]) -> None:
        """Learn from checked waves float32 [n]."""

    @abstractmethod
    def _encode(self, wave_Bn: Tensor) -> Tensor:
        """Codes int64 [B, K, T] of checked waves float32."""

    @abstractmethod
    def _decode(self, codes_BKT: Tensor) -> Tensor:
        """Waves float32 [B, T * hop] of checked codes; K may be smaller than `num_codebooks`."""

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop

    def num_frames(self, samples: int) -> int:
        """T of a wave of so many samples."""
        return math.ceil(samples / self.hop)

    @property
    def key(self) -> str:
        """Hash of the settings: equal for two tokenizers that a fit to equal waves would make equal."""
        return config_hash(self.settings())

    @property
    def digest(self) -> str:
        """Hash of the settings and of every fitted number: two tokenizers with one digest have the same codes.

        Raises:
            ValueError: nothing is fitted yet.
        """
        self._need_fit()
        return self._digest_of(self.state_dict())

    def fit(self, waves: Sequence[Tensor]) -> Self:
        """Learn the codes from clips, each [n] in floating point; return the tokenizer itself.

        Raises:
            ValueError: no clip, or one that `encode` would refuse.
        """
        if not waves:
            raise ValueError(f"{type(self).__name__}: no wave to fit to; give at least one clip of the training split")
        checked = [self._checked(wave[None], f"wave {place}")[0] for place, wave in enumerate(waves)]
        with self._full_precision():
            self._fit(checked)
        self.fitted.fill_(True)
        return self

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Return codes int64 [B, K, ceil(n / hop)] of waves [B, n].

        Raises:
            ValueError: another shape, no sample, integers, numbers that are not finite, or no fit before.
        """
        self._need_fit()
        wave = self._checked(wave, "wave")
        if not len(wave):
            return wave.new_zeros(0, self.num_codebooks, self.num_frames(wave.shape[1])).long()
        with self._full_precision():
            return self._encode(wave)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return waves float32 [B, T * hop] of codes int64 [B, K or fewer, T].

        Raises:
            ValueError: another shape, a number that is no code, or no fit before.
        """
        self._need_fit()
        if codes.dim() != 3 or not 1 <= codes.shape[1] <= self.num_codebooks or not codes.shape[2]:
            raise ValueError(
                f"codes of shape {list(codes.shape)}; wanted [clips, 1 to {self.num_codebooks} codebooks, frames >= 1]"
            )
        if codes.is_floating_point():
            raise ValueError(f"codes of type {codes.dtype}; they are whole numbers, as `encode` gives them")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.num_codes):
            raise ValueError(
                f"codes from {int(codes.min())} to {int(codes.max())}; allowed are 0 to {self.num_codes - 1}: take the "
                "frames after a clip's end and the special symbols of the language model out first"
            )
        if not len(codes):
            return torch.zeros(0, codes.shape[2] * self.hop, device=self.fitted.device)
        with self._full_precision():
            return self._decode(codes.long().to(self.fitted.device))

    def save(self, path: Path) -> None:
        """Write settings and tensors as safetensors, whole or not at all.

        Raises:
            ValueError: nothing is fitted yet.
        """
        told = {"settings": json.dumps(self.settings(), sort_keys=True), "digest": self.digest}
        with WholeFile(Path(path)) as temporary:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, temporary, told)

    def load(self, path: Path) -> Self:
        """Take the tensors of a file that a tokenizer with the same settings wrote; return the tokenizer itself.

        Raises:
            ValueError: no such file, a damaged one, or one of other settings.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no tokenizer file {path}; fit one and save it, or give the path of a saved one")
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is no tokenizer file, or a damaged one ({error}); delete it and fit again"
            ) from error
        self._same_settings(told, path)
        own = self.state_dict()
        if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in own.items()}:
            raise ValueError(f"{path} lacks tensors of a {type(self).__name__}, or has others; delete it and fit again")
        if self._digest_of(state) != told.get("digest"):
            raise ValueError(f"{path} is damaged: its tensors are not those that were saved; delete it and fit again")
        self.load_state_dict(state)
        return self

    def _same_settings(self, told: dict[str, str], path: Path) -> None:
        saved: dict[str, Any] = json.loads(told.get("settings", "{}"))
        own: dict[str, Any] = json.loads(json.dumps(self.settings()))
        other = [
            f"{name}={saved.get(name, 'nothing')} (here {own.get(name, 'nothing')})"
            for name in sorted({*saved, *own})
            if saved.get(name) != own.get(name)
        ]
        if other:
            raise ValueError(f"{path} is of a tokenizer with {', '.join(other)}; give its settings or fit a new one")

    def _digest_of(self, state: Mapping[str, Tensor]) -> str:
        return digest_of(state, self.key)

    def _full_precision(self) -> torch.autocast:
        """No bfloat16 in here: it would give a frame other codes than the fit has, and transforms do not know it."""
        return torch.autocast(self.fitted.device.type, enabled=False)

    def _need_fit(self) -> None:
        if not self.fitted:
            raise ValueError(f"this {type(self).__name__} is not fitted; call fit(waves) or load(path) first")

    def _checked(self, wave: Tensor, name: str) -> Tensor:
        if wave.dim() != 2:
            raise ValueError(f"{name} of shape {list(wave.shape)}; wanted [clips, samples], mono")
        if not wave.shape[1]:
            raise ValueError(f"{name} has no sample; leave clips of zero length out")
        if not wave.is_floating_point():
            raise ValueError(f"{name} of type {wave.dtype}; wanted floating point between -1 and 1")
        if not wave.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; repair the recording or leave it out")
        return wave.to(self.fitted.device, torch.float32)


def digest_of(state: Mapping[str, Tensor], key: str = "") -> str:
    """Hash of named tensors, and of a text before them."""
    found = hashlib.sha256(key.encode())
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]
