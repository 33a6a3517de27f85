# SPDX-License-Identifier: Apache-2.0
"""Gates without a gradient: fit them every few steps."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase
from typing import Any, Protocol, cast

import lightning as L
from torch import Tensor
from typing_extensions import override

from moeapps.moe import FittedRouter, MoELayer


class GivesRoutingLosses(Protocol):
    """A task whose routers can be fitted."""

    def routing_losses(self, layer: str, *, needed: bool) -> tuple[Tensor, Tensor | None]:
        """Features [N, d] of ALL training rows and the loss [N, E] of each under each expert alone.

        Args:
            layer: name of the MoE layer.
            needed: whether the losses will be read; None may be given for them where not.
        """


class RouterFit(L.Callback):
    """Fit every ``FittedRouter`` after every few training steps: on process 0, which hands the gate to the others.

    The task must have ``routing_losses``, see :class:`GivesRoutingLosses`; it is called on process 0 alone, so it must
    not wait for others.

    Args:
        every: training steps between two fits, at least 1.
        layers: shell-style pattern on the names of the layers.

    Raises:
        ValueError: ``every`` below 1; at the start of training, no layer with a fitted router, or a task that gives no
            routing losses.
    """

    def __init__(self, every: int = 1, layers: str = "*") -> None:
        if every < 1:
            raise ValueError(
                f"every={every}, but there is at least 1 step between two fits; leave RouterFit out to fit never"
            )
        self.every = every
        self.layers = layers
        self.steps = 0
        self.seconds = 0.0
        self._routers: dict[str, FittedRouter] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps seen, so that a resumed run fits at the same steps."""
        return {"steps": self.steps, "seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.seconds = state_dict["steps"], state_dict["seconds"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._routers = fitted_routers(pl_module, self.layers)
        if not self._routers:
            raise ValueError(f"RouterFit finds no layer like {self.layers!r} with a FittedRouter; leave it out")
        if not hasattr(pl_module, "routing_losses"):
            raise ValueError(f"RouterFit needs {type(pl_module).__name__}.routing_losses(layer, needed=...)")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            start = time.perf_counter()
            for name, router in self._routers.items():
                if trainer.is_global_zero:
                    needed = router.needs_losses
                    features, losses = cast(GivesRoutingLosses, pl_module).routing_losses(name, needed=needed)
                    router.fit(features, losses)
                if trainer.world_size > 1:
                    router.load_state_dict(trainer.strategy.broadcast(router.state_dict()))
            self.seconds += time.perf_counter() - start


def fitted_routers(module: L.LightningModule, layers: str = "*") -> dict[str, FittedRouter]:
    """Return the fitted routers of a module by the names of their layers."""
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, MoELayer) and isinstance(child.router, FittedRouter) and fnmatchcase(name, layers):
            found[name] = child.router
    return found
