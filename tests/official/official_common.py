# SPDX-License-Identifier: Apache-2.0
"""What the rows of docs/official_code.md are computed with: a registry, and the largest difference of two functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

ERRORS: dict[str, Callable[[], float]] = {}
"""Part of the page's first column -> the largest error found when it is computed anew."""


def part(name: str) -> Callable[[Callable[[], float]], Callable[[], float]]:
    """Enter a function under the name it has in the page."""

    def enter(function: Callable[[], float]) -> Callable[[], float]:
        assert name not in ERRORS, name
        ERRORS[name] = function
        return function

    return enter


def scatter(parameters: Iterable[Tensor], scale: float = 0.7) -> None:
    """Draw every parameter anew, so that no zero of an initialisation hides a term."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn_like(parameter) * scale)


def furthest(found: Tensor, wanted: Tensor, inputs: Iterable[Tensor] = ()) -> float:
    """The largest difference of two outputs, and of their gradients for ``inputs`` and one random probe.

    Each over the largest entry of what is wanted, where that is above 1.
    """
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    pairs = [(found, wanted)]
    variables = list(inputs)
    if variables:
        probe = torch.randn_like(wanted)
        ours, theirs = (
            torch.autograd.grad((y * probe).sum(), variables, retain_graph=True, materialize_grads=True)
            for y in (found, wanted)
        )
        pairs += zip(ours, theirs, strict=True)
    with torch.no_grad():
        return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)
