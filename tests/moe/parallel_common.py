# SPDX-License-Identifier: Apache-2.0
"""What several processes with spread experts must do, each law a function; run by tests/moe/test_parallel.py.

``python -m tests.moe.parallel_common WORLD FOLDER`` imports torch once, forks WORLD processes and writes what became of
each law to FOLDER/<rank>.json. The oracle is the layer as it was before it was spread, in one process, on the rows of
all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
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

from moeapps.moe import (
    ConditionalSplit,
    Dense,
    ExpertChoice,
    GlobalBatchBalance,
    GLUExperts,
    GroupLimitedTopK,
    JoinedExperts,
    LinearScore,
    MLPExperts,
    MoELayer,
    MoERecorder,
    NormalisedExperts,
    Router,
    Slots,
    Stack,
    Sum,
    SwitchBalance,
    TableScore,
    Threshold,
    TopK,
    TopP,
)
from moeapps.moe.balance import BiasBalancer
from moeapps.moe.metrics import load_cv
from moeapps.moe.objectives import column_counts, switch_balance
from moeapps.moe.parallel import ExpertParallel, ShardedExperts, split_banks
from moeapps.moe.presets.systems import promoe, unimoe_audio
from moeapps.moe.ranks import alone, sum_over_ranks
from moeapps.moe.surgery import one_process_state

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


def equal_rows(place: Place, steps: int) -> Tensor:
    """As many rows on each process: only then is a mean over processes the mean over rows."""
    torch.manual_seed(4)
    return torch.randn(steps, place.world, 10, D, dtype=torch.float64)


def balance_is_of_the_global_batch(place: Place) -> None:
    torch.manual_seed(1)
    whole = layer(TopK(2), place.num_experts).double()
    mine, x = spread(whole, place.mesh), equal_rows(place, 1)[0]
    with MoERecorder() as all_rows:
        whole(x.flatten(0, 1))
    with MoERecorder() as own_rows:
        mine(x[place.rank])
    wanted, found = SwitchBalance(1.0)(all_rows.records), GlobalBatchBalance(1.0)(own_rows.records)
    wanted.backward()
    found.backward()
    average(mine)
    equal({"loss": sum_over_ranks(found.detach()) / place.world}, {"loss": wanted.detach()}, 1e-6)
    equal({"router": mine.router.score.weight.grad}, {"router": whole.router.score.weight.grad}, 1e-6)
    local = SwitchBalance(1.0)(own_rows.records)
    if place.world > 1:
        assert not torch.isclose(sum_over_ranks(local.detach()) / place.world, wanted, atol=1e-6)


def balance_over_accumulated_batches(place: Place) -> None:
    """With the counts of all micro-batches supplied, the mean over them is the loss of one process on all rows."""
    torch.manual_seed(1)
    whole = layer(TopK(2), place.num_experts).double()
    mine, x = spread(whole, place.mesh), equal_rows(place, 3)
    with MoERecorder() as all_rows:
        whole(x.flatten(0, 2))
    with MoERecorder() as own_rows:
        for part in x[:, place.rank]:
            mine(part)
    counts_E = sum_over_ranks(torch.stack([column_counts(record) for record in own_rows.records]).sum(0))
    values = torch.stack([switch_balance(record, counts_E=counts_E) for record in own_rows.records])
    wanted = switch_balance(all_rows.records[0])
    equal({"loss": sum_over_ranks(values.mean().detach()) / place.world}, {"loss": wanted.detach()}, 1e-6)


def bias_balancing_counts_all(place: Place) -> None:
    """Against the rule by hand, on the counts of one process with all rows."""
    torch.manual_seed(1)
    whole = layer(TopK(2, weighing="sigmoid", balance_bias=True), place.num_experts).double()
    mine = spread(whole, place.mesh)
    balancer, wanted = BiasBalancer(mine, rate=0.01), torch.zeros(place.num_experts)
    for x in equal_rows(place, 3):
        with MoERecorder(mine) as recorder:
            mine(x[place.rank])
        balancer.add(recorder.records)
        balancer.step()
        whole.router.choose.bias.copy_(wanted)
        counts_E = whole.route(x.flatten(0, 1)).counts().double()
        delta_E = 0.01 * torch.sign(counts_E.mean() - counts_E)
        wanted = wanted + (delta_E - delta_E.mean()).float()
    equal({"bias": mine.router.choose.bias}, {"bias": wanted}, 1e-6)
    assert wanted.abs().sum() > 0


def thresholds_follow_the_joint_batch(place: Place) -> None:
    for choose in (Threshold(1.5, decay=0.5), TopP(0.6, budget=1.5, decay=0.5)):
        torch.manual_seed(1)
        whole = layer(choose, place.num_experts).double()
        mine, before = spread(whole, place.mesh), copy.deepcopy(whole)
        for x in equal_rows(place, 3):
            mine(x[place.rank])
            with alone():
                whole(x.flatten(0, 1))
        equal(dict(mine.router.named_buffers()), dict(whole.router.named_buffers()), 1e-6)
        assert any(not torch.equal(a, b) for a, b in zip(before.buffers(), whole.buffers(), strict=True))


def routing_metrics_are_of_all_rows(place: Place) -> None:
    torch.manual_seed(1)
    whole = layer(TopK(2, num_null=1), place.num_experts, columns=place.num_experts + 1).double()
    mine, x = spread(whole, place.mesh), torch.randn(ROWS, D, dtype=torch.float64)
    with MoERecorder() as recorder:
        mine(place.own(x))
    counts_E = sum_over_ranks(recorder.records[0].routing.counts())
    wanted_E = whole.route(x).counts()
    assert counts_E.tolist() == wanted_E.tolist()
    equal({"cv": load_cv(counts_E)}, {"cv": load_cv(wanted_E)}, 1e-12)


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
