# SPDX-License-Identifier: Apache-2.0
"""One score of every kind and features for it, for the tests of the routers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeapps.moe import (
    ConstantScore,
    CosineScore,
    LinearScore,
    MLPScore,
    PrototypeScore,
    RandomScore,
    RecurrentScore,
    Score,
    TableScore,
)

D, E = 5, 4


def features(num_rows: int = 12) -> Tensor:
    return torch.randn(num_rows, D, dtype=torch.float64)


SCORES: dict[str, Callable[[], Score]] = {
    "linear": lambda: LinearScore(D, E),
    "linear_bias": lambda: LinearScore(D, E, bias=True),
    "mlp": lambda: MLPScore(D, 7, E),
    "cosine": lambda: CosineScore(D, E),
    "cosine_projected": lambda: CosineScore(D, E, proj_dim=3),
    "prototype": lambda: PrototypeScore(D, E),
    "table": lambda: TableScore(3, E),
    "constant": lambda: ConstantScore(E),
    "random": lambda: RandomScore(E),
    "recurrent": lambda: RecurrentScore(D, E, state_dim=6),
}
