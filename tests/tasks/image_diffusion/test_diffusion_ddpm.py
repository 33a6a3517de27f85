# SPDX-License-Identifier: Apache-2.0
"""Laws of the diffusion: its schedule, exact posteriors, exact steps with the true noise, the bound of the variance."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tasks.image_diffusion.nets.ddpm import GaussianDiffusion, Jump, _discrete_nll
from tasks.image_diffusion.nets.flow import RectifiedFlow
from tasks.image_diffusion.nets.samplers import denoise, respaced
from tests.tasks.image_diffusion.model_common import noisy


def at(process: GaussianDiffusion, step: int, num: int = 4) -> torch.Tensor:
    return torch.full((num,), (step + 0.5) / process.steps)


def test_signal_decreases_from_one_towards_zero() -> None:
    alpha_bar = GaussianDiffusion().alpha_bar_T
    assert (alpha_bar.diff() < 0).all()
    assert alpha_bar[0].item() == pytest.approx(1 - 1e-4)
    assert alpha_bar[-1] < 1e-4
    ratio = 1 - alpha_bar[1:] / alpha_bar[:-1]
    torch.testing.assert_close(ratio, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[1:])


def test_unit_data_keep_variance_one_at_every_step() -> None:
    process, x0, eps = GaussianDiffusion(), torch.randn(8, 1, 64, 64), torch.randn(8, 1, 64, 64)
    for step in (0, 200, 700, 999):
        assert process.corrupt(x0, eps, at(process, step, 8)).var().item() == pytest.approx(1.0, abs=0.03)
    assert process.step_of(torch.tensor([0.0, 0.9999, 1.0])).tolist() == [0, 999, 999]
    assert process.network_time(at(process, 321)).tolist() == [321.0] * 4


def test_the_posterior_is_bayes_rule() -> None:
    process = GaussianDiffusion(steps=50, beta_first=0.01, beta_last=0.3)
    x0, x_k = torch.tensor([[[[0.3]]]], dtype=torch.float64), torch.tensor([[[[-0.8]]]], dtype=torch.float64)
    level, lower = process.alpha_bar_T[20:21], process.alpha_bar_T[19:20]
    jump = Jump(level, lower, x0)
    alpha = float(level / lower)
    grid = torch.linspace(-4, 4, 40_001, dtype=torch.float64)
    prior = Normal(float(lower.sqrt() * 0.3), float((1 - lower).sqrt())).log_prob(grid)
    likelihood = Normal(math.sqrt(alpha) * grid, math.sqrt(1 - alpha)).log_prob(torch.tensor(-0.8, dtype=torch.float64))
    weight = (prior + likelihood).softmax(0)
    mean = float((weight * grid).sum())
    assert float(jump.posterior_mean(x0, x_k)) == pytest.approx(mean, abs=1e-6)
    assert float(jump.log_posterior.exp()) == pytest.approx(float((weight * (grid - mean) ** 2).sum()), rel=1e-4)


def test_ddim_with_the_true_noise_is_exact_in_one_step_and_in_many() -> None:
    process, x0, eps = GaussianDiffusion(), noisy().double().clamp(-1, 1), noisy(seed=2).double()
    x = process.corrupt(x0, eps, at(process, 999))
    for steps in (1, 2, 7, 50):
        told = denoise(process, lambda x_k, t: eps, x, steps, clip=False)
        torch.testing.assert_close(told, x0, atol=1e-9, rtol=1e-9)


def test_clipped_ddim_of_data_in_range_is_the_same() -> None:
    process, x0, eps = GaussianDiffusion(), noisy().double().clamp(-1, 1), noisy(seed=2).double()
    x = process.corrupt(x0, eps, at(process, 999))

    def oracle(x_k, t):
        return Jump(process.alpha_bar_T[process.step_of(t)], torch.ones(4).double(), x_k).noise(x_k, x0)

    torch.testing.assert_close(denoise(process, oracle, x, 9, clip=True), x0, atol=1e-6, rtol=1e-6)


def test_ancestral_steps_with_the_true_noise_end_at_the_data() -> None:
    process, x0 = GaussianDiffusion(), noisy().double().clamp(-1, 1)
    generator = torch.Generator().manual_seed(0)

    def oracle(x_k, t):
        noise = Jump(process.alpha_bar_T[process.step_of(t)], torch.ones(4).double(), x_k).noise(x_k, x0)
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)

    def draw():
        return torch.randn(x0.shape, generator=generator, dtype=torch.float64)

    told = denoise(process, oracle, draw(), 20, noise=draw, clip=True)
    torch.testing.assert_close(told, x0, atol=1e-6, rtol=1e-6)


def test_respaced_steps_run_from_the_noisiest_to_the_first() -> None:
    process = GaussianDiffusion()
    assert respaced(process, 1000) == list(range(999, -1, -1))
    assert respaced(process, 1) == [999]
    ten = respaced(process, 10)
    assert (ten[0], ten[-1], len(set(ten))) == (999, 0, 10)
    with pytest.raises(ValueError, match="use 1 to 1000"):
        respaced(process, 1001)


def test_the_loss_of_true_noise_and_posterior_variance_is_zero_beyond_the_first_step() -> None:
    process, x0, eps = GaussianDiffusion(), noisy().clamp(-1, 1), noisy(seed=2)
    perfect = torch.cat([eps, -torch.ones_like(eps)], dim=1)  # -1: the posterior's variance
    assert process.losses(perfect, x0, eps, at(process, 500)).abs().max() < 1e-5
    wide = torch.cat([eps, torch.ones_like(eps)], dim=1)
    jump = Jump(process.alpha_bar_T[[500]].expand(4), process.alpha_bar_T[[499]].expand(4), x0)
    narrow_n = Normal(torch.zeros(1), (0.5 * jump.log_posterior[0, 0]).exp())
    wide_n = Normal(torch.zeros(1), (0.5 * jump.log_beta[0, 0]).exp())
    bits = kl_divergence(narrow_n, wide_n).item() / math.log(2)
    torch.testing.assert_close(
        process.losses(wide, x0, eps, at(process, 500)), torch.full((4,), bits), rtol=1e-2, atol=1e-7
    )
    assert GaussianDiffusion(variance_weight=0.0).losses(wide, x0, eps, at(process, 500)).abs().max() < 1e-9


def loss_of_one_number(step: int, x0: float, noise: float, told: float, share: float) -> float:
    """Improved DDPM by hand, with the variance of step 1 where that of the posterior is 0 (step 0)."""
    beta = [1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)]
    kept = [math.prod(1 - b for b in beta[: k + 1]) for k in range(step + 2)]
    before = kept[step - 1] if step else 1.0
    x = math.sqrt(kept[step]) * x0 + math.sqrt(1 - kept[step]) * noise
    guess = (x - math.sqrt(1 - kept[step]) * told) / math.sqrt(kept[step])
    one, other = (
        beta[step] * math.sqrt(before) / (1 - kept[step]),
        math.sqrt(1 - beta[step]) * (1 - before) / (1 - kept[step]),
    )
    k = max(step, 1)
    narrow = math.log(beta[k] * (1 - kept[k - 1]) / (1 - kept[k]))
    wide = (share + 1) / 2 * math.log(beta[step]) + (1 - share) / 2 * narrow
    mean = one * guess + other * x
    if step:
        gap = (one * x0 + other * x - mean) ** 2
        bits = 0.5 * (wide - narrow - 1 + math.exp(narrow - wide) + gap * math.exp(-wide)) / math.log(2)
    else:
        reach = [(1 + math.erf((x0 - mean + edge / 255) / math.exp(wide / 2) / math.sqrt(2))) / 2 for edge in (1, -1)]
        bits = -math.log2(reach[0] - reach[1])
    return (told - noise) ** 2 + bits


@pytest.mark.parametrize("step", [0, 1, 2, 500, 999])
def test_the_loss_of_every_step_is_the_published_one(step: int) -> None:
    process, case = GaussianDiffusion(), {"x0": 0.3, "noise": -0.4, "told": -0.9, "share": -0.7}
    x0, eps, told, share = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in case.values())
    found = process.losses(torch.cat([told, share], 1), x0, eps, at(process, step, 1))
    assert float(found) == pytest.approx(loss_of_one_number(step, **case), rel=1e-4)


def test_the_bound_trains_the_variance_and_not_the_noise() -> None:
    process, x0, eps = GaussianDiffusion(), noisy().clamp(-1, 1), noisy(seed=2)
    noise, fraction = noisy(seed=3).requires_grad_(), noisy(seed=4).requires_grad_()
    with_bound = process.losses(torch.cat([noise, fraction], 1), x0, eps, at(process, 300)).sum()
    grads = torch.autograd.grad(with_bound, [noise, fraction])
    plain = (noise - eps).square().flatten(1).mean(1).sum()
    torch.testing.assert_close(grads[0], torch.autograd.grad(plain, noise)[0])
    assert grads[1].any()


def test_likelihoods_of_all_256_levels_sum_to_one() -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64).view(-1, 1, 1, 1)
    for mean, std in ((0.1, 0.02), (0.97, 0.1), (-1.0, 0.5)):
        nll = _discrete_nll(levels, torch.tensor(mean), torch.tensor(2 * math.log(std), dtype=torch.float64))
        assert nll.neg().exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_numbers_out_of_range_are_refused() -> None:
    for wrong in ({"steps": 1}, {"beta_first": 0.5, "beta_last": 0.1}, {"beta_last": 1.0}):
        with pytest.raises(ValueError, match="0 < first < last < 1"):
            GaussianDiffusion(**wrong)


def test_a_model_in_half_precision_keeps_the_table_and_a_finite_loss() -> None:
    process, table = GaussianDiffusion(), GaussianDiffusion().alpha_bar_T
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(process.to(dtype).alpha_bar_T, table)
    assert process.alpha_bar_T.dtype == torch.float64
    t = (torch.arange(1000) + 0.5) / 1000
    x0, eps = (torch.randn(1000, 1, 2, 2).clamp(-1, 1).bfloat16() for _ in range(2))
    output = torch.randn(1000, 2, 2, 2).bfloat16().requires_grad_()
    loss = process.losses(output, x0, eps, t)
    loss.sum().backward()

    assert loss.isfinite().all()
    assert output.grad.isfinite().all()


def test_times_are_as_fine_where_half_precision_is_the_default() -> None:
    try:
        torch.set_default_dtype(torch.bfloat16)
        drawn = [process.draw_times(4000, torch.device("cpu")) for process in (GaussianDiffusion(), RectifiedFlow())]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(len(t.unique()) > 3500 for t in drawn)  # bfloat16 has 256 of them
    assert len(GaussianDiffusion().step_of(drawn[0]).unique()) > 950
