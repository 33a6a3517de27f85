# SPDX-License-Identifier: Apache-2.0
"""Laws of rectified flow: its ends, its times, its converters, and the exact field of a single image."""

from __future__ import annotations

import pytest
import torch

from tasks.image_diffusion.nets.flow import RectifiedFlow, data_first, shifted
from tests.tasks.image_diffusion.model_common import noisy

ONES = torch.ones(4)


def test_time_zero_is_data_and_time_one_is_noise() -> None:
    flow, x0, eps = RectifiedFlow(), noisy(), noisy(seed=2)
    torch.testing.assert_close(flow.corrupt(x0, eps, 0 * ONES), x0)
    torch.testing.assert_close(flow.corrupt(x0, eps, ONES), eps)
    torch.testing.assert_close(flow.corrupt(x0, eps, 0.25 * ONES), 0.75 * x0 + 0.25 * eps)
    assert flow.network_time(0.25 * ONES).tolist() == [250.0] * 4


def test_the_loss_of_the_true_velocity_is_zero_and_extra_channels_are_ignored() -> None:
    flow, x0, eps = RectifiedFlow(), noisy(), noisy(seed=2)
    output = torch.cat([eps - x0, 1e6 * noisy(seed=3)], dim=1)
    assert flow.losses(output, x0, eps, 0.5 * ONES).tolist() == [0.0] * 4
    off = flow.losses(eps - x0 + 2.0, x0, eps, 0.5 * ONES)
    torch.testing.assert_close(off, 4 * ONES)


def test_a_network_of_the_other_convention_becomes_one_of_ours() -> None:
    x0, eps = noisy(), noisy(seed=2)
    told = []

    def theirs(x, time, label):
        told.append(time)
        return x0 - eps

    for scale in (1.0, 1000.0):
        ours = data_first(theirs, time_scale=scale)
        torch.testing.assert_close(ours(x0, 250 * ONES, torch.arange(4)), eps - x0)
        torch.testing.assert_close(told[-1], 0.75 * scale * ONES)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(("times", "mean", "std"), [("logit_normal", 0.0, 1.0), ("logit_normal", 0.5, 0.7)])
def test_logits_of_times_are_normal(times, mean: float, std: float, stratified: bool) -> None:
    flow = RectifiedFlow(times=times, mean=mean, std=std, stratified=stratified)
    t = flow.draw_times(20_000, torch.device("cpu"))
    assert ((t > 0) & (t < 1)).all()
    logit = torch.logit(t)
    assert logit.mean().item() == pytest.approx(mean, abs=0.03)
    assert logit.std().item() == pytest.approx(std, rel=0.03)
    inside = ((logit - mean) / std).abs() < 1
    assert inside.float().mean().item() == pytest.approx(0.6827, abs=0.015)


def test_stratified_times_visit_every_slice_once_in_random_order() -> None:
    flow = RectifiedFlow(times="uniform", stratified=True)
    t = flow.draw_times(64, torch.device("cpu"))
    assert sorted((t * 64).long().tolist()) == list(range(64))
    assert not torch.equal(t, t.sort().values)


def test_a_shift_keeps_the_ends_moves_the_middle_up_and_one_changes_nothing() -> None:
    u = torch.linspace(0, 1, 11)
    assert torch.equal(shifted(u, 1.0), u)
    moved = shifted(u, 3.0)
    assert moved[[0, -1]].tolist() == [0.0, 1.0]
    assert (moved[1:-1] > u[1:-1]).all()
    torch.testing.assert_close(shifted(moved, 1 / 3), u)
    torch.testing.assert_close(torch.logit(moved[1:-1]), torch.logit(u[1:-1]) + torch.tensor(3.0).log())


@pytest.mark.parametrize("wrong", [{"std": 0.0}, {"shift": -1.0}, {"times": "cosine"}])
def test_numbers_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="use logit_normal or uniform"):
        RectifiedFlow(**wrong)
