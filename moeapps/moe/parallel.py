# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism: the routed experts of a layer are spread over processes, and rows travel to them and back.

``parallelize_module(net, mesh, {"*.moe": ExpertParallel()})`` is torch's own way to say it; the mesh, DTensor, the
collectives and the checkpoints are torch's. Every process has rows of its own, as in data parallel training. The router
runs where the rows are; a row is sent once for each expert that it chose, and its weight is applied where it came from,
so that every router, chooser and combiner works as it does in one process.

Importing this module loads torch.distributed.tensor; nothing else of the core needs it.

Shape legend: N rows, M assignments of this process sorted by expert, T rows that came here, E experts, L experts here,
R processes, D and O widths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from typing_extensions import override

from moeapps.moe.activation import resolve_activation
from moeapps.moe.backends import Backend, apply
from moeapps.moe.experts import Experts
from moeapps.moe.feed_forward import FeedForward, counts_on_host
from moeapps.moe.joined import JoinedExperts
from moeapps.moe.layer import MoELayer
from moeapps.moe.routing import Routing

STACKS = ("w_in", "b_in", "w_out", "b_out")


class ExpertParallel(ParallelStyle):
    r"""Spread the routed experts of an :class:`MoELayer` over a mesh dimension of their own.

    Process r of R holds a run of consecutive experts, cut as ``torch.chunk`` cuts (DTensor ``Shard(0)``). Shared
    experts, always the last of the bank, and the router stay whole on every process. A stacked bank that holds routed
    and shared experts becomes two, ``experts.banks.0`` and ``experts.banks.1``; ``one_process_state`` of
    `moeapps.moe.surgery` names their weights as before.

    Gradients are those of data parallel training. An expert gets the sum over the rows of all processes, while data
    parallel training averages over processes: so it is divided by R here. What is whole on every process is averaged
    by whoever does so for the rest of the network (``fully_shard``, or an all-reduce of your own).

    The layer must be called by all processes of the mesh, equally often and in one order; one without rows calls it
    with none.

    Raises:
        TypeError: the module is no MoE layer (when applied).
        ValueError: the mesh has several dimensions, or a process would get no expert, or the bank is not stacked (when
            applied).

    Source: the placement is GShard's (Lepikhin et al., 2020); counts are sent before rows as in Tutel and torchtitan.

    Example:
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from moeapps.moe import LinearScore, MLPExperts, Router, TopK
        >>> layer = MoELayer(Router(LinearScore(8, 4), TopK(2)), MLPExperts(4, 8, 16))
        >>> def spread(mesh: DeviceMesh) -> None:  # on every process
        ...     parallelize_module(layer, mesh["experts"], ExpertParallel())
    """

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MoELayer):
            raise TypeError(
                f"ExpertParallel was given a {type(module).__name__}, but it spreads MoELayer; name those in the plan, "
                "for instance {'blocks.*.moe': ExpertParallel()}."
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"the mesh has the dimensions {device_mesh.mesh_dim_names}; give one of them, such as mesh['experts']."
            )
        banks = list(_parts(module))
        spread = [
            ShardedExperts(bank, device_mesh, backend=module.backend, src_data_rank=self.src_data_rank)
            if routed
            else bank
            for bank, routed in banks
        ]
        if isinstance(module.experts, JoinedExperts):  # also of one bank, so that its parameters keep their names
            module.experts = JoinedExperts(spread)
        else:
            module.experts = SplitExperts(spread) if len(spread) > 1 else spread[0]
        module.backend = "auto"  # what the layer itself does is one exchange; the experts run on theirs
        return module


