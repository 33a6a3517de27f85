# SPDX-License-Identifier: Apache-2.0
"""The MoE step of each of the seven systems, short on the core, and what compares it with a naive loop.

Every system function builds on public parts of ``moeapps.moe`` in at most 40 lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from moeapps.moe import (
    AttentionScore,
    ConditionalSplit,
    Dense,
    GatedShared,
    GLUExperts,
    LinearScore,
    MLPExperts,
    ModuleExperts,
    MoELayer,
    MultiGate,
    NormalisedExperts,
    PrototypeScore,
    Router,
    Stack,
    SumRouters,
    TableScore,
    TopK,
    TopP,
)

DOUBLE = torch.float64
SYSTEMS: list[Callable[..., object]] = []
Step = TypeVar("Step", bound=Callable[..., object])
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def system(function: Step) -> Step:
    """Mark a function as the MoE step of one system, so that its length is checked."""
    SYSTEMS.append(function)
    return function


def assert_same(
    fast: Callable[[], Tensor], naive: Callable[[], Tensor], leaves: Sequence[Tensor], unused: Sequence[Tensor] = ()
) -> None:
    """Compare outputs and the gradients of a random projection of them with respect to all leaves."""
    y_fast, y_naive = fast(), naive()
    torch.testing.assert_close(y_fast, y_naive, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(y_fast)
    found = torch.autograd.grad((y_fast * probe).sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad((y_naive * probe).sum(), leaves, allow_unused=True)
    silent = {id(leaf) for leaf in unused}
    for leaf, a, b in zip(leaves, found, wanted, strict=True):
        a, b = (torch.zeros_like(leaf) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert (id(leaf) in silent) == (not bool(b.any()))


def randomised(module: AnyModule) -> AnyModule:
    """The module in float64 with parameters far from their initial values, so that no term vanishes."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.6)
    return module


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, requires_grad=True)


