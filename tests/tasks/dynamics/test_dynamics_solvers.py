# SPDX-License-Identifier: Apache-2.0
"""Solvers against exact solutions, conservation and an independent implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks.dynamics.nets.solvers import Method, diverged, solve

F64 = torch.float64
ORDERS: dict[Method, int] = {"euler": 1, "heun": 2, "rk4": 4}
DT = torch.tensor([0.3, 0.45, 0.6], dtype=F64)


def linear_systems() -> tuple[Tensor, Tensor]:
    """Three stable oscillating systems of three states [S, D, D] and initial states [S, N, D]."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(3, 3, 3, generator=generator, dtype=F64)
    return (raw - raw.mT) - 0.1 * torch.eye(3, dtype=F64), torch.randn(3, 2, 3, generator=generator, dtype=F64)


def exact(matrices: Tensor, x0: Tensor, num_steps: int) -> Tensor:
    times = torch.arange(num_steps, dtype=F64)[None, :] * DT[:, None]
    flow = torch.linalg.matrix_exp(matrices[:, None] * times[..., None, None])  # [S, T, D, D]
    return torch.einsum("etij,enj->enti", flow, x0)


@pytest.mark.parametrize("method", ORDERS)
def test_order_of_convergence(method: Method) -> None:
    matrices, x0 = linear_systems()
    truth = exact(matrices, x0, 8)

    def error(substeps: int) -> float:
        x = solve(lambda t, x: x @ matrices.mT, x0, 0.0, DT, 8, method=method, substeps=substeps)
        return float((x - truth).norm())

    coarse = {"euler": 512, "heun": 64, "rk4": 16}[method]
    assert math.log2(error(coarse) / error(2 * coarse)) == pytest.approx(ORDERS[method], abs=0.1)


@pytest.mark.parametrize("method", ORDERS)
def test_order_where_the_field_depends_on_time(method: Method) -> None:
    """dx/dt = 4 t^3 x: a stage evaluated at a wrong time would lower the order."""
    t0, dt = torch.tensor([0.0, 0.2], dtype=F64), torch.tensor([0.2, 0.15], dtype=F64)
    times = t0[:, None] + dt[:, None] * torch.arange(6)
    truth = torch.exp(times**4 - times[:, :1] ** 4)[:, None, :, None]

    def error(substeps: int) -> float:
        x = solve(lambda t, x: 4 * t[:, None, None] ** 3 * x, torch.ones(2, 1, 1, dtype=F64), t0, dt, 6, method=method,
                  substeps=substeps)  # fmt: skip
        return float((x - truth).norm())

    coarse = {"euler": 256, "heun": 32, "rk4": 8}[method]
    assert math.log2(error(coarse) / error(2 * coarse)) == pytest.approx(ORDERS[method], abs=0.1)


def test_environments_with_their_own_steps_equal_solving_each_alone() -> None:
    matrices, x0 = linear_systems()
    whole = solve(lambda t, x: x @ matrices.mT, x0, 0.0, DT, 5)

    for e in range(3):
        alone = solve(lambda t, x, e=e: x @ matrices[e].T, x0[e : e + 1], 0.0, DT[e : e + 1], 5)
        torch.testing.assert_close(whole[e : e + 1], alone)


def test_harmonic_energy_drifts_no_more_than_the_method_allows() -> None:
    """Runge-Kutta 4 loses h^6 / 72 of the amplitude's square per step of x'' = -x."""
    h, steps = 0.1, 2000
    x0 = torch.tensor([[[1.0, 0.0]]], dtype=F64)
    swirl = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    x = solve(lambda t, x: x @ swirl, x0, 0.0, torch.tensor([h], dtype=F64), steps + 1)
    energy = x.square().sum(-1).flatten()

    assert float(1 - energy[-1]) == pytest.approx(steps * h**6 / 72, rel=0.01)
    assert (energy.diff() <= 0).all()


def test_gradients_are_those_of_finite_differences() -> None:
    matrices, x0 = linear_systems()
    dt = DT.clone()

    def last(matrices: Tensor, x0: Tensor) -> Tensor:
        return solve(lambda t, x: torch.tanh(x @ matrices.mT), x0, 0.0, dt, 3, substeps=2)

    for method in ORDERS:
        assert torch.autograd.gradcheck(
            lambda m, x, method=method: solve(lambda t, y: torch.tanh(y @ m.mT), x, 0.0, dt, 3, method=method),
            (matrices.clone().requires_grad_(), x0.clone().requires_grad_()),
        )
    assert torch.autograd.gradcheck(last, (matrices.clone().requires_grad_(), x0.clone().requires_grad_()))


