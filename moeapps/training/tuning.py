# SPDX-License-Identifier: Apache-2.0
"""Tuning that leaves no trace: train a copy's worth of steps on a model, score it, and have the old one back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch

from torch import nn


def tuned_parameters(task: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters of which the name fits a shell pattern."""
    return [p for name, p in task.named_parameters() if any(fnmatch(name, pattern) for pattern in patterns)]


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back into training or evaluation mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def restored(task: nn.Module) -> Iterator[None]:
    """Put weights, buffers, modes and ``requires_grad`` back at the end."""
    state = {name: value.detach().clone() for name, value in task.state_dict().items()}
    wanted = [(parameter, parameter.requires_grad) for parameter in task.parameters()]
    with kept_modes(task):
        try:
            yield
        finally:
            task.load_state_dict(state)
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)
                parameter.grad = None
