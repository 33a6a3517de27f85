# SPDX-License-Identifier: Apache-2.0
"""Spirals of three hidden families, and a small MixER whose contexts and experts have left their starts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tasks.dynamics.data.batch import Trajectories
from tasks.dynamics.model import FieldMixER
from tasks.dynamics.nets import gates
from tasks.dynamics.nets.experts import GEPSExperts
from tasks.dynamics.nets.gates import GateFactory

S, N, T, D, E, C = 6, 2, 7, 2, 3, 6


def spirals(num: int = S, *, new: bool = False, trajectories: int = N) -> Trajectories:
    """Rotations of three speeds, the hidden family, each with two rates of decay."""
    family = torch.arange(num) % 3
    t = 0.2 * torch.arange(T)
    angle = (1 + family)[:, None, None] * t + torch.rand(num, trajectories, 1)
    radius = torch.exp(-0.1 * (torch.arange(num) // 3)[:, None, None] * t)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    scale = x.diff(dim=2).square().mean((1, 2, 3)).sqrt()
    env = torch.full((num,), -1) if new else torch.arange(num)
    return Trajectories(x, torch.full((num,), 0.2), env, family, None, scale, num_support=1 if new else 0)


SIZES = {"state_dim": D, "num_environments": S}


def network(gate: GateFactory | None = None, *, num_experts: int = E, **options: Any) -> FieldMixER:
    """A small network whose contexts and experts have left their starts."""
    experts = options.pop("experts", partial(GEPSExperts, width=8, same_init=False))
    chosen = gates.robust() if gate is None else gate
    net = FieldMixER(SIZES, experts=experts, gate=chosen, num_experts=num_experts, context_dim=C, **options)
    torch.nn.init.normal_(net.contexts)
    return net
