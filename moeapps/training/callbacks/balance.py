# SPDX-License-Identifier: Apache-2.0
"""Balance without a loss: the selection bias moves once per optimizer step."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
from typing_extensions import override

from moeapps.moe.balance import BiasBalancer
from moeapps.training.task import BaseTask


class BiasBalancing(L.Callback):
    """Lower the selection bias of overloaded experts and raise that of underloaded ones after every optimizer step.

    The layers need a chooser with a bias (``TopK(..., balance_bias=True)``). Counts are summed over micro-batches and
    processes.

    Args:
        rate: step of the bias in units of the score, > 0.
        layers: shell-style pattern on the names of the layers.

    Raises:
        ValueError: rate is not above 0; at the start of training, no layer has a bias, or one has several.

    Source: Wang et al. (2024), auxiliary-loss-free load balancing.
    """

    def __init__(self, rate: float = 1e-3, layers: str = "*") -> None:
        if not rate > 0:
            raise ValueError(f"rate={rate} does not balance; use a number above 0 or leave BiasBalancing out")
        self.rate = rate
        self.layers = layers
        self._step = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._balancer = BiasBalancer(pl_module, self.rate, self.layers)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the counts of the micro-batch and, if the optimizer has stepped, move the biases."""
        self._balancer.add(cast(BaseTask, pl_module).last_records)
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._balancer.step()
