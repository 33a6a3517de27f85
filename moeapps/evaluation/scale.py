# SPDX-License-Identifier: Apache-2.0
"""What a network costs each of many processes: bytes that it exchanges in a step, weights that it holds, arithmetic.

The counts follow from shapes and from how `moeapps.training.parallel.ModelParallel` divides a network, so that a size
that fits on no machine at hand can be asked about. They are compared with the bytes that processes do exchange in
``python -m benchmarks.scale`` and its tests. Not counted: activations, and what a few numbers per layer are (balance
losses, gradient norms, metrics).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from moeapps.moe import JoinedExperts, MoELayer
from moeapps.moe.parallel import STACKS
from moeapps.training.parallel import cut_dimension, spreadable_layers, stays_whole

Kind = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce"]
FLOAT = 4
"""Bytes of a weight, a gradient, and each of AdamW's two moments: float32, also under autocast."""
_COUNT = 8


@dataclass(frozen=True)
class LayerShape:
    """A layer whose routed experts are spread.

    Attributes:
        experts: E, routed ones.
        weights: shapes of the stacked weights, E first.
        width_in: numbers of a row that an expert reads.
        width_out: numbers of a row that an expert writes.
        rows: rows times chosen experts of one process in a step.
        shared: experts in the same bank that every row meets; they are not spread.
    """

    experts: int
    weights: tuple[tuple[int, ...], ...]
    width_in: int
    width_out: int
    rows: int
    shared: int = 0


@dataclass(frozen=True)
class NetworkShape:
    """What the costs of a network follow from.

    Attributes:
        layers: those whose experts may be spread.
        rest: shapes of all other weights.
        flops: arithmetic of one process in a step, two operations per multiply-add, backward included.
    """

    layers: tuple[LayerShape, ...]
    rest: tuple[tuple[int, ...], ...]
    flops: float = 0.0

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(math.prod(shape) for shape in self.rest) + sum(
            (layer.experts + layer.shared) * math.prod(shape[1:]) for layer in self.layers for shape in layer.weights
        )


@dataclass(frozen=True)
class Division:
    """How processes share a network; see `moeapps.training.parallel.ModelParallel`.

    Attributes:
        processes: all of them.
        experts: processes that share the experts of a layer; 1 leaves experts with the rest.
        sharded: the rest is cut over all processes, not replicated.
    """

    processes: int
    experts: int
    sharded: bool

    @property
    def copies(self) -> int:
        """Groups that have all experts, each over its processes."""
        return self.processes // self.experts


@dataclass(frozen=True)
class ProcessCost:
    """What one process does in a step of training; the first, which has the most experts where they do not divide.

    Attributes:
        calls: bytes of each kind of exchange between two processes or more: what is handed in, or comes back where that
            is more (all_gather).
        sent: bytes that leave the process, where each kind is done in a ring, by kind.
        held: bytes of weights, gradients and AdamW's moments that it keeps.
        fetched: bytes of the largest set of whole weights that it has for a while.
        flops: floating point operations.
    """

    calls: dict[Kind, int]
    sent: dict[Kind, float]
    held: int
    fetched: int
    flops: float


def shape_of(net: nn.Module, rows: Callable[[str, MoELayer], int], flops: float = 0.0) -> NetworkShape:
    """Read the shapes off a network, which may be on the meta device.

    Args:
        net: the network.
        rows: (name, layer) -> rows times chosen experts of one process in a step.
        flops: see `NetworkShape`.
    """
    names = {layer: name for name, layer in net.named_modules() if isinstance(layer, MoELayer)}
    layers, spread = [], set()
    for layer in spreadable_layers(net):
        weights, routed = _routed(layer)
        shapes = tuple((routed, *weight.shape[1:]) for weight in weights)
        wide = [weight.shape for weight in weights if weight.dim() == 3]  # [E, D, H], or twice H; [E, H, O]
        shared = len(weights[0]) - routed
        layers.append(LayerShape(routed, shapes, wide[0][1], wide[-1][2], rows(names[layer], layer), shared))
        spread |= set(weights)
    rest = [tuple(parameter.shape) for parameter in net.parameters() if parameter not in spread]
    return NetworkShape(tuple(layers), tuple(rest), flops)


def _routed(layer: MoELayer) -> tuple[list[nn.Parameter], int]:
    """The stacked weights of the bank that holds the routed experts, and how many of its experts are routed."""
    bank = layer.experts.each()[0] if isinstance(layer.experts, JoinedExperts) else layer.experts
    weights = [getattr(bank, name) for name in STACKS if getattr(bank, name, None) is not None]
    return weights, min(layer.num_experts, bank.num_experts)


