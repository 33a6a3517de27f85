# SPDX-License-Identifier: Apache-2.0
"""A Descript audio codec that lies in a local folder; an optional extra."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from tasks.audio.nets.tokenizers.base import Tokenizer, digest_of


class LocalDAC(Tokenizer):
    """Tokens of a DAC checkpoint (Kumar et al., arXiv 2306.06546) through transformers' DacModel.

    UniMoE-Audio's own tokens are those of the 16 kHz model: 12 books of 1024 codes, 50 frames per second. The codec
    stays as it is: `fit` changes nothing.

    Args:
        path: local folder in transformers' format (config.json, model.safetensors); nothing is downloaded.
        num_codebooks: how many of its books to use; default all.

    Raises:
        ValueError: no such folder, transformers is not installed, or more books than the codec has.
    """

    def __init__(self, path: Path, *, num_codebooks: int | None = None) -> None:
        path = Path(path)
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json; give the local folder of a DAC in transformers' format")
        if find_spec("transformers") is None:
            raise ValueError("a DAC checkpoint needs transformers: pip install 'moeapps[dac]'")
        from transformers import DacModel

        codec: Any = DacModel.from_pretrained(str(path), local_files_only=True, use_safetensors=True)
        config = codec.config
        if num_codebooks is not None and not 1 <= num_codebooks <= config.n_codebooks:
            raise ValueError(f"num_codebooks={num_codebooks}; the codec in {path} has 1 to {config.n_codebooks} books")
        super().__init__(
            sample_rate=config.sampling_rate,
            hop=config.hop_length,
            num_codebooks=num_codebooks or config.n_codebooks,
            num_codes=config.codebook_size,
        )
        self.codec = codec.eval().requires_grad_(False)
        self.weights = digest_of(self.codec.state_dict())
        self.fitted.fill_(True)

    @override
    def settings(self) -> dict[str, Any]:
        sizes = ("sample_rate", "hop", "num_codebooks", "num_codes")
        told = {size: getattr(self, size) for size in sizes}
        return {"tokenizer": "LocalDAC", "weights": self.weights, **told}

    @override
    def _fit(self, waves: Sequence[Tensor]) -> None:
        """Nothing to learn: the codec is pretrained."""

    @override
    def _encode(self, wave_Bn: Tensor) -> Tensor:
        frames = self.num_frames(wave_Bn.shape[1])
        padded = F.pad(wave_Bn, (0, frames * self.hop - wave_Bn.shape[1]))
        codes: Tensor = self.codec.encode(padded[:, None]).audio_codes
        return codes[:, : self.num_codebooks, :frames]

    @override
    def _decode(self, codes_BKT: Tensor) -> Tensor:
        wave: Tensor = self.codec.decode(audio_codes=codes_BKT).audio_values
        samples = codes_BKT.shape[2] * self.hop
        return F.pad(wave[:, :samples], (0, max(0, samples - wave.shape[1]))).float()
