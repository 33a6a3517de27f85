# SPDX-License-Identifier: Apache-2.0
"""Parameter groups and schedules."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from moeapps.training.optim import Constant, Cosine, OneCycle, OptimizerConfig, ParamGroup, build_adamw


def net() -> nn.ModuleDict:
    return nn.ModuleDict({"block": nn.Linear(2, 2), "router": nn.Linear(2, 2), "head": nn.Linear(2, 2)})


def test_first_matching_pattern_wins_and_the_rest_is_the_default() -> None:
    groups = [ParamGroup("*.bias", weight_decay=0.0), ParamGroup("router.*", lr=0.5, lr_mult=0.1)]
    optimizer = build_adamw(net(), OptimizerConfig(lr=0.1, weight_decay=0.2, groups=groups))

    found = {g["name"]: (len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {"default": (2, 0.1, 0.2), "*.bias": (3, 0.1, 0.0), "router.*": (1, pytest.approx(0.05), 0.2)}


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    module = net()
    module["head"].requires_grad_(False)
    optimizer = build_adamw(module, OptimizerConfig(groups=[ParamGroup("block.*"), ParamGroup("*.weight")]))

    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: build_adamw(net(), OptimizerConfig(groups=[ParamGroup("blok.*")])), "'blok.*' matches no parameter"),
        (lambda: build_adamw(net().requires_grad_(False), OptimizerConfig()), "no parameter is trainable"),
        (lambda: OptimizerConfig(lr=0.0), "must be positive"),
        (lambda: Cosine(warmup=1.0), "warmup=1.0"),
        (lambda: OneCycle(anneal="sine"), "anneal='sine'"),
    ],
)
def test_wrong_numbers_are_told(build: object, text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("*", r"\*")):
        build()


def test_the_fused_step_is_the_same_step() -> None:
    torch.manual_seed(0)
    modules, x = [net(), net()], torch.randn(5, 2)
    modules[1].load_state_dict(modules[0].state_dict())
    optimizers = [
        build_adamw(m, OptimizerConfig(lr=0.1, fused=fused)) for m, fused in zip(modules, (None, True), strict=True)
    ]
    assert [o.param_groups[0]["fused"] for o in optimizers] == [None, True]
    for _ in range(5):
        for module, optimizer in zip(modules, optimizers, strict=True):
            optimizer.zero_grad()
            sum(layer(x).square().sum() for layer in module.values()).backward()
            optimizer.step()
    for plain, fused in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-6)


def rates(schedule: object, steps: int) -> list[float]:
    optimizer = build_adamw(net(), OptimizerConfig(lr=0.1))
    scheduler = schedule(optimizer, steps)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_constant_stays() -> None:
    assert rates(Constant(), 5) == [0.1] * 5


def test_cosine_follows_its_formula() -> None:
    found = rates(Cosine(warmup=0.2, final=0.1), 10)

    assert found[:3] == pytest.approx([0.05, 0.1, 0.1])
    expected = [0.1 * (0.1 + 0.45 * (1 + math.cos(math.pi * k / 8))) for k in range(8)]
    assert found[2:] == pytest.approx(expected)


def test_betas_and_eps_reach_the_step() -> None:
    parameter, config = (
        nn.Linear(1, 1, bias=False),
        OptimizerConfig(lr=0.1, weight_decay=0.0, betas=(0.5, 0.8), eps=0.2),
    )
    optimizer, start = build_adamw(parameter, config), float(parameter.weight.detach())
    first, second = 0.0, 0.0
    for step, gradient in enumerate((1.0, -3.0), start=1):
        parameter.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        first, second = 0.5 * first + 0.5 * gradient, 0.8 * second + 0.2 * gradient**2
        start -= 0.1 * (first / (1 - 0.5**step)) / (math.sqrt(second / (1 - 0.8**step)) + 0.2)
    assert float(parameter.weight.detach()) == pytest.approx(start, rel=1e-5)


def test_one_cycle_starts_low_peaks_at_the_rate_of_each_group_and_ends_far_below() -> None:
    found = rates(OneCycle(pct_start=0.3, div_factor=10.0, final_div_factor=100.0), 20)

    assert found[0] == pytest.approx(0.01)
    assert max(found) == pytest.approx(0.1, rel=1e-2)
    assert found[-1] < 0.005


def test_one_cycle_allows_the_step_that_lightning_takes_after_the_last_one() -> None:
    optimizer = build_adamw(net(), OptimizerConfig(lr=0.1))
    scheduler = OneCycle()(optimizer, 3)
    for _ in range(3):
        optimizer.step()
        scheduler.step()

    assert torch.isfinite(torch.tensor(optimizer.param_groups[0]["lr"]))


class Line(L.LightningModule):
    """Fits a line to numbers that overflow nothing, under any precision."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.layer, self.fused = nn.Linear(3, 1), fused
        self.norms: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_adamw(self, OptimizerConfig(lr=0.1, eps=1.0, fused=self.fused))  # the size of a gradient counts

    def on_train_batch_end(self, *args: object) -> None:
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters()])))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_under_mixed_precision_a_fused_step_clips_gradients_of_their_true_size(tmp_path, precision: str) -> None:
    x, runs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), []
    for fused in (False, True):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0) if precision == "16-mixed" else None
        model = Line(fused)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=3, gradient_clip_val=0.01, default_root_dir=tmp_path, logger=False,
            plugins=[MixedPrecision(precision, "cpu", scaler)], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, DataLoader(TensorDataset(x), batch_size=4))
        assert trainer.global_step == 3
        assert model.norms == pytest.approx([0.01] * 3, rel=1e-3)
        runs.append(list(model.parameters()))
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"groups": [ParamGroup("*", lr_mult=float("nan"))]}, "must be positive and finite"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1; use 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay=nan; use 0 or more"),
        ({"groups": [ParamGroup("*", weight_decay=-2.0)]}, r"weight_decay=-2\.0; use 0 or more"),
        ({"eps": -1.0}, r"eps=-1\.0, betas"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\)"),
    ],
)
def test_numbers_that_no_optimizer_can_use_are_told_before_data_are_made(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        OptimizerConfig(**options)