def cost_of(net: NetworkShape, division: Division, number_bytes: int = FLOAT) -> ProcessCost:
    """Return what a step costs one process.

    Args:
        net: the network and its rows.
        division: how it is shared.
        number_bytes: of a number in the rows that travel: 4, or 2 under autocast.

    Raises:
        ValueError: processes that cannot be divided so.
    """
    if division.processes % division.experts:
        raise ValueError(f"{division.processes} processes cannot be divided into groups of {division.experts}")
    world, share, copies = division.processes, division.experts, division.copies
    rest = list(net.rest)
    mine: list[tuple[int, ...]] = []
    calls: dict[Kind, int] = dict.fromkeys(("all_to_all", "all_gather", "reduce_scatter", "all_reduce"), 0)
    for layer in net.layers:
        if share == 1:
            rest += [(layer.experts + layer.shared, *shape[1:]) for shape in layer.weights]
            continue
        rest += [(layer.shared, *shape[1:]) for shape in layer.weights if layer.shared]
        # Rows go and come back, and their gradients do the same; counts of rows go before, once.
        calls["all_to_all"] += 2 * layer.rows * (layer.width_in + layer.width_out) * number_bytes
        calls["all_to_all"] += _COUNT * layer.experts
        mine += [(math.ceil(layer.experts / share), *shape[1:]) for shape in layer.weights]
    parts = world if division.sharded else 1
    whole = [shape for shape in rest if stays_whole(shape, parts)]
    rest = [shape for shape in rest if not stays_whole(shape, parts)]
    # Of what stays whole processes also tell each other, in a byte, whether they have used it.
    calls["all_reduce"] += sum(FLOAT * math.prod(shape) + 1 for shape in whole) * (world > 1)
    held = 4 * FLOAT * sum(math.prod(shape) for shape in whole)
    fetched = 0
    if division.sharded and world > 1:
        _cut(calls, rest, world)
        held += 4 * FLOAT * sum(_share(shape, world) for shape in rest)
        fetched = FLOAT * sum(math.prod(shape) for shape in rest)
    else:
        calls["all_reduce"] += FLOAT * sum(math.prod(shape) for shape in rest) * (world > 1)
        held += 4 * FLOAT * sum(math.prod(shape) for shape in rest)
    if copies > 1 and mine:
        _cut(calls, mine, copies)
        held += 4 * FLOAT * sum(_share(shape, copies) for shape in mine)
        # A bank is fetched when it is used, and let go after.
        fetched += FLOAT * max(_weights_of(layer, share) for layer in net.layers)
    else:
        held += 4 * FLOAT * sum(math.prod(shape) for shape in mine)
    sent: dict[Kind, float] = {
        "all_to_all": calls["all_to_all"] * (share - 1) / share,
        "all_gather": calls["all_gather"] * (world - 1) / world,
        "reduce_scatter": calls["reduce_scatter"] * (world - 1) / world,
        "all_reduce": 2 * calls["all_reduce"] * (world - 1) / world,
    }
    return ProcessCost(calls, sent, held, fetched, net.flops)


def _weights_of(layer: LayerShape, share: int) -> int:
    return sum(math.ceil(layer.experts / share) * math.prod(shape[1:]) for shape in layer.weights)


def _share(shape: tuple[int, ...], parts: int) -> int:
    """Numbers of the largest part; what does not divide is filled up."""
    dim = cut_dimension(shape, parts)
    return math.ceil(shape[dim] / parts) * math.prod(shape[:dim] + shape[dim + 1 :])


def _cut(calls: dict[Kind, int], shapes: list[tuple[int, ...]], parts: int) -> None:
    """FSDP2 fetches weights for the forward and again for the backward pass, and sums gradients to their parts."""
    padded = FLOAT * sum(parts * _share(shape, parts) for shape in shapes)
    calls["all_gather"] += 2 * padded
    calls["reduce_scatter"] += padded


def flops_of(net: nn.Module, rows: Callable[[str], float], top_k: float, attention: float = 0.0) -> float:
    """Return the arithmetic of a step, backward included: two per weight of a matrix and row, three times.

    Args:
        net: the network, which may be on the meta device.
        rows: name of a weight -> rows that meet it in a step.
        top_k: routed experts of a row.
        attention: multiply-adds of attention's products in a forward pass, which have no weights.
    """
    routed: dict[nn.Parameter, float] = {}
    for layer in spreadable_layers(net):
        weights, count = _routed(layer)
        routed |= {weight: top_k + len(weight) - count for weight in weights}
    total = attention
    for name, parameter in net.named_parameters():
        if parameter in routed:
            total += rows(name) * routed[parameter] * math.prod(parameter.shape[1:]) * (parameter.dim() == 3)
        elif parameter.dim() >= 2 and not _looked_up(net, name):
            total += rows(name) * parameter.numel()
    return 6.0 * total


def _looked_up(net: nn.Module, name: str) -> bool:
    """Whether a weight is a table of which a row is taken."""
    module = net.get_submodule(name.rpartition(".")[0])
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)
