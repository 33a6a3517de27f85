# SPDX-License-Identifier: Apache-2.0
r"""Denoising diffusion with a learned variance: 1000 steps, linear betas, the network predicts noise.

.. math:: x_k = \sqrt{\bar\alpha_k}\, x_0 + \sqrt{1 - \bar\alpha_k}\, \epsilon

Time t in [0, 1] is the step k = floor(T t). The network gives 2C channels: noise, and where the logarithm of the
variance lies between those of :math:`\beta_k` and of the posterior.

Source: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (learned variance), Song et al. 2021 (DDIM); numbers as in
docs/papers/promoe.md, equation 10.

Shape legend: B images, C channels, T steps.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from moeapps.moe.wide import WideBuffers, wide_dtype
from tasks.image_diffusion.nets.process import Process, per_image

_LOG2 = math.log(2.0)


class GaussianDiffusion(WideBuffers, Process):
    r"""Mean squared error of the noise plus the variational bound, which trains the variance alone.

    Args:
        steps: T (paper: 1000).
        beta_first: first variance (paper: 1e-4).
        beta_last: last variance (paper: 0.02).
        variance_weight: weight of the bound, in bits per number, beside the squared error (DiT: 1).

    Raises:
        ValueError: for fewer than two steps or betas that do not rise within (0, 1).
    """

    needs_variance = True
    default_solver = "ddim"
    solvers = ("ddim", "ancestral")

    wide: ClassVar[tuple[str, ...]] = ("alpha_bar_T",)  # rounded, the first steps would add no noise at all
    alpha_bar_T: Tensor

    def __init__(
        self,
        *,
        steps: int = 1000,
        beta_first: float = 1e-4,
        beta_last: float = 0.02,
        variance_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if steps < 2 or not 0 < beta_first < beta_last < 1:
            raise ValueError(f"steps={steps}, betas {beta_first} to {beta_last}: use >= 2 and 0 < first < last < 1")
        self.steps, self.variance_weight = steps, variance_weight
        beta_T = torch.linspace(beta_first, beta_last, steps, dtype=torch.float64)
        self.register_buffer("alpha_bar_T", torch.cumprod(1 - beta_T, dim=0), persistent=False)

    def draw_times(self, num: int, device: torch.device) -> Tensor:
        """Uniform times [num] in [0, 1)."""
        return torch.rand(num, device=device, dtype=wide_dtype())

    def step_of(self, t_B: Tensor) -> Tensor:
        """Step k of a time, int64 in 0 .. T-1."""
        return (t_B.double() * self.steps).long().clamp(0, self.steps - 1)

    def corrupt(self, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """The noisy image at step k."""
        alpha_bar = per_image(self.alpha_bar_T[self.step_of(t_B)], x0)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps

    def network_time(self, t_B: Tensor) -> Tensor:
        """The step as a number, 0 to T - 1 (of 1000)."""
        return self.step_of(t_B).float() * (1000.0 / self.steps)

    def losses(self, output: Tensor, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """Squared error of the noise, plus the bound of the step in bits with the mean held fixed.

        Step 0, whose posterior has no variance, borrows that of step 1 (DiT).
        """
        noise, fraction = output.float().chunk(2, dim=1)
        error_B = (noise - eps).square().flatten(1).mean(1)
        if not self.variance_weight:
            return error_B
        step_B = self.step_of(t_B)
        before_B = self.alpha_bar_T[(step_B - 1).clamp_min(0)].where(step_B > 0, 1.0)
        x_k = self.corrupt(x0, eps, t_B)
        jump = Jump(self.alpha_bar_T[step_B], before_B, x0, least=self._posterior(1))
        mean, log_variance = jump.mean(x_k, noise.detach()), jump.log_variance(fraction)
        true_mean = jump.posterior_mean(x0, x_k)
        bound = _normal_kl(true_mean, jump.log_posterior, mean, log_variance)
        first = _discrete_nll(x0, mean, log_variance)  # the last denoising step has a likelihood instead
        bound = torch.where(per_image(step_B, x0) == 0, first, bound) / _LOG2
        return error_B + self.variance_weight * bound.flatten(1).mean(1)

    def _posterior(self, step: int) -> Tensor:
        """Posterior variance of a step above 0, float64 []."""
        now, before = self.alpha_bar_T[step], self.alpha_bar_T[step - 1]
        return (1 - now / before) * (1 - before) / (1 - now)


class Jump:
    """One denoising step from a noise level to a lower one, for each image.

    Args:
        alpha_bar_B: of the present step, float64 [B].
        before_B: of the step that is jumped to; 1 is clean.
        like: images [B, C, H, W] whose dtype the numbers take.
        least: variance in place of the posterior's 0 of a jump to clean, whose logarithm would be infinite; None is
            half of beta, for those who make no use of it.
    """

    def __init__(self, alpha_bar_B: Tensor, before_B: Tensor, like: Tensor, *, least: Tensor | None = None) -> None:
        alpha_B = alpha_bar_B / before_B
        beta_B = 1 - alpha_B
        posterior_B = beta_B * (1 - before_B) / (1 - alpha_bar_B)
        log_posterior_B = posterior_B.where(posterior_B > 0, beta_B * 0.5 if least is None else least).log()
        self.log_beta, self.log_posterior = per_image(beta_B.log(), like), per_image(log_posterior_B, like)
        self._data = per_image(before_B.sqrt() * beta_B / (1 - alpha_bar_B), like)
        self._noisy = per_image(alpha_B.sqrt() * (1 - before_B) / (1 - alpha_bar_B), like)
        self._alpha_bar = per_image(alpha_bar_B, like)

    def data(self, x_k: Tensor, noise: Tensor) -> Tensor:
        """Data that a prediction of the noise points to."""
        return (x_k - (1 - self._alpha_bar).sqrt() * noise) / self._alpha_bar.sqrt()

    def noise(self, x_k: Tensor, x0: Tensor) -> Tensor:
        """Noise that a prediction of the data leaves."""
        return (x_k - self._alpha_bar.sqrt() * x0) / (1 - self._alpha_bar).sqrt()

    def posterior_mean(self, x0: Tensor, x_k: Tensor) -> Tensor:
        """Mean of the lower noise level given data and the present one."""
        return self._data * x0 + self._noisy * x_k

    def mean(self, x_k: Tensor, noise: Tensor, *, clip: bool = False) -> Tensor:
        """The same from a prediction of the noise; ``clip`` keeps the data it points to in [-1, 1]."""
        x0 = self.data(x_k, noise)
        return self.posterior_mean(x0.clamp(-1, 1) if clip else x0, x_k)

    def log_variance(self, fraction: Tensor) -> Tensor:
        """Between the posterior's (-1) and beta's (+1), by the network's second half."""
        share = (fraction + 1) / 2
        return share * self.log_beta + (1 - share) * self.log_posterior


def _normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL divergence between normals, number by number, in nats."""
    gap = (mean1 - mean2).square() * torch.exp(-log_var2)
    return 0.5 * (log_var2 - log_var1 + torch.exp(log_var1 - log_var2) + gap - 1.0)


def _discrete_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log-likelihood of 8-bit data under a normal, number by number, in nats."""
    scale = torch.exp(-0.5 * log_variance)
    above = torch.special.ndtr((x0 - mean + 1 / 255) * scale)
    below = torch.special.ndtr((x0 - mean - 1 / 255) * scale)
    inside = torch.where(x0 > 0.999, 1 - below, torch.where(x0 < -0.999, above, above - below))
    return -inside.clamp_min(1e-12).log()
