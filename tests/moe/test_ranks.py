# SPDX-License-Identifier: Apache-2.0
"""Running statistics of several processes are those of one process on the joint batch (slow: starts processes)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moeapps.moe import LinearScore, Router, RouterBase, Threshold, TopP
from moeapps.moe.ranks import (
    alone,
    objects_of_all_ranks,
    rows_by_rank,
    rows_of_all_ranks,
    sum_over_ranks,
    sums_of_all_ranks,
)
from tasks.image_diffusion.rivals import routers

D, E, STEPS = 6, 4, 3
SIZES = (14, 9)  # rows of process 0 and process 1: not equally many
ROUTERS: dict[str, Callable[[], RouterBase]] = {
    "threshold": lambda: Router(LinearScore(D, E), Threshold(1.5, decay=0.5)),
    "race": lambda: Router(LinearScore(D, E), Threshold(1.5, scope="pairs", weighing="identity", decay=0.5)),
    "budget": lambda: Router(LinearScore(D, E), TopP(0.6, budget=1.5, decay=0.5)),
    "diffmoe": lambda: routers.DiffMoERouter(D, E, capacity=1.5, decay=0.5),
    "k_means": lambda: routers.k_means(num_experts=E, conditional_only=False)(D),
}


def steps() -> list[tuple[Tensor, Tensor]]:
    """Rows and masks of the joint batches; in the last one process 1 has padding alone."""
    draw = torch.Generator().manual_seed(3)
    x = [torch.randn(sum(SIZES), D, generator=draw, dtype=torch.float64) for _ in range(STEPS)]
    masks = [torch.rand(sum(SIZES), generator=draw) < 0.7 for _ in x]
    masks[-1][SIZES[0] :] = False
    return list(zip(x, masks, strict=True))


def trained(router: RouterBase, rank: int | None) -> dict[str, Tensor]:
    """Buffers after the steps, of one process on the joint batch or of one of two on its part."""
    torch.manual_seed(5)
    for x, mask in steps():
        parts = [(x, mask)] if rank is None else list(zip(x.split(SIZES), mask.split(SIZES), strict=True))
        x, mask = parts[rank or 0]
        router(x, token_mask=mask)
    return dict(router.named_buffers())


def _process(rank: int, path: str, fresh: dict[str, nn.Module], joint: dict[str, dict[str, Tensor]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    rows = torch.arange(6.0).view(3, 2)[: 1 + 2 * rank]
    assert rows_of_all_ranks(rows).tolist() == [[0, 1], [0, 1], [2, 3], [4, 5]]
    assert rows_of_all_ranks(rows[: 2 * rank]).tolist() == [[0, 1], [2, 3]]
    assert int(sum_over_ranks(torch.tensor(rank + 3))) == 7
    for empty in (torch.tensor([]), rows.new_empty(0, 2)):
        for dtype in (torch.bool, torch.int64, torch.float64, torch.bfloat16):
            parts = rows_by_rank(rows.to(dtype) if rank else empty)
            assert [tuple(part.shape) for part in parts] == [(0, 2), (3, 2)]
            assert torch.equal(parts[1], torch.arange(6.0).view(3, 2).to(dtype))
    assert [part.tolist() for part in rows_by_rank(rows[:, : 2 - rank])] == [[[0.0, 1.0]], [[0.0], [2.0], [4.0]]]
    assert [part.shape for part in rows_by_rank(torch.tensor([]))] == [(0,), (0,)]
    assert [float(part) for part in rows_by_rank(torch.tensor(float(rank)))] == [0.0, 1.0]
    with pytest.raises(ValueError, match="cannot be joined"):
        rows_by_rank(rows if rank else rows.flatten())
    found = sums_of_all_ranks({"a": rows.sum(0), ("b", 1): torch.tensor(5)} if rank else {})
    assert {name: value.tolist() for name, value in found.items()} == {"a": [6.0, 9.0], ("b", 1): 5}
    assert objects_of_all_ranks(rank) == [0, 1]
    if rank == 0:  # the other one does not take part
        with alone():
            assert rows_of_all_ranks(rows) is rows
            assert sum_over_ranks(rows) is rows
    for name, shared in fresh.items():
        router = copy.deepcopy(shared)  # what is handed to a process lies in memory that both write to
        for key, value in trained(router, rank).items():
            torch.testing.assert_close(value, joint[name][key], msg=lambda text, n=name, k=key: f"{n} {k}: {text}")
        kept = copy.deepcopy(router.state_dict())
        if rank == 0:  # evaluation and empty parts of one process must not wait for the other
            router.eval()(steps()[0][0])
        assert all(torch.equal(value, kept[key]) for key, value in router.state_dict().items())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_the_statistics_of_one_on_the_joint_batch(tmp_path) -> None:
    torch.manual_seed(1)
    fresh = {name: make().double() for name, make in ROUTERS.items()}
    joint = {name: trained(copy.deepcopy(router), None) for name, router in fresh.items()}
    for name, router in fresh.items():  # the parts differ from the whole, so that an average or one rank's will not do
        part = trained(copy.deepcopy(router), 0)
        assert any(not torch.equal(value, part[key]) for key, value in joint[name].items()), name
    torch.multiprocessing.spawn(_process, args=(str(tmp_path / "store"), fresh, joint), nprocs=2)


def test_one_process_sends_nothing() -> None:
    rows = torch.randn(3, 2)
    assert rows_of_all_ranks(rows) is rows
    assert sum_over_ranks(rows) is rows
