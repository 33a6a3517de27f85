# SPDX-License-Identifier: Apache-2.0
"""The MoE step of each of the seven systems: short on the core, and equal to a naive loop written from its equations.

Every system function builds on public parts of ``moeapps.moe`` in at most 40 lines; every naive function is a plain
loop over rows and experts that knows nothing of them. Outputs and all gradients agree in float64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeapps.moe import (
    AttentionScore,
    ConditionalSplit,
    Dense,
    DenseRouting,
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
    Routing,
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


def naive_point_moe(layer: MoELayer, x_ND: Tensor, top_k: int) -> Tensor:
    outputs = []
    for x in x_ND:
        p = torch.softmax(layer.router.score.weight @ x, -1)
        value = p.tolist()
        chosen = sorted(range(len(p)), key=lambda e: -value[e])[:top_k]
        total = sum(p[e] for e in chosen)
        outputs.append(sum(p[e] / total * glu(layer.experts, e, x, F.relu) for e in chosen))
    return torch.stack(outputs)


def test_point_moe() -> None:
    layer, x = randomised(point_moe(6, 5, 2)), rows(11, 6)
    assert_same(lambda: layer(x), lambda: naive_point_moe(layer, x, 2), [x, *layer.parameters()])


# --- 2. UniMoE-Audio: top-p over routed and null experts, shared experts weighed by the same softmax ----------------


@system
def unimoe_audio(dim: int, num_routed: int, num_null: int, num_shared: int, p: float) -> MoELayer:
    top_p = TopP(p, num_null=num_null, renormalise=True)
    score = LinearScore(dim, num_routed + num_null + num_shared)
    router = Router(score, GatedShared(top_p, num_shared))
    return MoELayer(router, GLUExperts(num_routed + num_shared, dim, 4, activation="silu"), num_shared=num_shared)


def naive_unimoe_audio(layer: MoELayer, x_ND: Tensor, num_routed: int, num_null: int, p: float) -> Tensor:
    outputs = []
    for x in x_ND:
        z = layer.router.score.weight @ x
        routable = num_routed + num_null
        probs = torch.softmax(z[:routable], -1)
        value = probs.tolist()
        chosen: list[int] = []
        while sum(value[e] for e in chosen) < p and len(chosen) < routable:
            chosen.append(max((e for e in range(routable) if e not in chosen), key=lambda e: value[e]))
        kept = [*chosen, *range(routable, len(z))]
        a = dict(zip(kept, torch.softmax(z[kept], -1), strict=True))
        mass = sum(a[e] for e in chosen)
        y = torch.zeros_like(x)
        for e in chosen:
            if e < num_routed:
                y = y + mass * probs[e] / sum(probs[j] for j in chosen) * glu(layer.experts, e, x, F.silu)
        for s in range(routable, len(z)):
            y = y + a[s] * glu(layer.experts, s - num_null, x, F.silu)
        outputs.append(y)
    return torch.stack(outputs)


def test_unimoe_audio() -> None:
    layer, x = randomised(unimoe_audio(6, 5, 2, 2, 0.7)), rows(17, 6)
    routing = layer.route(x)
    assert isinstance(routing, Routing)
    assert 1 < float((routing.expert_M < 5).double().sum()) / 17 < 5
    assert_same(lambda: layer(x), lambda: naive_unimoe_audio(layer, x, 5, 2, 0.7), [x, *layer.parameters()])


# --- 3. ProMoE: unconditional rows to their own expert, cosine prototypes for the rest, one shared expert -----------


@system
def promoe(dim: int, num_routed: int) -> MoELayer:
    prototypes = Router(PrototypeScore(dim, num_routed), TopK(1, weighing="identity"))
    experts = MLPExperts(num_routed + 2, dim, 2 * dim, activation="gelu_tanh")
    return MoELayer(ConditionalSplit(prototypes, fixed_groups=(-1,)), experts, num_shared=1)


def naive_promoe(layer: MoELayer, x_ND: Tensor, unconditional_N: Tensor, num_routed: int) -> Tensor:
    def gelu(h: Tensor) -> Tensor:
        return F.gelu(h, approximate="tanh")

    outputs = []
    for x, unconditional in zip(x_ND, unconditional_N, strict=True):
        y = mlp(layer.experts, num_routed + 1, x, gelu)
        if unconditional:
            outputs.append(y + mlp(layer.experts, num_routed, x, gelu))
            continue
        prototypes = layer.router.conditional.score.prototypes
        z = torch.stack([x @ p / (x.norm() * p.norm()) for p in prototypes])
        j = int(z.argmax())
        outputs.append(y + z[j] * mlp(layer.experts, j, x, gelu))
    return torch.stack(outputs)


def test_promoe() -> None:
    layer, x = randomised(promoe(5, 4)), rows(4, 3, 5)
    unconditional = torch.tensor([False, True, False, False])
    group = torch.where(unconditional, -1, torch.arange(4)).repeat_interleave(3)
    flag = unconditional.repeat_interleave(3)
    assert_same(
        lambda: layer(x, group=group),
        lambda: naive_promoe(layer, x.reshape(12, 5), flag, 4).reshape(4, 3, 5),
        [x, *layer.parameters()],
    )


def test_promoe_with_all_rows_unconditional_leaves_prototypes_untouched() -> None:
    layer, x = randomised(promoe(5, 4)), rows(6, 5)
    y = layer(x, group=torch.full((6,), -1))
    expected = naive_promoe(layer, x, torch.ones(6, dtype=torch.bool), 4)
    torch.testing.assert_close(y, expected)
    prototypes, w_in = torch.autograd.grad(y.sum(), [layer.router.conditional.score.prototypes, layer.experts.w_in])
    assert not prototypes.any()
    assert not w_in[:4].any()
    assert w_in[4:].any()


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


def normalised(bank: NormalisedExperts, e: int, x_ND: Tensor) -> Tensor:
    z = x_ND @ bank.weight[e]
    z = (z - z.mean(0)) / torch.sqrt(z.var(0, unbiased=False) + bank.eps)
    z = bank.gamma[e] * z + bank.beta[e]
    return z * torch.sigmoid(z)


def naive_gates(layer: MoELayer, router: int, g: int, x_Nd: Tensor, experts: list[int], kind: str) -> list[Tensor]:
    score = layer.router.routers[router].scores[g]
    logits = torch.stack([x_Nd @ score.weight[e] + score.bias[e] for e in experts], -1)
    weights = torch.sigmoid(logits) if kind == "sigmoid" else torch.softmax(logits, -1)
    return list(weights.unbind(-1))


def naive_home_level(
    layer: MoELayer, views: list[Tensor], gates: list[Tensor], sees: Tensor, owns: Tensor
) -> list[Tensor]:
    h = [normalised(layer.experts, e, view) for e, view in enumerate(views)]
    states = []
    for g, gate in enumerate(gates):
        seen, owned = sees[g].nonzero()[:, 0].tolist(), owns[g].nonzero()[:, 0].tolist()
        weights = naive_gates(layer, 0, g, gate, seen, "softmax")
        self_weights = naive_gates(layer, 1, g, gate, owned, "sigmoid" if len(owned) == 1 else "softmax")
        state = sum(w[:, None] * h[e] for w, e in zip(weights, seen, strict=True))
        states.append(state + sum(w[:, None] * h[e] for w, e in zip(self_weights, owned, strict=True)))
    return states


def test_home() -> None:
    # Two categories (inter, watch) and a shared group; tasks 0 and 1 are inter, task 2 is watch.
    category, expert_of = [0, 0, 1], [2, 2, 0, 1, 1]  # level-1 experts: 2 shared, 1 inter, 2 watch
    sees1 = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    owns1 = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    # Level-2 experts: shared, inter, watch, then one per task.
    sees2 = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1]], dtype=torch.bool)
    owns2 = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    meta = randomised(home_level(5, [5, 5, 5], 4, sees1, owns1))
    task = randomised(home_level(4, [8, 8, 8], 3, sees2, owns2))
    v = [rows(9, 5) for _ in range(3)]

    def naive() -> Tensor:
        z = naive_home_level(meta, [v[g] for g in expert_of], v, sees1, owns1)
        gates = [torch.cat([z[c], z[-1]], -1) for c in category]
        views = [z[-1], z[0], z[1], *(z[c] for c in category)]
        return torch.stack(naive_home_level(task, views, gates, sees2, owns2))

    leaves = [*v, *meta.parameters(), *task.parameters()]
    assert_same(lambda: home(v, meta, task, category, expert_of), naive, leaves)


# --- 5. AW-MoE: the gate is an attention-weighted sum of gate vectors, one per past behaviour; all experts run ------


@system
def aw_moe(dim: int, num_experts: int, width: int) -> MoELayer:
    router = Router(AttentionScore(width, num_experts), Dense(weighing="identity"))
    return MoELayer(router, MLPExperts(num_experts, dim, 6, out_dim=1, activation="relu"))


def naive_aw_moe(layer: MoELayer, x_ND: Tensor, history_NHd: Tensor, key_Nd: Tensor, mask_NH: Tensor) -> Tensor:
    score = layer.router.score
    outputs = []
    for n, x in enumerate(x_ND):
        g = score.prior
        for j in range(history_NHd.shape[1]):
            if mask_NH[n, j]:
                h, key = history_NHd[n, j], key_Nd[n]
                g = g + score.attention_unit(torch.cat([h, h * key, key])) * score.gate_unit(torch.cat([h, key]))
        outputs.append(sum(g[k] * mlp(layer.experts, k, x, F.relu) for k in range(len(g))))
    return torch.stack(outputs)


def test_aw_moe() -> None:
    layer = randomised(aw_moe(7, 4, 5))
    x, history, key = rows(6, 7), rows(6, 8, 5), rows(6, 5)
    mask = torch.rand(6, 8) < 0.6
    mask[2] = False  # a user without history is scored by the learned prior alone
    assert_same(
        lambda: layer(x, (history, key, mask)),
        lambda: naive_aw_moe(layer, x, history, key, mask),
        [x, history, key, *layer.parameters()],
    )


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


def naive_mixer(layer: MoELayer, context_EC: Tensor, x_ETD: Tensor, steps: int, dt: float) -> Tensor:
    score, num_experts = layer.router.score, layer.experts.num_experts
    outputs = []
    for xi, trajectories in zip(context_EC, x_ETD, strict=True):
        k = int((score.weight @ xi + score.bias).argmax())
        piece = xi.chunk(num_experts)[k]
        for x in trajectories:
            for _ in range(steps):
                x = x + dt * layer.experts.experts[k](x[None], piece[None])[0]
            outputs.append(x)
    return torch.stack(outputs).view_as(x_ETD)


def test_mixer() -> None:
    layer, context, x = randomised(mixer(3, 3, 2)), rows(12, 6), rows(12, 4, 3)
    assert layer.route(context).counts().min() > 0
    gate = list(layer.router.parameters())  # "ones" gives the gate no gradient: it is fitted by least squares
    assert_same(
        lambda: mixer_rollout(layer, context, x, 3, 0.1),
        lambda: naive_mixer(layer, context, x, 3, 0.1),
        [context, x, *layer.parameters()],
        unused=gate,
    )


# --- 7. Meta-DMoE: frozen domain experts, the sample's own one left out, joined by a transformer --------------------


class Aggregator(nn.Module):
    """Pre-norm attention over expert tokens and the mean of what is present."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, z_BED: Tensor, mask_BE: Tensor) -> Tensor:
        h = self.norm(z_BED)
        z = z_BED + self.attention(h, h, h, key_padding_mask=~mask_BE, need_weights=False)[0]
        return (z * mask_BE[..., None]).sum(1) / mask_BE.sum(1, keepdim=True)


