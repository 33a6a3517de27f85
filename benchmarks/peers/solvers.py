# SPDX-License-Identifier: Apache-2.0
"""Solving a mixture of vector fields, forward and backward, beside torchdiffeq and beside a transcription to JAX.

The JAX side is ours: the equations of GEPS experts and of the classical method, written as one would for ``jit``, with
a scan over time. It is no measurement of the code that MixER's authors published, whose training does more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.core_cases import step
from benchmarks.dynamics_speed import E, N, S, T, error_ratio, mixture, solve_ours, their_rk4
from benchmarks.peers.rows import Race

SIZES = f"{S} environments, {N} trajectories, {T} samples, {E} experts"


def _solved(rk4: Any, make_field: Any, x0: Tensor, dt: Tensor) -> Any:
    return rk4(make_field(), x0, dt, T)


def diffeq() -> Race:
    """The rk4 of torchdiffeq; ours is charged for the steps that it needs more, or less, for an equal error."""
    make_field, inputs, x0, dt = mixture()
    ours, theirs = (
        step(partial(_solved, rk4, make_field, x0, dt), inputs, "fwd+bwd") for rk4 in (solve_ours, their_rk4)
    )
    return Race(ours, theirs, equal=f"{SIZES}, forward and backward, at equal error", factor=error_ratio() ** 0.25)


def jax_rk4() -> Race:
    """The same solve in JAX, compiled; both must give the same path."""
    import jax

    make_field, inputs, x0, dt = mixture()
    layers, context, expert = _weights(make_field, inputs)
    solve = partial(_jax_path, jax, x0=x0.numpy(), dt=dt.numpy(), expert=expert)
    path = np.asarray(jax.jit(solve)(layers, context))
    torch.testing.assert_close(torch.tensor(path), solve_ours(make_field(), x0, dt, T).detach(), rtol=1e-3, atol=1e-4)
    gradient = jax.jit(jax.value_and_grad(lambda layers, context: solve(layers, context).sum(), argnums=(0, 1)))
    ours = step(lambda: solve_ours(make_field(), x0, dt, T), inputs, "fwd+bwd")
    return Race(ours, lambda: jax.block_until_ready(gradient(layers, context)), equal=f"{SIZES}, forward and backward")


def _weights(make_field: Any, inputs: list[Tensor]) -> tuple[list[dict[str, Any]], Any, Any]:
    """The stacks of the experts, layer by layer, the contexts, and the expert of each environment, as arrays."""
    bank = make_field.func.__self__.layer.experts
    stacks = {name: value.detach().numpy() for name, value in bank.stacks().items()}
    layers = [{name: stacks[f"{name}{i}"] for name in ("root", "bias", "down", "up")} for i in range(len(bank.sizes))]
    return layers, inputs[0].detach().numpy(), np.arange(S) % E


def _jax_path(jax: Any, layers: Any, context: Any, *, x0: Any, dt: Any, expert: Any) -> Any:
    """Paths [S, N, T, D] by the classical method; experts read their own piece of a context."""
    jnp = jax.numpy
    piece = context.reshape(S, E, -1)[jnp.arange(S), expert]

    def adapted(layer: Any, one: Any, which: Any) -> tuple[Any, Any]:
        up, low = jnp.split(layer["up"][which], 2)
        return layer["root"][which] + (layer["down"][which] * one) @ up, layer["bias"][which] + one @ low

    made = [jax.vmap(partial(adapted, layer))(piece, expert) for layer in layers]

    def field(x: Any) -> Any:
        for number, (weight, bias) in enumerate(made):
            x = jnp.einsum("sni,sio->sno", x, weight) + bias
            x = jax.nn.silu(x) if number + 1 < len(made) else x
        return x

    h = dt[:, None, None]

    def advance(x: Any, _: None) -> tuple[Any, Any]:
        k1 = field(x)
        k2 = field(x + h / 2 * k1)
        k3 = field(x + h / 2 * k2)
        new = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(x + h * k3))
        return new, new

    _, path = jax.lax.scan(advance, x0, None, length=T - 1)
    return jnp.concatenate([x0[None], path]).transpose(1, 2, 0, 3)
