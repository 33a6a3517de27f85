# SPDX-License-Identifier: Apache-2.0
"""Classify points against class names: one head for all label sets.

Shape legend: N voxels, M those of one domain, D width, T of text space, C classes of
one domain, V names of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tasks.point_cloud.nets.text import TextVectors, normalise_name

_SHORTEST = 1e-12
"""Shorter vectors are divided by this, as ``torch.nn.functional.normalize`` does."""


class LanguageHead(nn.Module):
    """Cosine match of projected features with frozen text vectors of the class names.

    z = normalise(W f + b);  logits_c = scale * <z, t_c>, over the label set of the scan's domain. A name shared by two
    label sets is one vector, hence one target. Label sets are lists of names: entry c is class index c.

    Args:
        dim: width D of the features.
        label_sets: for each domain its class names, in the order of its class indices.
        text: provider of text vectors.
        scale: factor of the cosine, > 0 (paper: CLIP's frozen exp(logit_scale), about 100).
        learn_scale: train the logarithm of ``scale``; the paper keeps it fixed.

    Raises:
        ValueError: A label set is empty or repeats a name, ``scale`` <= 0, or the provider lacks a name.

    Source: UVA-Computer-Vision-Lab/point_moe ``pointcept/models/point_prompt_training`` (v3m1). There the columns of
    two data sets are sorted by vocabulary and so paired with the wrong names; here order and names come from one list.
    """

    text_VD: Tensor

    def __init__(
        self,
        dim: int,
        label_sets: Mapping[str, Sequence[str]],
        text: TextVectors,
        *,
        scale: float = 100.0,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"scale={scale}: the factor of the cosine is positive")
        for domain, names in label_sets.items():
            if not names or len({normalise_name(name) for name in names}) != len(names):
                raise ValueError(f"label set of {domain!r} is empty or repeats a name: {list(names)}")
        vocabulary = list(dict.fromkeys(normalise_name(name) for names in label_sets.values() for name in names))
        self.label_sets = {domain: tuple(names) for domain, names in label_sets.items()}
        self.columns = {
            domain: [vocabulary.index(normalise_name(name)) for name in names] for domain, names in label_sets.items()
        }
        self.linear = nn.Linear(dim, text.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)
        # Not in the state dict: made from names at construction, so a checkpoint may answer in new label sets.
        self.register_buffer("text_VD", text.encode(vocabulary), persistent=False)

    def forward(self, features_ND: Tensor, domain: str) -> Tensor:
        """Logits over the label set of ``domain``: [N, D] -> [N, C]."""
        (logits_NC,) = self.split(features_ND, [(domain, len(features_ND))])
        return logits_NC

    def split(self, features_ND: Tensor, parts: Sequence[tuple[str, int]]) -> list[Tensor]:
        """Logits of consecutive rows, part by part: those of `forward`.

        Text space is far wider than features and label sets, so nothing but the projection is as wide: its length and
        the scale are factors of the logits, and parts are cut from it, not gathered.

        Args:
            features_ND: rows, those of one domain after those of another.
            parts: domain and number of rows of each part, N in all.

        Raises:
            ValueError: Unknown domain.
        """
        for domain, _ in parts:
            if domain not in self.columns:
                raise ValueError(f"no label set for domain {domain!r}: the head knows {', '.join(self.columns)}")
        y_NT = self.linear(features_ND)
        return [
            self._match(y_MT, self.text_VD[self.columns[domain]])
            for (domain, _), y_MT in zip(parts, y_NT.split([rows for _, rows in parts]), strict=True)
        ]

    def _match(self, y_MT: Tensor, text_CT: Tensor) -> Tensor:
        """Logits of one part; its length is taken here and not of all rows, since its gradient is as wide as they."""
        length_M1 = torch.linalg.vector_norm(y_MT, dim=1, keepdim=True).clamp_min(_SHORTEST)
        logits_MC: Tensor = (y_MT @ text_CT.T) * (self.log_scale.exp() / length_M1)
        return logits_MC
