# SPDX-License-Identifier: Apache-2.0
"""The cost of a method at test time in passes of images through networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tasks.adaptation.nets.backbones import Backbone


@dataclass
class Passes:
    """How many images went through a backbone.

    Attributes:
        forward: images times networks.
        backward: those of them that a gradient went back through.
    """

    forward: int = 0
    backward: int = 0

    @staticmethod
    @contextmanager
    def of(net: nn.Module) -> Iterator[Passes]:
        """Count what goes through the backbones of a network inside the block."""
        passes = Passes()

        def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            images = len(inputs[0])
            passes.forward += images
            passes.backward += images if torch.is_grad_enabled() and output.requires_grad else 0

        handles = [part.register_forward_hook(note) for part in net.modules() if isinstance(part, Backbone)]
        try:
            yield passes
        finally:
            for handle in handles:
                handle.remove()
