# SPDX-License-Identifier: Apache-2.0
"""From latents to pixels: an AutoencoderKL that lies in a local folder; an optional extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tasks.image_diffusion.data.readers.latent_files import SCALE


class LatentDecoder(nn.Module):
    """Decode scaled latents with diffusers' AutoencoderKL, z / 0.18215 first.

    Args:
        folder: local folder of the autoencoder (config.json and weights); nothing is downloaded.
        scale: factor the latents were multiplied by.

    Shape:
        latents [N, C, h, w] -> pixels [N, 3, 8h, 8w] in [-1, 1].

    Raises:
        ValueError: no such folder, or diffusers is not installed.
    """

    def __init__(self, folder: Path, scale: float = SCALE) -> None:
        super().__init__()
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json; give the local folder of an AutoencoderKL")
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ValueError("decoding latents needs diffusers: pip install 'moeapps[vae]'") from error
        self.autoencoder: Any = AutoencoderKL.from_pretrained(str(folder), local_files_only=True)
        self.scale = scale

    @torch.no_grad()
    @override
    def forward(self, latent: Tensor) -> Tensor:
        pixels: Tensor = self.autoencoder.decode(latent / self.scale).sample
        return pixels.clamp(-1, 1)