class ShardedExperts(Experts):
    """A stacked bank of which this process holds some experts; ``grouped`` sends rows to the others' and fetches them.

    Parameters have the names that they have in the bank and are DTensors, sharded over the experts.

    Args:
        bank: all experts, equal on all processes (those of the first process are taken).
        mesh: of one dimension, over whose R processes the experts are spread.
        backend: how the experts here compute.
        src_data_rank: process of the mesh whose weights are taken; None: each takes its part of its own.

    Raises:
        ValueError: for a bank that is not a stacked two-layer network, or fewer experts than processes.

    Example:
        >>> issubclass(ShardedExperts, Experts)
        True
    """

    def __init__(
        self, bank: Experts, mesh: DeviceMesh, *, backend: Backend = "auto", src_data_rank: int | None = 0
    ) -> None:
        super().__init__(bank.num_experts, bank.in_dim, bank.out_dim)
        stack = bank.feed_forward()
        if stack is None:
            raise ValueError(
                f"{type(bank).__name__} are not stacked two-layer experts, which is what can be spread over processes; "
                "use MLPExperts or GLUExperts, or leave this layer out of the plan."
            )
        self.mesh, self.backend, self.gated = mesh, backend, stack.gated
        self.sizes = expert_counts(bank.num_experts, mesh.size())
        self.activation = bank.activation  # under the same name, should it have parameters
        self._flops_per_row = bank.flops_per_row
        for name, whole in bank._parameters.items():  # in its order, which optimizers and checkpoints count by
            placed = None
            if whole is not None:
                values = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=src_data_rank)
                placed = nn.Parameter(values, requires_grad=whole.requires_grad)
            self.register_parameter(name, placed)

    @property
    def own(self) -> range:
        """Ids of the experts that this process holds."""
        rank = self.mesh.get_local_rank()
        first = sum(self.sizes[:rank])
        return range(first, first + self.sizes[rank])

    @property
    def flops_per_row(self) -> int:
        """Forward operations of one expert on one row, as of the whole bank."""
        return self._flops_per_row

    @override
    def grouped(self, x_MD: Tensor, counts: Sequence[int] | Tensor, *side: Tensor) -> Tensor:
        if side:
            raise ValueError(f"stacked experts take no side inputs, but {len(side)} came; concatenate them to x.")
        y_MO: Tensor = self(x_MD, counts)  # a call of the module, for the hooks of ``fully_shard``
        return y_MO

    def forward(self, x_MD: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
        """Send rows sorted by expert to where their experts are, and return what those give, in the same order.

        Args:
            x_MD: rows of this process, sorted by expert.
            counts: E integers that sum to M.
        """
        counts_E = counts_on_host(counts)
        device = x_MD.device.type
        if torch.is_autocast_enabled(device) and x_MD.dtype != torch.float64:
            x_MD = x_MD.to(torch.get_autocast_dtype(device))  # as the experts would: half the bytes on the way
        ends = list(itertools.accumulate(self.sizes))
        sent = [sum(counts_E[end - size : end]) for end, size in zip(ends, self.sizes, strict=True)]
        arriving_RL = self._arriving(counts_E, x_MD.device)
        received: list[int] = arriving_RL.sum(1).tolist()
        x_TD = self._exchange(x_MD, sent, received)
        y_TO = apply(self._stack(), x_TD, _routing(arriving_RL, x_TD), backend=self.backend)
        return self._exchange(y_TO, received, sent)

    @override
    def every(self, x: Tensor, *side: Tensor) -> Tensor:
        """Every expert on every row: each row is sent E times. Slots (E, S, D) are sent once."""
        x_END = x if x.dim() == 3 else x.expand(self.num_experts, *x.shape)
        num = x_END.shape[1]
        y_MO = self.grouped(x_END.flatten(0, 1), [num] * self.num_experts, *side)
        y_NEO: Tensor = y_MO.unflatten(0, (self.num_experts, num)).transpose(0, 1)
        return y_NEO

    @override
    def select(self, ids: Iterable[int]) -> Experts:
        raise ValueError("experts that are spread over processes cannot be selected from; select before spreading.")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights that the whole bank would draw from the present seed, and keep those of the experts here.

        Nothing larger than one expert is made, so that a bank built on the meta device never exists as a whole; and
        each process must have the same seed.
        """
        hidden = cast(Tensor, self.w_out).shape[1]
        fans = {"w_in": self.in_dim, "b_in": self.in_dim, "w_out": hidden, "b_out": hidden}
        for name in STACKS:
            parameter: DTensor | None = getattr(self, name)
            if parameter is None:
                continue
            local = parameter.to_local()
            if local.shape[0] != len(self.own):
                raise ValueError(f"{name} is cut further than by experts; draw the weights before ``fully_shard``.")
            bound = 1 / math.sqrt(fans[name])
            drawn = local.new_empty(parameter.shape[1:])
            for e in range(self.num_experts):
                drawn.uniform_(-bound, bound)
                if e in self.own:
                    local[e - self.own.start] = drawn

    def _arriving(self, counts_E: Sequence[int], device: torch.device) -> Tensor:
        """How many rows come from each process for each expert here, int64 [R, L] on the host."""
        num_here = self.sizes[self.mesh.get_local_rank()]
        told = torch.tensor(counts_E, dtype=torch.int64, device=device)
        heard = all_to_all_single(told, [num_here] * len(self.sizes), self.sizes, self.mesh)
        arriving_RL: Tensor = wait_tensor(heard).cpu().view(-1, num_here)
        return arriving_RL

    def _exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send the first ``sent[0]`` rows to process 0, and so on; returns what came, process after process."""
        came: Tensor = wait_tensor(all_to_all_single(x.contiguous(), received, sent, self.mesh))
        return came

    def _stack(self) -> FeedForward:
        """The experts here, as plain tensors whose gradients are averaged over processes as data parallel does."""
        w_in, b_in, w_out, b_out = (_local(getattr(self, name), len(self.sizes)) for name in STACKS)
        assert w_in is not None
        assert w_out is not None
        activation = resolve_activation(cast(nn.Module, self.activation))
        return FeedForward(w_in, b_in, w_out, b_out, activation, self.gated)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, here={self.own.start}..{self.own.stop - 1}"


class SplitExperts(JoinedExperts):
    """A stacked bank that was cut in two, routed experts and shared ones: only the first are spread.

    Example:
        >>> issubclass(SplitExperts, JoinedExperts)
        True
    """


def split_banks(module: nn.Module) -> list[str]:
    """Return the names of the banks within a network that were cut in two."""
    return [name for name, bank in module.named_modules() if isinstance(bank, SplitExperts)]


def expert_counts(num_experts: int, ranks: int) -> list[int]:
    """How many experts each process gets: as equal as ``torch.chunk`` makes it.

    Raises:
        ValueError: if one would get none.

    Example:
        >>> expert_counts(8, 3)
        [3, 3, 2]
    """
    size = math.ceil(num_experts / ranks)
    counts = [min(size, max(0, num_experts - r * size)) for r in range(ranks)]
    if not all(counts):
        fitting = [n for n in range(1, ranks) if num_experts > (n - 1) * math.ceil(num_experts / n)]
        raise ValueError(
            f"{num_experts} experts on {ranks} processes would be {counts}, and one without an expert cannot take "
            f"part; spread them over {fitting[-1]} processes or fewer."
        )
    return counts


def _parts(layer: MoELayer) -> Iterator[tuple[Experts, bool]]:
    """The banks of a layer, and of each whether it is routed; one that holds both kinds is cut in two."""
    bank = layer.experts
    left = layer.num_experts
    for one in bank.each() if isinstance(bank, JoinedExperts) else [bank]:
        routed = min(left, one.num_experts)
        left -= routed
        if 0 < routed < one.num_experts:
            for ids, kind in ((range(routed), True), (range(routed, one.num_experts), False)):
                part = one.select(ids)
                if isinstance(getattr(one, "activation", None), nn.Module):
                    part.activation = one.activation  # stays one: it may have parameters
                yield part, kind
        else:
            yield one, routed > 0


def _routing(arriving_RL: Tensor, x_TD: Tensor) -> Routing:
    """The routing of what arrived, process after process and sorted by expert within each; weights come later."""
    num_ranks, num_here = arriving_RL.shape
    total = x_TD.shape[0]
    ids_RL = torch.arange(num_here).repeat(num_ranks)
    expert_T = torch.repeat_interleave(ids_RL, arriving_RL.flatten(), output_size=total).to(x_TD.device)
    row_T = torch.arange(total, device=x_TD.device)
    return Routing(row_T, expert_T, x_TD.new_ones(total), num_rows=total, num_experts=num_here, top_k=1)


def _local(parameter: Tensor | None, ranks: int) -> Tensor | None:
    if parameter is None:
        return None
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if local.requires_grad:
        local.register_hook(lambda gradient: gradient / ranks)
    return local
