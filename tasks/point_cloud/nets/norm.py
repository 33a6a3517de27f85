# SPDX-License-Identifier: Apache-2.0
"""Batch norm that also trains on a single row."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d``, but a single row, which has no variance, is normalised by the running statistics.

    A small object, or the tile of a stray point, is one voxel at the coarsest resolution; alone in its batch it would
    end the training.
    """

    def forward(self, x_ND: Tensor) -> Tensor:
        """Normalise [N, D] over its rows."""
        if self.training and len(x_ND) == 1:
            return F.batch_norm(x_ND, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x_ND)
