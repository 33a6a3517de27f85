# SPDX-License-Identifier: Apache-2.0
"""What a task adds to be used outside of training: answers to raw inputs, and a program of tensors."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn


class Program(NamedTuple):
    """What ``torch.export`` writes of a task: a module, tensors to trace it with, and what it is.

    Args:
        module: takes the tensors in order and returns one.
        inputs: name -> example, of batch size 3.
        covers: one sentence: what the module computes, and what remains outside.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    covers: str


class AnswersInputs:
    """The part of a task that `moeapps.load` and ``moeapps export`` ask for; a subclass overrides what differs."""

    def answer_inputs(self, batches: list[Any]) -> Any:
        """Return what ``moeapps.load(run).predict`` gives for the batches of its inputs."""
        (batch,) = batches
        return cast(Any, self).predict_step(batch, 0, 0)

    def program(self) -> Program | str:
        """Return a part of the network as a module of tensors, for ``torch.export``; or a sentence: why there is none.

        Sizes come from ``facts`` and the network alone.
        """
        return f"{type(self).__name__} does not say which part of its network is a graph of operations on tensors."
