# SPDX-License-Identifier: Apache-2.0
"""One chooser of every kind, logits for it, and its routing as a table of rows and choices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeapps.moe import (
    Capped,
    Chooser,
    Dense,
    DenseToSparse,
    ExpertChoice,
    GatedShared,
    GroupLimitedTopK,
    Routing,
    Slots,
    SparseMixer,
    Threshold,
    TopK,
    TopP,
)

E = 6


def bound(choose: Chooser, columns: int = E) -> Chooser:
    choose.bind(columns)
    return choose


def logits(num_rows: int = 40, columns: int = E, scale: float = 1.5) -> Tensor:
    return (torch.randn(num_rows, columns, dtype=torch.float64) * scale).requires_grad_()


def ids(routing: Routing) -> Tensor:
    assert routing.top_k is not None
    return routing.expert_M.view(routing.num_rows, routing.top_k)


def weights(routing: Routing) -> Tensor:
    return routing.weight_M.view(routing.num_rows, -1)


CHOOSERS: dict[str, Callable[[], Chooser]] = {
    "softmax": lambda: TopK(2),
    "topk_softmax": lambda: TopK(2, weighing="topk_softmax"),
    "sigmoid": lambda: TopK(3, weighing="sigmoid", scale=2.0),
    "switch": lambda: TopK(1),
    "identity": lambda: TopK(2, weighing="identity"),
    "ones": lambda: TopK(2, weighing="ones"),
    "bias": lambda: TopK(2, balance_bias=True),
    "null": lambda: TopK(3, num_null=2),
    "null_redistributed": lambda: TopK(3, num_null=2, null_mass="redistributed"),
    "null_topk_softmax": lambda: TopK(3, weighing="topk_softmax", num_null=2, null_mass="redistributed"),
    "groups": lambda: GroupLimitedTopK(2, num_groups=3, keep_groups=2),
    "top_p": lambda: TopP(0.6),
    "top_p_null": lambda: TopP(0.6, num_null=2, renormalise=True),
    "sparse_mixer": lambda: SparseMixer(2, draws=False),
    "sparse_mixer_null": lambda: SparseMixer(p=0.6, num_null=2, draws=False),
    "capped": lambda: Capped(TopK(3), 0.8, minimum=1),
    "capped_null": lambda: GatedShared(Capped(TopP(0.6, num_null=1, renormalise=True), 0.5, minimum=2), 1),
    "gated_shared": lambda: GatedShared(TopP(0.6, num_null=1, renormalise=True), 1),
    "expert_choice": lambda: ExpertChoice(1.5),
    "expert_choice_group": lambda: ExpertChoice(1.0, per="group", weighing="identity"),
    "expert_choice_rows": lambda: ExpertChoice(1.5, per="group", weighing="row_softmax"),
    "threshold": lambda: Threshold(1.5),
    "race": lambda: Threshold(1.5, scope="pairs", weighing="identity"),
    "dense": lambda: Dense(),
    "dense_sigmoid": lambda: Dense("sigmoid", allowed=[True] * (E - 1) + [False]),
    "dense_to_sparse": lambda: DenseToSparse(0.1),
    "slots": lambda: Slots(2),
}
