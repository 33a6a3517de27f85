# SPDX-License-Identifier: Apache-2.0
"""Layers whose experts are spread over several processes, and what the laws of tests/moe/parallel_laws.py share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from moeapps.moe import (
    ConditionalSplit,
    Dense,
    ExpertChoice,
    GLUExperts,
    GroupLimitedTopK,
    JoinedExperts,
    LinearScore,
    MLPExperts,
    MoELayer,
    Router,
    Slots,
    Stack,
    Sum,
    TableScore,
    TopK,
    TopP,
)
from moeapps.moe.parallel import ExpertParallel
from moeapps.moe.presets.systems import promoe, unimoe_audio

D = 6
ROWS = 20
SIZES = {2: (13, 7), 4: (7, 2, 0, 11)}  # rows of each process; of four one has none
FULL = {2: (13, 7), 4: (7, 2, 5, 6)}


def layer(
    choose: nn.Module, num_experts: int, *, columns: int | None = None, num_shared: int = 0, **options: Any
) -> MoELayer:
    router = Router(LinearScore(D, columns or num_experts), choose)
    bank = MLPExperts(router.num_experts + num_shared, D, 8, activation="tanh")
    return MoELayer(router, bank, num_shared=num_shared, **options)


def of_table(rows: list[list[float]]) -> MoELayer:
    """A layer whose experts are looked up by group: the others are idle."""
    router = Router(TableScore(torch.tensor(rows)), TopK(1, weighing="ones"))
    return MoELayer(router, MLPExperts(len(rows[0]), D, 8))


def two_widths(e: int) -> MoELayer:
    banks = [GLUExperts(e, D, 8), GLUExperts(2, D, 4)]
    return MoELayer(
        Router(LinearScore(D, e), TopK(2)), JoinedExperts(banks), num_shared=2, combiner=Sum(shared="apart")
    )


def learned_activation(e: int) -> MoELayer:
    bank = MLPExperts(e + 2, D, 8, activation=nn.PReLU())
    return MoELayer(Router(LinearScore(D, e), TopK(2)), bank, num_shared=2)


def conditional(e: int) -> MoELayer:
    router = ConditionalSplit(Router(LinearScore(D, e), TopK(2)))
    return MoELayer(router, MLPExperts(router.num_experts + 1, D, 8), num_shared=1)


BY_ROW: dict[str, Callable[[int], MoELayer]] = {
    "top 1": lambda e: layer(TopK(1), e),
    "top 2": lambda e: layer(TopK(2), e),
    "top 2, null experts": lambda e: layer(TopK(2, num_null=2), e, columns=e + 2),
    "top 2, shared": lambda e: layer(TopK(2), e, num_shared=2),
    "top 2, shared apart": lambda e: layer(TopK(2), e, num_shared=2, combiner=Sum(shared="apart")),
    "top 2, shared of another width": two_widths,
    "top 2 at the input": lambda e: layer(TopK(2), e, weight_at="input"),
    "top 2, stacked outputs": lambda e: layer(TopK(2), e, num_shared=1, combiner=Stack()),
    "top 2, gated linear units": lambda e: MoELayer(Router(LinearScore(D, e), TopK(2)), GLUExperts(e, D, 8)),
    "top 2 of 2 groups": lambda e: layer(GroupLimitedTopK(2, num_groups=2, keep_groups=1), 8),
    "top p": lambda e: layer(TopP(0.6), e),
    "top p, null experts": lambda e: layer(TopP(0.6, num_null=2, renormalise=True), e, columns=e + 2),
    "dense, shared": lambda e: layer(Dense(), e, num_shared=1),
    "conditional split": conditional,
    "ProMoE": lambda e: promoe(num_experts=e)(D),
    "UniMoE-Audio": lambda e: unimoe_audio(num_experts=e, jitter=0.0)(D),
    "one expert works": lambda e: of_table([[0.0] * (e - 1) + [1.0]]),
    "a learned activation": learned_activation,
}
BY_BATCH: dict[str, Callable[[int], MoELayer]] = {
    "expert choice": lambda e: layer(ExpertChoice(1.5), e),
    "expert choice, shared": lambda e: layer(ExpertChoice(1.5), e, num_shared=1),
    "slots": lambda e: layer(Slots(2), e, columns=2 * e),
    "slots, shared": lambda e: layer(Slots(2), e, columns=2 * e, num_shared=1),
}


@dataclass
class Place:
    """This process: its rank, the mesh of all, and a folder that all see."""

    rank: int
    mesh: DeviceMesh
    folder: Path

    @property
    def world(self) -> int:
        return self.mesh.size()

    @property
    def num_experts(self) -> int:
        """Not a multiple: 3 + 2 on two processes, 2 + 2 + 2 + 1 on four."""
        return 7 if self.world == 4 else 5

    def own(self, rows: Tensor, sizes: dict[int, tuple[int, ...]] = SIZES) -> Tensor:
        return rows.split(sizes[self.world])[self.rank]


def spread(whole: MoELayer, mesh: DeviceMesh) -> MoELayer:
    return parallelize_module(copy.deepcopy(whole), mesh, ExpertParallel())


def out(layer: MoELayer, x: Tensor, group: Tensor) -> Tensor:
    """What a layer gives, shaped for a probe of its rows."""
    y = layer(x, group=group)
    return (y[0] if isinstance(y, tuple) else y).flatten(1)


def average(module: nn.Module) -> None:
    """What data parallel training does with everything that is whole on each process."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()


def whole_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = whole_tensor(grad)
    return found


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) >= set(wanted), (sorted(found), sorted(wanted))
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