@system
def meta_dmoe(specialists: list[nn.Module], dim: int) -> MoELayer:
    """Group s of a row leaves out expert s; group ``num_experts`` leaves out none."""
    num_experts = len(specialists)
    allowed = torch.cat([~torch.eye(num_experts, dtype=torch.bool), torch.ones(1, num_experts, dtype=torch.bool)])
    router = Router(TableScore(torch.zeros(1, num_experts)), Dense(weighing="ones", allowed=allowed))
    bank = ModuleExperts(specialists, in_dim=12, out_dim=dim, row_dims=3).requires_grad_(False).eval()
    return MoELayer(router, bank, combiner=Stack())


def naive_meta_dmoe(specialists: list[nn.Module], aggregator: Aggregator, x_B: Tensor, group_B: Tensor) -> Tensor:
    outputs = []
    for x, group in zip(x_B, group_B.tolist(), strict=True):
        z = torch.stack([m(x[None])[0] for e, m in enumerate(specialists) if e != group])
        outputs.append(aggregator(z[None], torch.ones(1, len(z), dtype=torch.bool))[0])
    return torch.stack(outputs)


def test_meta_dmoe() -> None:
    specialists = [nn.Sequential(nn.Flatten(), nn.Linear(12, 4 + e), nn.Tanh(), nn.Linear(4 + e, 6)) for e in range(4)]
    layer, aggregator = randomised(meta_dmoe(specialists, 6)), randomised(Aggregator(6))
    x, group = rows(9, 3, 2, 2), torch.arange(9) % 5

    def fast() -> Tensor:
        z_BED, mask_BE = layer(x, group=group)
        return aggregator(z_BED, mask_BE)

    assert isinstance(layer.route(x, group=group), DenseRouting)
    assert not any(p.requires_grad for p in layer.parameters())
    leaves = [x, *aggregator.parameters()]
    assert_same(fast, lambda: naive_meta_dmoe(specialists, aggregator, x, group), leaves)


@pytest.mark.parametrize("function", SYSTEMS, ids=lambda f: f.__name__)
def test_every_system_is_short(function: Callable[..., object]) -> None:
    source = [line for line in inspect.getsource(function).splitlines() if line.strip()]
    assert len(source) <= 40
