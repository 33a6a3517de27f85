# SPDX-License-Identifier: Apache-2.0
"""CAVIA: every training step first fits new contexts; the weights learn to make this fit easy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tasks.dynamics.data.batch import Trajectories
from tasks.dynamics.module import DynamicsTask
from tasks.dynamics.nets.alternation import Phase


class CaviaTask(DynamicsTask):
    """One meta-learner trained by CAVIA: a few gradient steps on contexts from 0, then one on the weights through them.

    The contexts of the inner loop are kept for the evaluation of trained environments. Every step is a step on the
    weights; ``alternation.context_steps`` and ``context_lr`` are not used.

    Differs from the source: the inner loop reads errors one sample ahead, also where the step on the weights rolls out,
    and an inner step is at most ``inner_lr`` long. Plain gradient descent needs a bounded curvature, which roll-outs
    lack; without either, trainings diverged at inner rates from 0.003 to 0.1.

    Args:
        inner_steps: gradient steps on the contexts inside a training step.
        inner_lr: their step size (plain gradient descent on the error of each environment) and their greatest length.
        options: arguments of `DynamicsTask`; ``net`` makes a network with one expert.

    Raises:
        ValueError: more than one expert (the published trainer goes with no gate), or a number outside its range.

    Source: Zintgraf et al. (2019); named as a baseline in MixER (docs/papers/mixer.md, equation 17).
    """

    def __init__(self, *, inner_steps: int = 3, inner_lr: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        if self.net.num_experts != 1 or inner_steps < 1 or not inner_lr > 0:
            raise ValueError(
                f"num_experts={self.net.num_experts}, inner_steps={inner_steps}, inner_lr={inner_lr}: CAVIA has one "
                "expert, 1 or more inner steps and a step size above 0"
            )
        self.inner_steps, self.inner_lr = inner_steps, inner_lr

    def phase(self, step: int) -> Phase:
        """Every step is one on the weights."""
        return "model"

    def training_loss(self, data: Trajectories, *, rollout: bool) -> Tensor:
        """Mean error after the inner loop, differentiable through it."""
        zero_Sc = data.x.new_zeros(len(data.x), self.net.context_dim)
        context_Sc = zero_Sc.requires_grad_()
        routing = self.net.route(context_Sc, self.net.group(data))
        for _ in range(self.inner_steps):
            # The sum keeps environments apart: each takes a step of its own.
            error = self.net.errors(data, context_Sc, routing, rollout=False).sum()
            (gradient,) = torch.autograd.grad(error, [context_Sc], create_graph=True)
            context_Sc = context_Sc - self.inner_lr * gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1.0)
        with torch.no_grad():
            self.net.contexts[data.env] = context_Sc
        return self.net.errors(data, context_Sc, routing, rollout=rollout).mean()
