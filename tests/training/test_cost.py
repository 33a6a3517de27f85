# SPDX-License-Identifier: Apache-2.0
"""Counted parameters and FLOPs equal what arithmetic says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from moeapps.moe import GLUExperts, LinearScore, MLPExperts, MoELayer, Router, TopK
from moeapps.moe.presets import dense, dense_twin, linear, point_moe
from moeapps.training.callbacks.summary import MoESummary, warn_of_twin
from moeapps.training.cost import measure_cost, measure_training
from tests.toy import ToyData, ToyNet, ToyTask

WIDTH = 8


def task(moe: Any) -> ToyTask:
    return ToyTask(net=ToyNet(moe, width=WIDTH), facts=ToyData().facts)


def plain_flops(rows: int) -> int:
    return rows * 2 * (2 * WIDTH + WIDTH * 2)  # first and last linear layer


@pytest.mark.parametrize("backend", ["loop", "segments", "grouped_mm", "onehot"])
@pytest.mark.parametrize("bank", [partial(GLUExperts, 4, WIDTH, 16), partial(MLPExperts, 4, WIDTH, 16)])
def test_counted_flops_are_the_analytic_ones_whatever_the_backend(backend: str, bank: Any) -> None:
    def layer(dim: int) -> MoELayer:
        return MoELayer(Router(LinearScore(dim, 4), TopK(2)), bank(), backend=backend)

    batch = ToyData().example_batch(6)
    cost = measure_cost(task(layer), batch)

    runs = 4 if backend == "onehot" else 2  # the one-hot form sends all rows through all experts
    experts = 6 * runs * bank().flops_per_row
    router = 6 * 2 * WIDTH * 4
    if backend != "onehot":
        assert cost.flops == plain_flops(6) + router + experts
    else:
        assert cost.flops >= plain_flops(6) + router + experts // 2
    assert cost.flops_per_token == cost.flops / 6


def test_active_parameters_are_all_but_the_experts_not_chosen() -> None:
    cost = measure_cost(task(point_moe(num_experts=4, top_k=1)), ToyData().example_batch(5))

    bank = 4 * 3 * WIDTH * WIDTH
    assert cost.layers[0].params == bank
    assert cost.layers[0].mean_k == 1.0
    assert cost.active == cost.total - bank * 3 // 4
    assert cost.total == sum(p.numel() for p in task(point_moe(num_experts=4, top_k=1)).parameters())


def test_shared_experts_are_always_active() -> None:
    cost = measure_cost(task(point_moe(num_experts=4, top_k=2, num_shared=1)), ToyData().example_batch(5))

    assert cost.layers[0].num_experts == 5
    assert cost.layers[0].mean_k == 3.0
    assert cost.total - cost.active == cost.layers[0].params * 2 // 5


@pytest.mark.parametrize("moe", [dense(), linear()])
def test_without_a_choice_everything_is_active(moe: Any) -> None:
    cost = measure_cost(task(moe), ToyData().example_batch(5))

    assert cost.active == cost.total == cost.trainable


def test_dense_twin_of_the_chosen_width_costs_the_same_but_for_the_router() -> None:
    batch = ToyData().example_batch(5)
    sparse = measure_cost(task(point_moe(num_experts=4, top_k=2)), batch)
    twin = measure_cost(task(dense(expansion=2.0)), batch)

    assert sparse.flops - twin.flops == 5 * 2 * WIDTH * 4
    assert sparse.active - twin.active == WIDTH * 4


def test_measuring_leaves_random_state_modes_and_statistics_alone() -> None:
    measured = task(point_moe())
    measured.net.dropout.eval()
    modes = [module.training for module in measured.modules()]
    statistics = measured.net.norm.running_mean.clone()
    before = torch.get_rng_state()

    measure_cost(measured, ToyData().example_batch(4))

    assert torch.equal(before, torch.get_rng_state())
    assert modes == [module.training for module in measured.modules()]
    assert torch.equal(statistics, measured.net.norm.running_mean)
    assert measured.last_records == []


# --- a whole training ---


def step_by_hand(rows: int) -> int:
    """Forward and backward of the toy network around the default mixture; its inputs ask for no gradient."""
    layers = 2 * (2 * WIDTH + WIDTH * 4 + 2 * 3 * WIDTH * WIDTH + WIDTH * 2)
    return rows * (3 * layers - 2 * 2 * WIDTH)


def test_a_training_costs_forward_and_backward_of_its_steps() -> None:
    found = measure_training(task(point_moe()), ToyData().example_batch(5), planned=7, processes=2)

    assert found.planned == {"step": 7}
    assert found.flops() == 7 * 2 * step_by_hand(5)
    assert found.flops({"step": 3}) == 3 * 2 * step_by_hand(5)


def test_counting_a_training_step_changes_nothing() -> None:
    measured = task(point_moe())
    before = {name: value.clone() for name, value in measured.state_dict().items()}
    random_state = torch.get_rng_state()

    measure_training(measured, ToyData().example_batch(4), planned=2)

    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in measured.state_dict().items())
    assert all(p.grad is None for p in measured.parameters())
    assert measured.last_records == []


def test_the_first_training_batch_is_the_first_of_training_and_moves_no_order() -> None:
    data = ToyData(mixing="balanced")
    data.setup("fit")
    first = data.first_training_batch()
    again, second = list(data.train_dataloader())[:2]

    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0])


class Late(SingleDeviceStrategy):
    """Read checkpoints when all is set up, as strategies for networks in parts do."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