def mlp(bank: MLPExperts, e: int, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    assert bank.b_in is not None
    assert bank.b_out is not None
    return activation(x @ bank.w_in[e] + bank.b_in[e]) @ bank.w_out[e] + bank.b_out[e]


def glu(bank: GLUExperts, e: int, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    width = bank.hidden_dim
    gate, up = x @ bank.w_in[e, :, :width], x @ bank.w_in[e, :, width:]
    return (activation(gate) * up) @ bank.w_out[e]


# --- 1. Point-MoE: top-2 softmax, renormalised, over ReLU-gated experts -------------------------------------------


@system
def point_moe(dim: int, num_experts: int, top_k: int) -> MoELayer:
    router = Router(LinearScore(dim, num_experts), TopK(top_k))
    return MoELayer(router, GLUExperts(num_experts, dim, dim, activation="relu"))


# --- 2. UniMoE-Audio: top-p over routed and null experts, shared experts weighed by the same softmax ----------------


@system
def unimoe_audio(dim: int, num_routed: int, num_null: int, num_shared: int, p: float) -> MoELayer:
    top_p = TopP(p, num_null=num_null, renormalise=True)
    score = LinearScore(dim, num_routed + num_null + num_shared)
    router = Router(score, GatedShared(top_p, num_shared))
    return MoELayer(router, GLUExperts(num_routed + num_shared, dim, 4, activation="silu"), num_shared=num_shared)


# --- 3. ProMoE: unconditional rows to their own expert, cosine prototypes for the rest, one shared expert -----------


@system
def promoe(dim: int, num_routed: int) -> MoELayer:
    prototypes = Router(PrototypeScore(dim, num_routed), TopK(1, weighing="identity"))
    experts = MLPExperts(num_routed + 2, dim, 2 * dim, activation="gelu_tanh")
    return MoELayer(ConditionalSplit(prototypes, fixed_groups=(-1,)), experts, num_shared=1)


# --- 4. HoME: masked multi-gates over normalised experts, with self-gates; every expert reads the view of its group -


@system
def home_level(dim: int, gate_dims: list[int], out_dim: int, sees: Tensor, owns: Tensor) -> MoELayer:
    """One level: row g of ``sees`` and ``owns`` [G, E] says which experts gate g may mix and which it owns."""
    num_experts = sees.shape[1]
    gates = MultiGate([LinearScore(d, num_experts, bias=True) for d in gate_dims], allowed=sees)
    alone = ["sigmoid" if int(row.sum()) == 1 else "softmax" for row in owns]
    own = MultiGate([LinearScore(d, num_experts, bias=True) for d in gate_dims], allowed=owns, weighing=alone)
    return MoELayer(SumRouters([gates, own]), NormalisedExperts(num_experts, dim, out_dim))


@system
def home(v_GNd: list[Tensor], meta: MoELayer, task: MoELayer, category: list[int], expert_of: list[int]) -> Tensor:
    """Level 1 gives one state per category and a shared one (last); level 2 gives one state per task."""
    views_END = torch.stack([v_GNd[g] for g in expert_of])
    z_GNo = meta(views_END, tuple(v_GNd), per_expert=True)
    shared, of_task = z_GNo[-1], [z_GNo[c] for c in category]
    gate_input = torch.stack([torch.cat([z, shared], -1) for z in of_task])
    # Level-2 bank: one shared expert (reads the shared state), one per category, one per task.
    views_END = torch.stack([shared, *z_GNo[:-1], *of_task])
    return task(views_END, gate_input, per_expert=True)


# --- 5. AW-MoE: the gate is an attention-weighted sum of gate vectors, one per past behaviour; all experts run ------


@system
def aw_moe(dim: int, num_experts: int, width: int) -> MoELayer:
    router = Router(AttentionScore(width, num_experts), Dense(weighing="identity"))
    return MoELayer(router, MLPExperts(num_experts, dim, 6, out_dim=1, activation="relu"))


# --- 6. MixER: one vector field per environment, chosen from its context; the choice serves a whole ODE solve -------


class Field(nn.Module):
    """A vector field dx/dt = f(x, piece + shift) with a context piece of its own expert."""

    def __init__(self, dim: int, piece: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + piece, 8), nn.Tanh(), nn.Linear(8, dim))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, piece: Tensor) -> Tensor:
        return self.net(torch.cat([x, piece + self.shift], -1))


@system
def mixer(dim: int, num_experts: int, piece: int) -> MoELayer:
    router = Router(LinearScore(num_experts * piece, num_experts, bias=True), TopK(1, weighing="ones"))
    return MoELayer(router, ModuleExperts([Field(dim, piece) for _ in range(num_experts)], in_dim=dim, out_dim=dim))


@system
def mixer_rollout(layer: MoELayer, context_EC: Tensor, x_ETD: Tensor, steps: int, dt: float) -> Tensor:
    """Route the environments once on their contexts, then take Euler steps of all trajectories."""
    num_envs, per_env, dim = x_ETD.shape
    routing = layer.route(context_EC)
    pieces = context_EC.view(num_envs, layer.experts.num_experts, -1)
    piece = pieces[torch.arange(num_envs), routing.expert_M].repeat_interleave(per_env, 0)
    routing = routing.repeat_rows(per_env)
    x = x_ETD.reshape(-1, dim)
    for _ in range(steps):
        x = x + dt * layer(x, routing=routing, side=(piece,))
    return x.view(num_envs, per_env, dim)


# --- 7. Meta-DMoE: frozen domain experts, the sample's own one left out, joined by a transformer --------------------


@system
def meta_dmoe(specialists: list[nn.Module], dim: int) -> MoELayer:
    """Group s of a row leaves out expert s; group ``num_experts`` leaves out none."""
    num_experts = len(specialists)
    allowed = torch.cat([~torch.eye(num_experts, dtype=torch.bool), torch.ones(1, num_experts, dtype=torch.bool)])
    router = Router(TableScore(torch.zeros(1, num_experts)), Dense(weighing="ones", allowed=allowed))
    bank = ModuleExperts(specialists, in_dim=12, out_dim=dim, row_dims=3).requires_grad_(False).eval()
    return MoELayer(router, bank, combiner=Stack())