def test_agreement_with_torchdiffeq() -> None:
    matrices, x0 = linear_systems()

    def field(t: Tensor, x: Tensor) -> Tensor:
        return torch.sin(x @ matrices.mT)

    fine = solve(field, x0, 0.0, DT, 9, substeps=40)
    adaptive = solve(field, x0, 0.0, DT, 9, method="dopri5", rtol=1e-9, atol=1e-10)
    one = DT[:1].expand(3).clone()
    grid = torch.arange(9, dtype=F64) * DT[0]
    theirs: Any = torchdiffeq.odeint(
        lambda t, x: field(t, x), x0, grid, method="rk4", options={"step_size": float(DT[0]) / 40}
    )

    torch.testing.assert_close(adaptive, fine, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(
        theirs.permute(1, 2, 0, 3), solve(field, x0, 0.0, one, 9, substeps=40), atol=1e-7, rtol=0
    )


def test_adaptive_solver_sees_the_time_of_each_environment() -> None:
    dt, t0 = torch.tensor([0.5, 1.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    x = solve(lambda t, x: t[:, None, None].expand_as(x), torch.zeros(2, 1, 1, dtype=F64), t0, dt, 4, method="dopri5")
    times = t0[:, None] + dt[:, None] * torch.arange(4)

    torch.testing.assert_close(x[:, 0, :, 0], (times**2 - times[:, :1] ** 2) / 2)


@pytest.mark.parametrize("method", ["euler", "heun", "rk4", "dopri5"])
def test_one_sample_is_the_initial_state(method: Method) -> None:
    x0 = torch.randn(2, 3, 4)

    torch.testing.assert_close(solve(lambda t, x: x, x0, 0.0, torch.ones(2), 1, method=method), x0[:, :, None])


def test_divergence_is_reported_and_stays_in_its_trajectory() -> None:
    """dx/dt = x^2 blows up at t = 1 / x0."""
    x0 = torch.tensor([[[0.1], [5.0]], [[0.2], [-1.0]]])
    x = solve(lambda t, x: x**2, x0, 0.0, torch.full((2,), 0.5), 12)

    assert diverged(x).tolist() == [[False, True], [False, False]]
    assert x[0, 0].isfinite().all()
    assert x[1].isfinite().all()


def test_divergence_beyond_a_limit_counts_too() -> None:
    x = torch.tensor([[[1.0], [2.0]], [[1.0], [-30.0]], [[math.nan], [0.0]], [[0.0], [math.inf]]])

    assert diverged(x).tolist() == [False, False, True, True]
    assert diverged(x, limit=10.0).tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"substeps": 0}, "substeps=0"),
        ({"dt": torch.ones(3)}, r"dt \(3,\)"),
        ({"x0": torch.ones(2, 3)}, r"x0 has shape \(2, 3\)"),
        ({"method": "rk5"}, "euler, heun, rk4, dopri5"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {"x0": torch.ones(2, 1, 1), "t0": 0.0, "dt": torch.ones(2), "num_steps": 3} | change

    with pytest.raises(ValueError, match=text):
        solve(lambda t, x: x, **arguments)


STARTS = st.floats(-5, 5).filter(lambda v: abs(v) > 1e-3)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(STARTS, min_size=2, max_size=2), min_size=1, max_size=2), st.sampled_from(["rk4", "dopri5"]))
def test_an_exploding_trajectory_spoils_no_other(starts: list[list[float]], method: Method) -> None:
    """x' = x^2 has the solution x0 / (1 - x0 t): what explodes before the end is told, all else is right."""
    x0, dt = torch.tensor(starts, dtype=F64)[..., None], 0.25
    found = solve(lambda t, x: x**2, x0, 0.0, torch.full((len(starts),), dt, dtype=F64), 8, method=method, substeps=40)
    t = dt * torch.arange(8, dtype=F64)
    exact = x0 / (1 - x0 * t)
    gap = (1 - x0 * t).abs().amin(2)  # close to its explosion no solver can follow it
    fine, explodes = (x0[..., 0] * t[-1] < 1) & (gap > 0.2), (x0[..., 0] * t[-1] > 1) & (gap > 0.01)

    torch.testing.assert_close(found[fine][..., 0], exact[fine], rtol=1e-3, atol=1e-4)
    if method == "dopri5":  # equal steps may jump over a pole
        assert diverged(found)[explodes].all()
        before = explodes[..., None] & (x0 * t < 0.8)
        torch.testing.assert_close(found[..., 0][before], exact[before], rtol=1e-3, atol=1e-4)


def test_gradients_pass_by_an_exploding_trajectory() -> None:
    """Those of the others are the derivatives of x0 / (1 - x0 t), 1 / (1 - x0 t)^2."""
    x0 = torch.tensor([[[0.1], [5.0], [-1.0]]], dtype=F64, requires_grad=True)
    x = solve(lambda t, x: x**2, x0, 0.0, torch.tensor([0.5], dtype=F64), 4, method="dopri5")
    x[0, [0, 2], -1].sum().backward()
    assert x0.grad is not None

    expected = 1 / (1 - x0.detach()[0, [0, 2]] * 1.5) ** 2
    torch.testing.assert_close(x0.grad[0, [0, 2]], expected, rtol=1e-3, atol=1e-4)
    assert x0.grad[0, 1] == 0