def fit(folder: Path, epochs: int, ckpt: Path | None = None, *, late: bool = False) -> MoESummary:
    summary, saved = MoESummary(), ModelCheckpoint(folder / str(epochs), save_last=True)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[summary, saved],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, limit_val_batches=0,
        strategy=Late(torch.device("cpu")) if late else "auto",
    )  # fmt: skip
    trainer.fit(task(point_moe()), datamodule=ToyData(), ckpt_path=ckpt)
    return summary


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("late", [False, True])
def test_a_run_says_what_it_spent_and_a_resumed_one_what_was_spent_in_all(tmp_path: Path, late: bool) -> None:
    once = fit(tmp_path, 1, late=late)
    resumed = fit(tmp_path, 3, ckpt=tmp_path / "1" / "last.ckpt", late=late)

    steps = 9  # 72 rows in batches of 8
    assert (once.describe_run()["train_steps"], once.describe_run()["train_flops"]) == (steps, steps * step_by_hand(8))
    assert resumed.describe_run()["train_flops"] == 3 * once.describe_run()["train_flops"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_that_cannot_be_counted_does_not_give_the_earlier_part_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = fit(tmp_path, 1)
    monkeypatch.setattr("moeapps.training.callbacks.summary.is_placed", lambda task: True)  # a network in parts
    resumed = fit(tmp_path, 3, ckpt=tmp_path / "1" / "last.ckpt")

    assert once.train_flops is not None
    assert resumed.train_flops is None
    assert "train_flops" not in resumed.describe_run()
    assert resumed.state_dict() == {"steps": 27, "train_flops": None}


# --- dense twins ---


def test_a_network_of_derived_twins_knows_its_share_of_the_mixtures() -> None:
    batch = ToyData().example_batch(5)
    mixture = measure_cost(task(point_moe(num_experts=4, top_k=2)), batch)

    equal = measure_cost(task(dense_twin(moe=point_moe(num_experts=4, top_k=2))), batch)
    wide = measure_cost(task(dense_twin(moe=point_moe(num_experts=4, top_k=2), match="params")), batch)

    assert equal.twin == ("flops", equal.flops / mixture.flops)
    assert wide.twin == ("params", wide.total / mixture.total)
    assert mixture.twin is None


def test_a_twin_that_is_not_matched_is_told(caplog: pytest.LogCaptureFixture) -> None:
    many = point_moe(num_experts=64, top_k=1, expansion=0.25)  # the router costs as much as the expert
    with caplog.at_level("WARNING", logger="moeapps"):
        warn_of_twin(measure_cost(task(dense_twin(moe=point_moe(), match="params")), ToyData().example_batch(5)))
        warn_of_twin(measure_cost(task(dense_twin(moe=many)), ToyData().example_batch(5)))

    told = [record.getMessage() for record in caplog.records if "dense twin" in record.getMessage()]
    assert len(told) == 2, "32 numbers of the router are 3 per cent of so small a network"
    assert "of the mixture's active FLOPs" in told[1]
