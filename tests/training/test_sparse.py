# SPDX-License-Identifier: Apache-2.0
"""Sparse and dense parameters stepped as one optimizer, and clipped together."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, SparseAdam

from moeapps.training.optim import OneCycle, OptimizerConfig, ParamGroup
from moeapps.training.sparse import JoinedOptimizer, build_optimizer, clip_gradients, sparse_parameters


class Net(nn.Module):
    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4, sparse=sparse)
        self.head = nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).sum(1))


IDS = torch.tensor([[1, 2, 2], [7, 1, 49]])


def train(net: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 3) -> None:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        net(IDS).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_without_sparse_tables_it_is_adamw() -> None:
    assert type(build_optimizer(Net(sparse=False), OptimizerConfig())) is AdamW
    assert sparse_parameters(Net(sparse=False)) == []


def test_the_dense_part_of_a_joined_optimizer_is_fused_where_that_is_asked() -> None:
    joined = build_optimizer(Net(), OptimizerConfig(fused=True))
    assert [group.get("fused") for group in joined.param_groups] == [True, None]


def test_joined_step_is_that_of_the_two_optimizers() -> None:
    config = OptimizerConfig(lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())

    train(ours, [build_optimizer(ours, config)])
    numbers = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}
    train(
        theirs,
        [AdamW(theirs.head.parameters(), weight_decay=0.3, **numbers), SparseAdam([theirs.table.weight], **numbers)],
    )

    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rows_that_no_batch_touches_do_not_move() -> None:
    net = Net()
    before = net.table.weight.detach().clone()

    train(net, [build_optimizer(net, OptimizerConfig(lr=0.1, weight_decay=0.5))])

    moved = (net.table.weight != before).any(1)
    assert torch.nonzero(moved).squeeze(1).tolist() == [1, 2, 7, 49]


def test_first_step_of_the_table_is_that_of_dense_adam_on_the_touched_rows() -> None:
    sparse, dense = Net(), Net(sparse=False)
    dense.load_state_dict(sparse.state_dict())

    train(sparse, [build_optimizer(sparse, OptimizerConfig(lr=0.1, weight_decay=0.0))], steps=1)
    train(dense, [build_optimizer(dense, OptimizerConfig(lr=0.1, weight_decay=0.0))], steps=1)

    torch.testing.assert_close(sparse.table.weight, dense.table.weight, atol=1e-6, rtol=1e-6)


def test_a_loaded_state_continues_as_if_never_interrupted() -> None:
    first = Net()
    optimizer = build_optimizer(first, OptimizerConfig(lr=0.1))
    train(first, [optimizer])
    second = Net()
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, OptimizerConfig(lr=0.7))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    train(first, [optimizer])
    train(second, [resumed])

    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_and_schedules_reach_both_parts() -> None:
    net = Net()
    optimizer = build_optimizer(net, OptimizerConfig(lr=0.1, groups=[ParamGroup("table.*", lr_mult=10.0)]))
    assert isinstance(optimizer, JoinedOptimizer)
    scheduler = OneCycle(pct_start=0.5)(optimizer, 4)
    train(net, [optimizer], steps=1)
    scheduler.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}

    assert rates["table.*"] == pytest.approx(10 * rates["default"])
    assert rates["default"] not in (0.1, 0.01)
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == list(rates.values())


@pytest.mark.parametrize("limit", [0.01, 1e6])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_torchs_with_the_table_made_dense(limit: float, algorithm: str) -> None:
    sparse, dense = Net(), Net(sparse=False)
    dense.load_state_dict(sparse.state_dict())
    for net in (sparse, dense):
        net(IDS).square().sum().backward()

    clip_gradients(sparse.parameters(), limit, algorithm)
    if algorithm == "norm":
        nn.utils.clip_grad_norm_(dense.parameters(), limit)
    else:
        nn.utils.clip_grad_value_(dense.parameters(), limit)

    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad.to_dense(), b.grad, atol=1e-7, rtol=1e-5)


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="algorithm='max'"):
        clip_gradients([], 1.0, "max")
    with pytest.raises(ValueError, match=r"parts=\[\]"):
        JoinedOptimizer([])


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, OptimizerConfig(lr=0.05))


def test_lightnings_automatic_optimisation_lowers_the_loss() -> None:
    task = Task()
    before = float(task.training_step(IDS, 0).detach())
    loader = torch.utils.data.DataLoader(IDS.repeat(20, 1), batch_size=2)

    trainer = L.Trainer(max_epochs=2, barebones=True, accelerator="cpu", devices=1)
    trainer.fit(task, loader)

    assert float(task.training_step(IDS, 0).detach()) < before / 10
    assert trainer.global_step == 40
