# SPDX-License-Identifier: Apache-2.0
"""What several processes with spread experts must do, each law a function; run by tests/moe/test_parallel.py.

``python -m tests.moe.parallel_laws WORLD FOLDER`` imports torch once, forks WORLD processes and writes what became of
each law to FOLDER/<rank>.json. The oracle is the layer as it was before it was spread, in one process, on the rows of
all.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from moeapps.moe import JoinedExperts, MLPExperts, MoELayer, NormalisedExperts, TopK
from moeapps.moe.parallel import ExpertParallel, ShardedExperts, split_banks
from moeapps.moe.surgery import one_process_state
from tests.moe.parallel_balance import (
    balance_is_of_the_global_batch,
    balance_over_accumulated_batches,
    bias_balancing_counts_all,
    routing_metrics_are_of_all_rows,
    thresholds_follow_the_joint_batch,
)
from tests.moe.parallel_common import (
    BY_BATCH,
    BY_ROW,
    FULL,
    ROWS,
    SIZES,
    D,
    Place,
    average,
    equal,
    gradients,
    layer,
    out,
    spread,
    whole_tensor,
)


def equals_one_process(place: Place, make: Callable[[int], MoELayer], dtype: torch.dtype, *, by_row: bool) -> None:
    """Outputs, and gradients of rows and of all parameters."""
    torch.manual_seed(1)
    whole = make(place.num_experts).to(dtype)
    x = torch.randn(ROWS, D, dtype=dtype)
    group = torch.arange(len(x)) % 3 - 1
    sizes = SIZES if by_row else FULL  # experts, or slots, cannot choose among no rows
    mine, rows = spread(whole, place.mesh), place.own(x, sizes).clone().requires_grad_()
    x.requires_grad_()
    parts = [(x, group)] if by_row else zip(x.split(FULL[place.world]), group.split(FULL[place.world]), strict=True)
    y = torch.cat([out(whole, part, ids) for part, ids in parts])
    probe = torch.randn(y.shape, dtype=dtype)
    ((y * probe).sum() / place.world).backward()

    y_mine = out(mine, rows, place.own(group, sizes))
    (y_mine * place.own(probe, sizes)).sum().backward()
    average(mine)

    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    found = {"y": y_mine, "x": rows.grad / place.world}
    equal(found, {"y": place.own(y, sizes), "x": place.own(x.grad, sizes)}, tolerance)
    equal(one_process_state(gradients(mine), split_banks(mine)), gradients(whole), tolerance)
    assert any(isinstance(parameter, DTensor) for parameter in mine.parameters())


def digests(stack: list[Tensor]) -> list[str]:
    """One digest for each expert of a stack of weights."""
    return [
        hashlib.sha256(b"".join(part[e].detach().contiguous().numpy().tobytes() for part in stack)).hexdigest()
        for e in range(len(stack[0]))
    ]


def here(spread: MoELayer) -> tuple[range, list[str]]:
    """Which experts a process holds, and their digests."""
    bank = spread.experts.banks[0] if isinstance(spread.experts, JoinedExperts) else spread.experts
    assert isinstance(bank, ShardedExperts)
    return bank.own, digests([p.to_local() for p in bank.parameters()])


def digests_of(whole: MoELayer) -> list[str]:
    """Digests of the routed experts of a layer in one process."""
    return digests([parameter[: whole.num_experts] for parameter in whole.experts.parameters()])


def shared_layer(place: Place, seed: int) -> MoELayer:
    torch.manual_seed(seed)
    return layer(TopK(2), place.num_experts, num_shared=1)


def each_holds_its_own_experts(place: Place) -> None:
    whole = shared_layer(place, 1)
    wanted = digests_of(whole)
    assert len(set(wanted)) == place.num_experts
    other = shared_layer(place, 1 + place.rank)  # the first process decides, should they differ
    for mine in (spread(whole, place.mesh), spread(other, place.mesh)):
        own, found = here(mine)
        assert found == [wanted[e] for e in own]
        held: list[Any] = [None] * place.world
        distributed.all_gather_object(held, list(own))
        assert [e for ids in held for e in ids] == list(range(place.num_experts))


def weights_are_drawn_as_in_one_process(place: Place) -> None:
    """From the meta device: no process ever has more than its share and one expert."""
    torch.manual_seed(3)
    wanted = digests(list(MLPExperts(place.num_experts, D, 8).parameters()))
    with torch.device("meta"):
        empty = layer(TopK(2), place.num_experts)
    mine = parallelize_module(empty, place.mesh, ExpertParallel())
    held = sum(p.to_local().numel() for p in mine.experts.parameters())
    assert held <= 3 * (6 * 8 + 8 + 8 * 6 + 6)
    mine.experts.to_empty(device="cpu")
    torch.manual_seed(3)
    mine.experts.reset_parameters()
    own, found = here(mine)
    assert found == [wanted[e] for e in own]


def saved_by_all_is_read_by_fewer(place: Place) -> None:
    """torch.distributed.checkpoint: written by all, read by one process without a mesh, and by half of them."""
    whole = shared_layer(place, 1)
    wanted, path = digests_of(whole), str(place.folder / f"by_{place.world}")
    checkpoint.save(spread(whole, place.mesh).state_dict(), checkpoint_id=path)
    if place.rank == 0:
        found = read_whole(path)
        plain = shared_layer(place, 2)
        plain.load_state_dict(one_process_state(found, ["experts"]))
        assert all(torch.equal(plain.state_dict()[key], value) for key, value in whole.state_dict().items())
    half = DeviceMesh("cpu", list(range(place.world // 2)))
    if place.rank < half.size():
        mine = spread(shared_layer(place, 2), half)
        state = mine.state_dict()
        checkpoint.load(state, checkpoint_id=path, process_group=half.get_group())
        mine.load_state_dict(state)
        own, found = here(mine)
        assert found == [wanted[e] for e in own]
        assert len(own) >= place.num_experts // half.size()
    distributed.barrier()


def saved_by_one_is_read_by_all(place: Place) -> None:
    whole = shared_layer(place, 1)
    path, one = str(place.folder / "by_one"), DeviceMesh("cpu", [0])
    if place.rank == 0:
        checkpoint.save(spread(whole, one).state_dict(), checkpoint_id=path, process_group=one.get_group())
    distributed.barrier()
    mine = spread(shared_layer(place, 2), place.mesh)
    state = mine.state_dict()
    checkpoint.load(state, checkpoint_id=path)
    mine.load_state_dict(state)
    wanted = digests_of(whole)
    own, found = here(mine)
    assert found == [wanted[e] for e in own]
    assert torch.equal(mine.router.score.weight, whole.router.score.weight)


def read_whole(path: str) -> dict[str, Tensor]:
    reader = checkpoint.FileSystemReader(path)
    held = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in held.items()
        if isinstance(value, TensorStorageMetadata)
    }
    checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state


def optimizer_steps_equal_one_process(place: Place) -> None:
    torch.manual_seed(1)
    whole = layer(TopK(2), place.num_experts, num_shared=1).double()
    mine = spread(whole, place.mesh)
    steps = [torch.optim.AdamW(module.parameters(), lr=0.05, foreach=False) for module in (whole, mine)]
    for _ in range(4):
        x, aim = torch.randn(2, ROWS, D, dtype=torch.float64)
        for module, optimizer, rows, wanted, size in (
            (whole, steps[0], x, aim, len(x)),
            (mine, steps[1], place.own(x), place.own(aim), len(x) / place.world),
        ):
            optimizer.zero_grad()
            ((module(rows) - wanted).square().sum() / size).backward()
            if module is mine:
                average(mine)
            optimizer.step()
    found = {name: whole_tensor(parameter) for name, parameter in mine.named_parameters()}
    equal(one_process_state(found, split_banks(mine)), dict(whole.named_parameters()), 1e-9)


def autocast_sends_what_the_experts_take(place: Place) -> None:
    torch.manual_seed(1)
    whole = layer(TopK(2), place.num_experts)
    mine, x = spread(whole, place.mesh), torch.randn(ROWS, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, y_mine = whole(x), mine(place.own(x))
    assert y_mine.dtype == y.dtype
    torch.testing.assert_close(y_mine, place.own(y), atol=2e-2, rtol=2e-2)


def recomputed_layers_meet_again(place: Place) -> None:
    """Activation checkpointing runs the layer, and what it sends, once more while gradients are under way."""
    torch.manual_seed(1)
    whole = layer(TopK(2), place.num_experts).double()
    x = torch.randn(ROWS, D, dtype=torch.float64)
    found = []
    for again in (False, True):
        mine, rows = spread(whole, place.mesh), place.own(x).clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(mine, rows, use_reentrant=False) if again else mine(rows)
        y.square().sum().backward()
        found.append({"x": rows.grad, **gradients(mine)})
    equal(found[1], found[0], 1e-12)


def second_derivatives(place: Place) -> None:
    torch.manual_seed(1)
    whole = layer(TopK(2), place.num_experts).double()
    x = torch.randn(ROWS, D, dtype=torch.float64)
    mine = spread(whole, place.mesh)
    found = []
    for module, rows in ((whole, x.clone()), (mine, place.own(x).clone())):
        rows.requires_grad_()
        (slope,) = torch.autograd.grad(module(rows).square().sum(), rows, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), rows)[0])
    equal({"x": found[1]}, {"x": place.own(found[0])}, 1e-9)


def what_cannot_be_spread_is_told(place: Place) -> None:
    with pytest.raises(TypeError, match="it spreads MoELayer"):
        parallelize_module(nn.Linear(2, 2), place.mesh, ExpertParallel())
    with pytest.raises(ValueError, match="one without an expert cannot take part; spread them over"):
        spread(layer(TopK(1), place.world - 1), place.mesh)
    with pytest.raises(ValueError, match="NormalisedExperts are not stacked"):
        ShardedExperts(NormalisedExperts(4, D, 4), place.mesh)
    two = DeviceMesh("cpu", torch.arange(place.world).view(1, -1), mesh_dim_names=("data", "experts"))
    with pytest.raises(ValueError, match=r"give one of them, such as mesh\['experts'\]"):
        ExpertParallel()._apply(layer(TopK(1), 4), two)
    mine = spread(layer(TopK(1), place.num_experts), place.mesh)
    with pytest.raises(ValueError, match="select before spreading"):
        mine.experts.select([0])
    with pytest.raises(ValueError, match="take no side inputs"):
        mine.experts.grouped(torch.zeros(0, D), [0] * place.num_experts, torch.zeros(0, 1))


Law = Callable[[Place], None]
LAWS: dict[str, Law] = {
    **{
        f"{name}, {str(dtype).removeprefix('torch.')}": partial(
            equals_one_process, make=make, dtype=dtype, by_row=make in BY_ROW.values()
        )
        for name, make in {**BY_ROW, **BY_BATCH}.items()
        for dtype in (torch.float64, torch.float32)
        if (dtype == torch.float64 or name in ("top 2", "top p, null experts", "ProMoE"))
    },
    **{
        law.__name__.replace("_", " "): law
        for law in (
            each_holds_its_own_experts,
            weights_are_drawn_as_in_one_process,
            saved_by_all_is_read_by_fewer,
            saved_by_one_is_read_by_all,
            optimizer_steps_equal_one_process,
            autocast_sends_what_the_experts_take,
            recomputed_layers_meet_again,
            second_derivatives,
            balance_is_of_the_global_batch,
            balance_over_accumulated_batches,
            bias_balancing_counts_all,
            thresholds_follow_the_joint_batch,
            routing_metrics_are_of_all_rows,
            what_cannot_be_spread_is_told,
        )
    },
}


def _process(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=40)
    )
    place = Place(rank, DeviceMesh("cpu", list(range(world)), mesh_dim_names=("experts",)), folder)
    told: dict[str, str] = {}
    for name, law in LAWS.items():
        try:
            law(place)
            told[name] = ""
        except Exception:  # the other processes may wait for this one: nothing after it can be trusted
            told[name] = traceback.format_exc()
            break
    (folder / f"{rank}.json").write_text(json.dumps(told))
    if all(not text for text in told.values()):
        distributed.destroy_process_group()


def main(world: int, folder: Path) -> None:
    fork = multiprocessing.get_context("fork")  # before any thread is there: torch is imported once for all
    processes = [fork.Process(target=_process, args=(rank, world, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
