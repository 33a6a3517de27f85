# SPDX-License-Identifier: Apache-2.0
"""Batched fixed-step solvers of ordinary differential equations with a step size per environment.

S environments, N trajectories per environment, T samples, D state size. All trajectories take their steps together,
so a solve costs ``stages * substeps * (T - 1)`` calls of the field, whatever the horizons are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
"""``field(t [S], x [S, N, D]) -> dx/dt [S, N, D]``."""

Method = Literal["euler", "heun", "rk4", "dopri5"]


def solve(
    field: Field,
    x0: Tensor,
    t0: Tensor | float,
    dt: Tensor,
    num_steps: int,
    *,
    method: Method = "rk4",
    substeps: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> Tensor:
    """Integrate dx/dt = field(t, x) and return the states at t0, t0 + dt, ... of every environment.

    euler (order 1), heun (explicit trapezoidal rule, order 2) and rk4 (the classical method, order 4) take
    ``substeps`` equal steps between two samples. dopri5 chooses its steps by error, one size for the whole batch; it
    is torchdiffeq's (``pip install -e '.[dynamics]'``).

    Nothing is hidden where a solution leaves the range of its type: it becomes inf or nan from that sample on, in its
    own trajectory only; `diverged` says which ones. dopri5 then starts anew at every sample, without the ones that
    stop it, which takes longer.

    Args:
        field: right-hand side, called as ``field(t [S], x [S, N, D])``; must not change x in place.
        x0: initial states [S, N, D]; its dtype is that of the solution.
        t0: first time, [S] or one number for all.
        dt: time between two samples [S], positive.
        num_steps: T, number of samples including the first; at least 1.
        method: euler, heun, rk4 or dopri5.
        substeps: steps between two samples, at least 1; not for dopri5.
        rtol: relative tolerance of dopri5.
        atol: absolute tolerance of dopri5.

    Returns:
        [S, N, T, D].

    Raises:
        ValueError: a wrong shape, an unknown method, or a count below 1.
        ImportError: dopri5 without torchdiffeq.
    """
    S = x0.shape[0] if x0.dim() == 3 else -1
    if x0.dim() != 3 or dt.shape != (S,):
        raise ValueError(f"x0 has shape {tuple(x0.shape)}, dt {tuple(dt.shape)}; they must be [S, N, D] and [S]")
    if num_steps < 1 or substeps < 1:
        raise ValueError(f"num_steps={num_steps} and substeps={substeps} must be 1 or more")
    dt = dt.to(x0.dtype)
    t0 = torch.as_tensor(t0, dtype=x0.dtype, device=x0.device).expand(S)
    if method == "dopri5":
        return _adaptive(field, x0, t0, dt, num_steps, rtol, atol)
    if method not in _STEPS:
        raise ValueError(f"method={method!r} is unknown; use one of {', '.join([*_STEPS, 'dopri5'])}")
    return _fixed(_STEPS[method], field, x0, t0, dt, num_steps, substeps)


def diverged(x: Tensor, limit: float = float("inf")) -> Tensor:
    """Tell which trajectories hold a state that is not finite or is larger than ``limit``.

    Args:
        x: states [..., T, D].
        limit: largest absolute value that counts as finite.

    Returns:
        bool [...].
    """
    # The comparison is False for nan; <= limit alone would let inf pass where limit is inf.
    return ~((x.abs() <= limit) & x.isfinite()).flatten(-2).all(-1)


# --- fixed steps ------------------------------------------------------------------------------------------------------

# A step takes the times t, t + h/2 and t + h [S], the state and h, h/2, h/6 [S, 1, 1]. Steps are written with few
# kernels: at the sizes of this task the launch of a kernel costs more than its arithmetic.
_Step = Callable[[Field, tuple[Tensor, Tensor, Tensor], Tensor, tuple[Tensor, Tensor, Tensor]], Tensor]


def _euler(field: Field, t: tuple[Tensor, Tensor, Tensor], x: Tensor, h: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.addcmul(x, h[0], field(t[0], x))


def _heun(field: Field, t: tuple[Tensor, Tensor, Tensor], x: Tensor, h: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    k1 = field(t[0], x)
    k2 = field(t[2], torch.addcmul(x, h[0], k1))
    return torch.addcmul(x, h[1], k1 + k2)


def _rk4(field: Field, t: tuple[Tensor, Tensor, Tensor], x: Tensor, h: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    k1 = field(t[0], x)
    k2 = field(t[1], torch.addcmul(x, h[1], k1))
    k3 = field(t[1], torch.addcmul(x, h[1], k2))
    k4 = field(t[2], torch.addcmul(x, h[0], k3))
    # In place on fresh sums only: addition keeps none of its inputs for backward.
    total = torch.add(k1, k2 + k3, alpha=2).add_(k4)  # k1 + 2 k2 + 2 k3 + k4
    return torch.addcmul(x, h[2], total)


_STEPS: dict[str, _Step] = {"euler": _euler, "heun": _heun, "rk4": _rk4}


def _fixed(step: _Step, field: Field, x: Tensor, t0: Tensor, dt: Tensor, num_steps: int, substeps: int) -> Tensor:
    halves = torch.arange(2 * substeps * (num_steps - 1) + 1, dtype=x.dtype, device=x.device) / (2 * substeps)
    times = (t0 + halves[:, None] * dt).unbind()  # every half step, computed at once; each [S]
    width = (dt / substeps)[:, None, None]
    h = (width, width / 2, width / 6)
    states = [x]
    for n in range(substeps * (num_steps - 1)):
        x = step(field, (times[2 * n], times[2 * n + 1], times[2 * n + 2]), x, h)
        if (n + 1) % substeps == 0:
            states.append(x)
    return torch.stack(states, dim=2)  # [S, N, T, D]


# --- adaptive steps ---------------------------------------------------------------------------------------------------


def _adaptive(field: Field, x0: Tensor, t0: Tensor, dt: Tensor, num_steps: int, rtol: float, atol: float) -> Tensor:
    try:
        import torchdiffeq
    except ImportError as error:
        raise ImportError(
            "method='dopri5' needs torchdiffeq: pip install -e '.[dynamics]'; or use rk4 with more substeps"
        ) from error
    factor = dt[:, None, None]

    def in_samples(s: Tensor, x: Tensor) -> Any:  # time in samples, so that every environment has the grid 0, 1, ...
        return field(t0 + s * dt, x) * factor

    if num_steps == 1:
        return x0[:, :, None]
    grid = torch.arange(num_steps, dtype=x0.dtype, device=x0.device)

    def path(x: Tensor, times: Tensor, alive: Tensor | None = None) -> Tensor | None:
        """States [T, S, N, D], those not ``alive`` [S, N] at rest; None where no step is small enough."""
        right = in_samples if alive is None else _at_rest(in_samples, alive)
        options = None if alive is None else {"norm": lambda e: e[alive].square().mean().sqrt()}
        try:
            found: Tensor = torchdiffeq.odeint(right, x, times, rtol=rtol, atol=atol, method="dopri5", options=options)
        except AssertionError:  # the step has become 0, or its error nan
            return None
        return found

    whole = path(x0, grid)
    return (_by_sample(path, x0, grid) if whole is None else whole).permute(1, 2, 0, 3)


_Path = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]


def _at_rest(field: Callable[[Tensor, Tensor], Any], alive: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, x: torch.where(alive[..., None], field(s, x), 0.0)


def _by_sample(path: _Path, x: Tensor, grid: Tensor) -> Tensor:
    """Integrate from sample to sample; a trajectory that cannot be followed is inf from then on: [T, S, N, D].

    Trajectories share their steps, so one that explodes stops all. Halving the set finds it in few further solves.
    """
    alive = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    states = [x]
    for times in grid.unfold(0, 2, 1):
        groups, following, done = [alive], x, torch.zeros_like(alive)
        while groups:
            group = groups.pop()
            number = int(group.sum())
            found = path(x, times, group) if number else None
            if found is not None and bool(found[-1][group].isfinite().all()):
                following, done = torch.where(group[..., None], found[-1], following), done | group
            elif number > 1:
                first = group & (group.flatten().cumsum(0).view_as(group) <= number // 2)
                groups += [first, group & ~first]
        alive = done
        states.append(torch.where(alive[..., None], following, torch.inf))
        x = torch.where(alive[..., None], following, states[0])
    return torch.stack(states)
