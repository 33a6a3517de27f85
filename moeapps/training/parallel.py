# SPDX-License-Identifier: Apache-2.0
"""A network over several processes: Lightning's ModelParallelStrategy, told in a config what lies where."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed as dist
from torch import nn
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from moeapps.moe import JoinedExperts, MoELayer
from moeapps.training.checkpoints import PARTS, SPLIT, CheckpointError, parts_folders, read_checkpoint, write_checkpoint
from moeapps.training.placement import placement_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

log = logging.getLogger("moeapps")

STATES: tuple[str, ...] = ("state_dict", "current_model_state")
_FILL = 4
"""Up to how many times its length a first dimension is filled up before a weight rather stays whole."""
STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class ModelParallel(ModelParallelStrategy):
    """Spread experts over processes, and replicate or shard everything else; every process has a batch of its own.

    The engines are torch's: ``ExpertParallel`` by ``parallelize_module`` for the experts of every MoE layer, and
    ``fully_shard`` (FSDP2) for the rest, over all processes. Where the experts are spread over fewer processes than
    there are, ``fully_shard`` cuts them further over the others. Checkpoints are written in parts by
    torch.distributed.checkpoint and read by any number of processes, also one.

    Args:
        experts: processes that share the experts of a layer; ``node`` takes those of one machine, 1 leaves experts
            with the rest.
        rest: whether everything else is ``replicated``, gradients averaged, or ``sharded``: weights, gradients and
            optimizer states cut over all processes, fetched when needed.
        blocks: patterns on names of modules that are fetched one after the other where the rest is sharded; a block
            must be used by calling it. None fetches all at once.
        process_group_backend: as of torch; None takes nccl on GPUs and gloo on CPUs.
        timeout: seconds after which a process that waits for another gives up.

    Raises:
        ValueError: for a number of processes below 1, or another value of ``rest``; when started, if the processes
            cannot be divided so, or float16 is asked for.

    Source: the division of work is GShard's and torchtitan's.
    """

    def __init__(
        self,
        experts: int | Literal["node"] = "node",
        rest: Literal["replicated", "sharded"] = "replicated",
        blocks: list[str] | None = None,
        process_group_backend: str | None = None,
        timeout: float | None = None,
    ) -> None:
        if experts != "node" and experts < 1:
            raise ValueError(f"experts={experts} is not allowed; use 'node', or a number of processes from 1 on")
        if rest not in ("replicated", "sharded"):
            raise ValueError(f"rest={rest!r} is unknown; use replicated or sharded")
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=default_pg_timeout if timeout is None else timedelta(seconds=timeout),
        )
        self.experts, self.rest, self.blocks = experts, rest, list(blocks or [])
        self._averaged: list[nn.Parameter] = []
        self._told = False

    @override
    def setup_environment(self) -> None:
        total = self.num_nodes * self.num_processes
        share = self.num_processes if self.experts == "node" else self.experts
        if total % share:
            raise ValueError(
                f"{total} processes cannot be divided into groups of experts={share}; give a divisor, or 'node'"
            )
        if getattr(self.precision_plugin, "scaler", None) is not None:  # one factor for gradients on several meshes
            raise ValueError(
                "float16 scales the loss, which is not for networks in parts; give --trainer.precision bf16-mixed"
            )
        self._data_parallel_size, self._tensor_parallel_size = total // share, share
        super().setup_environment()

    def spread(self, task: nn.Module) -> None:
        """Place a task whose weights are whole on every process; those of the first are taken."""
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        if not isinstance(task, FSDPModule):
            task.to(self.root_device)
            for tensor in (*task.parameters(), *task.buffers()):
                dist.broadcast(tensor.detach(), 0)
            if getattr(task, "stays_whole", False):
                self._tell_whole(task)
            else:
                self.place(task, self.device_mesh)
                for step in STEPS:
                    register_fsdp_forward_method(task, step)
        self._averaged = [parameter for parameter in task.parameters() if placement_of(parameter) is None]

    def _tell_whole(self, task: nn.Module) -> None:
        if self.is_global_zero and not self._told:
            log.info("%s uses its network between steps: all of it stays on every process", type(task).__name__)
        self._told = True

    @override
    def post_backward(self, closure_loss: torch.Tensor) -> None:
        """Average the gradients of what lies whole on every process, which ``fully_shard`` does not know."""
        super().post_backward(closure_loss)
        average_gradients(self._averaged)

    def place(self, task: nn.Module, mesh: DeviceMesh) -> None:
        """Cut a task, and keep the part of this process; no value is looked at, so that it may be on the meta device.

        Args:
            task: a network, equal on all processes.
            mesh: of all processes: ``data_parallel`` copies of groups whose ``tensor_parallel`` processes share the
                experts.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        device, world = mesh.device_type, mesh.size()
        apart = _spread_experts(task, mesh)
        apart |= _whole(task, world if self.rest == "sharded" else 1, apart)
        if self.rest == "sharded":
            rest, parts = init_device_mesh(device, (world,), mesh_dim_names=("all",)), world
        else:  # FSDP2's hybrid form with one shard: whole on every process, gradients averaged
            rest, parts = init_device_mesh(device, (world, 1), mesh_dim_names=("copies", "shards")), 1
        # Resharded after each step, so that what lies in `parameters()` between steps is what the optimizer knows.
        options: dict[str, Any] = {"mesh": rest, "reshard_after_forward": True, "ignored_params": apart}
        options["shard_placement_fn"] = partial(_cut, parts=parts)
        for block in self._named_blocks(task):
            fully_shard(block, **options)
        fully_shard(task, **options)
        # What one process did not use another may have: each takes part, with zeros.
        cast(FSDPModule, task).set_reduce_scatter_unused_params(True)

    def _named_blocks(self, task: nn.Module) -> Iterator[nn.Module]:
        """Modules that a pattern names, inner ones first."""
        named = dict(task.named_modules())
        for pattern in self.blocks:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ValueError(f"blocks: no module is named like {pattern!r}; correct or remove it")
        for name in sorted(named, key=lambda name: -name.count(".")):
            if any(fnmatchcase(name, pattern) for pattern in self.blocks):
                yield named[name]

    # Checkpoints --------------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        from moeapps.moe.parallel import split_banks
        from moeapps.training.parts import save_parts

        rest = {**checkpoint, SPLIT: split_banks(cast(nn.Module, self.model))}
        states: dict[str, Any] = {name: rest.pop(name) for name in STATES if name in rest}
        states |= {f"optimizer_{i}": state for i, state in enumerate(rest.pop("optimizer_states", []))}
        path, number = self.broadcast((Path(filepath), secrets.token_hex(4)))
        folder = path.with_name(f"{path.name}.parts-{number}")
        save_parts(states, folder)
        if self.is_global_zero:
            write_checkpoint({**rest, PARTS: folder.name}, path)
            for older in parts_folders(path):
                if older != folder:
                    shutil.rmtree(older)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import (
            get_model_state_dict,
            get_optimizer_state_dict,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        from moeapps.training.parts import load_parts

        path = Path(self.broadcast(checkpoint_path))
        held = read_checkpoint(path, weights=False)
        if PARTS not in held:
            raise CheckpointError(
                f"{path} was written by one process; begin a spread training with its weights (model.init_args.start), "
                "or go on with it in one process"
            )
        model = cast(nn.Module, self.model)
        fitting = cast(Any, self.lightning_module).trainer.state.fn == TrainerFn.FITTING
        optimizers = self.optimizers if fitting else []
        states: dict[str, Any] = {"state_dict": get_model_state_dict(model)}
        if held.get("averaging_state") is not None and fitting:
            states["current_model_state"] = {k: v.clone() for k, v in states["state_dict"].items()}
        for i, optimizer in enumerate(optimizers):
            states[f"optimizer_{i}"] = get_optimizer_state_dict(model, optimizer)
        load_parts(states, path.parent / Path(str(held[PARTS])).name)
        set_model_state_dict(model, states["state_dict"])
        for i, optimizer in enumerate(optimizers):
            set_optimizer_state_dict(model, optimizer, states[f"optimizer_{i}"])
        return held | {name: states[name] for name in STATES if name in states}


def _spread_experts(task: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Spread the experts, and return the weights that ``fully_shard`` must leave as they are."""
    copies, share = mesh["data_parallel"], mesh["tensor_parallel"]
    if share.size() == 1:
        return set()
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    from moeapps.moe.parallel import ExpertParallel, ShardedExperts

    for layer in spreadable_layers(task):
        parallelize_module(layer, share, ExpertParallel())
    banks = [module for module in task.modules() if isinstance(module, ShardedExperts)]
    if copies.size() == 1:
        return {parameter for bank in banks for parameter in bank.parameters(recurse=False)}
    for bank in banks:
        fully_shard(bank, mesh=copies, shard_placement_fn=partial(_cut, parts=copies.size(), sizes=bank.sizes))
    return set()


def _cut(parameter: nn.Parameter, *, parts: int, sizes: Sequence[int] = ()) -> Shard:
    """Where ``fully_shard`` cuts a parameter: along the first dimension, if that gives every part as much.

    Where it does not (a stack of 8 experts in 64 parts: 56 would have nothing), along the longest that does.

    Args:
        parameter: to be cut.
        parts: how many.
        sizes: first dimensions of what is cut, where that is a part of the parameter already.
    """
    from torch.distributed.tensor import Shard

    return Shard(cut_dimension(parameter.shape, parts, sizes))


def cut_dimension(shape: Sequence[int], parts: int, sizes: Sequence[int] = ()) -> int:
    """Return the dimension of `_cut`.

    Example:
        >>> cut_dimension((16, 6), 4), cut_dimension((2, 4, 8), 4), cut_dimension((2, 6, 5), 4)
        (0, 2, 0)
    """
    even = all(size % parts == 0 for size in sizes or shape[:1])
    dims = [dim for dim in range(1, len(shape)) if shape[dim] % parts == 0]
    return 0 if even or not dims else max(dims, key=lambda dim: shape[dim])


def stays_whole(shape: Sequence[int], parts: int) -> bool:
    """Whether a weight stays whole on every process: a number, and a short stack that nothing cuts.

    FSDP2 fills up a first dimension that is shorter than the number of parts: two shared experts over 1024 processes
    would be fetched as 1024. Up to four times its length is worth it: 27 taps of a kernel over 64 are cut.

    Example:
        >>> stays_whole((), 4), stays_whole((2, 6, 5), 16), stays_whole((2, 6, 32), 16), stays_whole((27, 9, 9), 64)
        (True, True, False, False)
    """
    return not shape or (len(shape) > 1 and _FILL * shape[0] < parts and cut_dimension(shape, parts) == 0)


def _whole(task: nn.Module, parts: int, but: set[nn.Parameter]) -> set[nn.Parameter]:
    """Parameters that stay whole, which ``fully_shard`` must leave alone."""
    from torch.distributed.tensor import DTensor

    rest = (parameter for parameter in task.parameters() if parameter not in but and not isinstance(parameter, DTensor))
    return {parameter for parameter in rest if stays_whole(parameter.shape, parts)}


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes, which must all call, with the same parameters in the same order.

    A process may have used only some of them: the others count as zeros there. What no process has used keeps no
    gradient, so that the optimizer leaves it alone as in one process.
    """
    held = [parameter for parameter in parameters if parameter.requires_grad]
    if not held:
        return
    used = torch.tensor([parameter.grad is not None for parameter in held], dtype=torch.uint8, device=held[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    for parameter, anywhere in zip(held, used.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def spreadable_layers(module: nn.Module) -> list[MoELayer]:
    """MoE layers whose routed experts are a stack, of several."""
    found = []
    for layer in module.modules():
        if isinstance(layer, MoELayer) and layer.num_experts > 1:
            banks = layer.experts.each() if isinstance(layer.experts, JoinedExperts) else [layer.experts]
            if banks[0].feed_forward() is not None:
                found.append(layer)
    return found
