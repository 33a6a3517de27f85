# SPDX-License-Identifier: Apache-2.0
"""Experts and layer of MixER as ddrous/MixER ``mixer/learner.py`` defines them, one environment at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from official_common import furthest, part, scatter
from torch import Tensor

from moeapps.moe import FittedRouter, LinearScore, MoELayer, Router, TopK
from tasks.dynamics.nets.experts import CoDAExperts, GEPSExperts, MetaExperts, NCFExperts
from tasks.dynamics.nets.partition import PublishedKMeans

E, D, C, ROWS = 3, 2, 6, 9
M = C // E

Field = Callable[[dict[str, Tensor], int, Tensor, Tensor], Tensor]


def swish(slope: Tensor, x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-slope * x))


def geps(p: dict[str, Tensor], k: int, x: Tensor, c: Tensor) -> Tensor:
    """Each matrix W + A diag(c) B, each vector b + A_b c, each slope of an activation beta + s c."""
    for i in range(3):
        W, B, A, A_b = p[f"root{i}"][k].T, p[f"down{i}"][k].T, p[f"up{i}"][k, :M].T, p[f"up{i}"][k, M:].T
        x = (W + A @ torch.diag(c) @ B) @ x + p[f"bias{i}"][k, 0] + A_b @ c
        if i < 2:
            x = swish(p["slope"][k, 0, i] + p["slope"][k, 1:, i] @ c, x)
    return x


def coda(p: dict[str, Tensor], k: int, x: Tensor, c: Tensor) -> Tensor:
    """All numbers of the network in one vector, theta_0 + V c, then cut into matrices, vectors and slopes."""
    stacked = [p[f"weight{i}"][k].unflatten(0, (1 + M, -1)).flatten(1) for i in range(3)] + [p["slope"][k]]
    root, V = torch.cat([s[0] for s in stacked]), torch.cat([s[1:] for s in stacked], 1).T
    theta = root + V @ c
    sizes = [s.shape[1] for s in stacked]
    *layers, slopes = theta.split(sizes)
    for i, flat in enumerate(layers):
        whole = flat.view(len(x) + 1, -1)
        x = whole[:-1].T @ x + whole[-1]
        if i < 2:
            x = swish(slopes[i], x)
    return x


def ncf(p: dict[str, Tensor], k: int, x: Tensor, c: Tensor) -> Tensor:
    """A net of the context and a net of the state, their outputs joined for a main net; every slope is learned."""

    def net(name: str, h: Tensor, depth: int) -> Tensor:
        for i in range(depth):
            h = p[f"{name}_weight{i}"][k].T @ h + p[f"{name}_bias{i}"][k, 0]
            if i + 1 < depth:
                h = swish(p[f"{name}_beta{i}"][k, 0, 0], h)
        return h

    return net("main", torch.cat([net("data", x, 2), net("ctx", c, 2)]), 3)


def layer_error(kind: type[MetaExperts], field: Field) -> float:
    """A whole layer: gate [xi, 1] W, its largest entry picks the expert, which reads its own piece plus its shift."""
    bank = kind(D, E, C, same_init=False).double()
    score = LinearScore(C, E, bias=True).double()
    scatter([*bank.parameters(), *score.parameters()])
    layer = MoELayer(Router(score, TopK(1, weighing="ones")), bank)
    x = torch.randn(ROWS, D, dtype=torch.float64, requires_grad=True)
    context = torch.randn(ROWS, C, dtype=torch.float64, requires_grad=True)
    assert bank.shift is not None
    W = torch.cat([score.weight.T, score.bias[None]])
    rows, used = [], set()
    for i in range(ROWS):
        gate = torch.softmax(torch.cat([context[i], torch.ones(1)]) @ W, 0)
        k = int(gate.argmax())
        used.add(k)
        rows.append(field(bank.stacks(), k, x[i], context[i, k * M : (k + 1) * M] + bank.shift[k]))
    assert len(used) == E, used
    return furthest(layer(x, context, side=(context,)), torch.stack(rows), [x, context, *bank.parameters()])


@part("GEPS experts in a MixER layer")
def geps_layer() -> float:
    return layer_error(GEPSExperts, geps)


@part("CoDA experts in a MixER layer")
def coda_layer() -> float:
    return layer_error(CoDAExperts, coda)


@part("NCF experts in a MixER layer")
def ncf_layer() -> float:
    return layer_error(NCFExperts, ncf)


def released_gate(
    context: Tensor, losses: Tensor, centroids: Tensor, rounds: int, tol: float
) -> tuple[Tensor, Tensor] | None:
    """One update of the gate: K-means by mean absolute distance, greedy match by median loss, least squares.

    Returns:
        the gate [C + 1, E] and the centroids; None where the update is given up.
    """
    num = losses.shape[1]
    for turn in range(rounds):
        before = [list(row) for row in centroids.tolist()]
        cluster = [min(range(num), key=lambda j: sum(abs(v - w) for v, w in zip(c, before[j], strict=True))) for c in
                   context.tolist()]  # fmt: skip
        groups = [[n for n, c in enumerate(cluster) if c == j] for j in range(num)]
        if not all(groups):
            return None
        centroids = torch.stack([context[group].mean(0) for group in groups])
        still = all(
            abs(v - w) <= tol + 1e-5 * abs(w)
            for now, old in zip(centroids.tolist(), before, strict=True)
            for v, w in zip(now, old, strict=True)
        )
        if turn == rounds - 1:
            return None  # also when it came to rest in the last round allowed
        if still:
            break
    expert_of, taken = {}, set()
    for j, group in enumerate(groups):
        median = losses[group].quantile(0.5, dim=0)
        free = [k for k in range(num) if k not in taken]
        expert_of[j] = min(free, key=lambda k: float(median[k]))
        taken.add(expert_of[j])
    Y = torch.stack([torch.eye(num, dtype=torch.float64)[expert_of[c]] for c in cluster])
    A = torch.cat([context, torch.ones(len(context), 1)], 1)
    return torch.linalg.pinv(A) @ Y, centroids


@part("gate update of MixER")
def gate_update() -> float:
    """Three calls in a row from a random or a warm start, on contexts that drift; given-up calls are among them."""
    errors, given_up, fitted = [], 0, 0
    for trial in range(12):
        partition = PublishedKMeans(max_rounds=6, tol=1e-4)
        router = FittedRouter(C, E, partition, noise=0.0).double()
        centres = 3 * torch.randn(E, C, dtype=torch.float64)
        owner = torch.arange(24) % E
        start = centres + torch.randn(E, C).double() * (0.1 if trial % 3 else 6.0)
        partition.centroids, partition.has_centroids = start, torch.tensor(True)
        for _ in range(3):
            context = centres[owner] + 1.5 * torch.randn(24, C, dtype=torch.float64)
            losses = torch.rand(24, E, dtype=torch.float64)
            old = torch.cat([router.score.weight.T, router.score.bias[None]]).clone()
            known = partition.centroids.double() if bool(partition.has_centroids) else None
            if known is None:
                state = torch.get_rng_state()
                known = context.new_empty(E, C).uniform_(-1e-3, 1e-3)
                torch.set_rng_state(state)
            wanted = released_gate(context, losses, known, 6, 1e-4)
            done = router.fit(context, losses)
            assert done == (wanted is not None)
            found = torch.cat([router.score.weight.T, router.score.bias[None]])
            given_up, fitted = given_up + (not done), fitted + done
            errors.append(furthest(found, old if wanted is None else wanted[0]))
            assert bool(partition.has_centroids) == done
            if wanted is not None:
                errors.append(furthest(partition.centroids, wanted[1]))
    assert min(given_up, fitted) > 2, (given_up, fitted)
    return max(errors)
