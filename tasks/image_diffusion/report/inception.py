# SPDX-License-Identifier: Apache-2.0
"""The features of the real FID: Inception's, by torchmetrics and torch-fidelity, from a weight file of the user."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeapps.files import absent


class InceptionFeatures(nn.Module):
    """2048 features of the FID's Inception network.

    torchvision's Inception weights are NOT those of the FID. The file is unpickled: use one that you trust.

    Args:
        weights: local file of torch-fidelity's Inception weights; nothing is downloaded.

    Raises:
        ValueError: no such file, or torch-fidelity is not installed; at construction, that is before any training.
    """

    num_features = 2048

    def __init__(self, weights: Path) -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise ValueError(
                f"inception weights: {absent(Path(weights))}; give torch-fidelity's weight file on this machine, or "
                "leave `inception` out and judge by our own classifier"
            )
        if find_spec("torch_fidelity") is None:
            raise ValueError("the real FID needs torch-fidelity: pip install 'moeapps[fid]'")
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric: Any = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(weights))
        self.network: nn.Module = metric.inception
        self.key = f"inception-{Path(weights).name}"

    @torch.no_grad()
    def features(self, image: Tensor, batch_size: int = 64) -> Tensor:
        """Features [N, 2048] of images [N, 1 or 3, H, W] in [-1, 1]; the network scales them to 299 itself."""
        pixels = (127.5 * image + 128).clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        return torch.cat([self.network(part).flatten(1).cpu() for part in pixels.split(batch_size)])
