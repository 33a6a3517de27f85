# SPDX-License-Identifier: Apache-2.0
"""Weight decay where experts are stacked: which parameters are matrices, seen from one expert.

The usual rule, "decay what has two dimensions or more", reads the number of experts as a dimension: it would decay the
biases (E, F) and gains of a bank, and keeping them as (E, 1, F) would not help. The rule holds per expert.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moeapps.moe.experts import Experts


def decay_groups(module: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a network for an optimizer: matrices decay, vectors and scalars do not.

    A parameter of a bank of experts counts as one expert sees it, without the first dimension and those of length 1.

    Args:
        module: any network; its banks are found.
        weight_decay: of the matrices.

    Returns:
        Two groups, ``{"params", "weight_decay"}``; the second has no decay. A group without parameters is left out.

    Raises:
        ValueError: a negative decay, or nothing to train.

    Example:
        >>> from moeapps.moe import MLPExperts
        >>> [[tuple(p.shape) for p in group["params"]] for group in decay_groups(MLPExperts(4, 8, 16))]
        [[(4, 8, 16), (4, 16, 8)], [(4, 16), (4, 8)]]
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay}, but it must be 0 or more.")
    stacked = {id(p) for bank in module.modules() if isinstance(bank, Experts) for p in bank.parameters(recurse=False)}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            own = [n for n in parameter.shape[1:] if n > 1] if id(parameter) in stacked else parameter.shape
            (matrices if len(own) >= 2 else others).append(parameter)
    if not matrices and not others:
        raise ValueError("no parameter is trainable; leave at least one with requires_grad.")
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
