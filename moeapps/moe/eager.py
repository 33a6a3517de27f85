# SPDX-License-Identifier: Apache-2.0
"""Keep ``torch.compile`` out of the dispatch, whose sizes differ from batch to batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def runs_eagerly(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that a compiled caller runs as it is, with one break in its graph.

    Traced instead, the rows per expert would be constants of the graph, and every routing would compile anew.
    ``torch.compiler.disable`` says the same, but imports the compiler, which takes as long as importing torch; here
    that waits until something is compiled.
    """
    disabled: dict[str, Callable[P, T]] = {}

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if "function" not in disabled:
            disabled["function"] = torch.compiler.disable(function)
        return disabled["function"](*args, **kwargs)

    return wrapper
