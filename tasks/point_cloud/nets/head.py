# SPDX-License-Identifier: Apache-2.0
"""Classify points against class names: one head for all label sets.

Shape legend: N voxels, D width, C classes of one domain, V names of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.point_cloud.nets.text import TextVectors, normalise_name


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

    def project(self, features_ND: Tensor) -> Tensor:
        """Unit vectors z in text space: [N, text.dim], to match against any label set."""
        return F.normalize(self.linear(features_ND), dim=-1)

    def classify(self, z_ND: Tensor, domain: str) -> Tensor:
        """Logits of projected points over the label set of ``domain``: [N, C].

        Raises:
            ValueError: Unknown domain.
        """
        if domain not in self.columns:
            raise ValueError(f"no label set for domain {domain!r}: the head knows {', '.join(self.columns)}")
        logits_NC: Tensor = self.log_scale.exp() * z_ND @ self.text_VD[self.columns[domain]].T
        return logits_NC

    def forward(self, features_ND: Tensor, domain: str) -> Tensor:
        """Logits over the label set of ``domain``: [N, D] -> [N, C]."""
        return self.classify(self.project(features_ND), domain)
