# SPDX-License-Identifier: Apache-2.0
"""Balance without a loss: the selection bias moves once per optimizer step."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.moe.balance import CountAccumulator, update_bias
from moeapps.moe.layer import MoELayer
from moeapps.moe.routers import TopK
from moeapps.training.task import BaseTask


class BiasBalancing(L.Callback):
    """Lower the selection bias of overloaded experts and raise that of underloaded ones after every optimizer step.

    The layers need a chooser with a bias (``TopK(..., balance_bias=True)``). Counts are summed over micro-batches and
    processes.

    Args:
        rate: step of the bias in units of the score, > 0.
        layers: shell-style pattern on the names of the layers.

    Raises:
        ValueError: rate is not above 0; at the start of training, no layer has a bias.

    Source: Wang et al. (2024), auxiliary-loss-free load balancing.
    """

    def __init__(self, rate: float = 1e-3, layers: str = "*") -> None:
        if not rate > 0:
            raise ValueError(f"rate={rate} does not balance; use a number above 0 or leave BiasBalancing out")
        self.rate = rate
        self.layers = layers
        self._counts = CountAccumulator()
        self._choosers: dict[str, TopK] = {}
        self._step = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._choosers = {}
        for layer, module in pl_module.named_modules():
            if isinstance(module, MoELayer) and fnmatchcase(layer, self.layers):
                for chooser in module.router.modules():
                    if isinstance(chooser, TopK) and chooser.bias is not None:
                        self._choosers[layer] = chooser
        if not self._choosers:
            raise ValueError(
                f"BiasBalancing finds no layer like {self.layers!r} with a bias; set balance_bias: true in its router"
            )
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the counts of the micro-batch and, if the optimizer has stepped, move the biases."""
        records = cast(BaseTask, pl_module).last_records
        self._counts.add(record for record in records if record.name in self._choosers)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        with torch.no_grad():
            for name, counts_E in self._counts.totals().items():
                bias_E = cast(Tensor, self._choosers[name].bias)
                # Experts that are not chosen but given (fixed groups) come after the chosen ones and have no bias.
                bias_E.copy_(update_bias(bias_E, counts_E[: len(bias_E)], self.rate))
        self._counts.reset()
