# SPDX-License-Identifier: Apache-2.0
"""Cost of solving a mixture of vector fields: ``python -m benchmarks.dynamics_speed --json FILE [--pairs 9]``.

Our batched Runge-Kutta solver is compared with torchdiffeq's ``rk4`` on the same fields, by CPU time on one thread, in
pairs of alternating order. torchdiffeq takes the 3/8 rule, whose error differs by a constant: the ratio at EQUAL ERROR
is the ratio at equal steps times (our error / theirs)^(1/4), since a method of order 4 must take that many times as
many steps. The errors are measured in double precision on the families that the base config trains on.

Fails (exit status 1) when a ratio at equal error exceeds `GATE`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torchdiffeq
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.core import machine
from benchmarks.core_cases import Mode, median_ms, paired_ratios, step
from benchmarks.steps import command
from tasks.dynamics.data.families import OdeFamilies
from tasks.dynamics.data.fields import field_of
from tasks.dynamics.model import FieldMixER
from tasks.dynamics.nets.experts import GEPSExperts
from tasks.dynamics.nets.gates import robust
from tasks.dynamics.nets.solvers import Field, solve

GATE = 1.1
"""Our time over torchdiffeq's at equal error; agreed beforehand."""
S, N, T, E, WIDTH = 64, 4, 20, 4, 32
Case = Literal["mixture", "network"]
Solver = Callable[[Field, Tensor, Tensor, int], Tensor]


Built = tuple[Callable[[], Field], list[Tensor], Tensor, Tensor]
"""What makes the field of a solve (once each, as in training), inputs of the gradient, x0, dt."""


def mixture() -> Built:
    """Four GEPS experts, 16 environments each, contexts put into weights once per solve."""
    torch.manual_seed(0)
    experts = partial(GEPSExperts, width=WIDTH, activation="silu")
    net = FieldMixER(
        {"state_dim": 2, "num_environments": S}, experts=experts, gate=robust(), num_experts=E, context_dim=4 * E
    )
    context_Sc = (0.1 * torch.randn(S, 4 * E)).requires_grad_()
    routing = net.route_to(torch.arange(S) % E, context_Sc.detach())
    inputs = [context_Sc, *net.layer.experts.parameters()]
    return partial(net.field, context_Sc, routing, N), inputs, torch.randn(S, N, 2), torch.linspace(0.2, 0.5, S)


def network() -> Built:
    """One small network for all environments, where the solver's own work weighs most."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2))
    return lambda: lambda t, x: net(x), list(net.parameters()), torch.randn(S, N, 2), torch.linspace(0.2, 0.5, S)


CASES: dict[Case, Callable[[], Built]] = {"mixture": mixture, "network": network}


def their_rk4(field: Field, x0: Tensor, dt: Tensor, num_steps: int) -> Tensor:
    """The rk4 of torchdiffeq with one step between two samples, time counted in samples: [S, N, T, D]."""
    factor = dt[:, None, None]
    grid = torch.arange(num_steps, dtype=x0.dtype)
    path: Tensor = torchdiffeq.odeint(lambda s, x: field(s * dt, x) * factor, x0, grid, method="rk4")
    return path.permute(1, 2, 0, 3)


def solve_ours(field: Field, x0: Tensor, dt: Tensor, num_steps: int) -> Tensor:
    """Our rk4 with one step between two samples: [S, N, T, D]."""
    return solve(field, x0, 0.0, dt, num_steps)


def _solve(solver: Solver, make_field: Callable[[], Field], x0: Tensor, dt: Tensor) -> Tensor:
    return solver(make_field(), x0, dt, T)


def error_ratio() -> float:
    """Our error over torchdiffeq's at equal steps: root mean square over the default seen families, in float64."""
    ours, theirs = [], []
    source = OdeFamilies()
    for name in source.default_seen:
        family = source.catalogue[name]
        settings = torch.tensor(family.settings["train"], dtype=torch.float64)
        box = torch.tensor([family.low, family.high], dtype=torch.float64)
        x0 = box.expand(len(settings), 2, len(family.low)).contiguous()
        dt = torch.full((len(settings),), family.horizon / (T - 1), dtype=torch.float64)
        field = field_of(family.field, settings)
        truth = solve(field, x0, 0.0, dt, T, substeps=100)
        ours.append((solve(field, x0, 0.0, dt, T) - truth).flatten())
        theirs.append((their_rk4(field, x0, dt, T) - truth).flatten())
    return float(torch.cat(ours).norm() / torch.cat(theirs).norm())


def measure(*, pairs: int) -> dict[str, Any]:
    """All comparisons."""
    more_steps = error_ratio() ** 0.25
    rows: dict[str, Any] = {}
    modes: tuple[Mode, ...] = ("forward", "fwd+bwd")
    for name, build in CASES.items():
        make_field, inputs, x0, dt = build()
        for mode in modes:
            candidate = step(partial(_solve, solve_ours, make_field, x0, dt), inputs, mode)
            reference = step(partial(_solve, their_rk4, make_field, x0, dt), inputs, mode)
            ratios = paired_ratios(candidate, reference, pairs=pairs)
            ratio = statistics.median(ratios)
            rows[f"{name}, {mode}"] = {
                "ms": median_ms(candidate, samples=min(pairs, 5)),
                "pairs": ratios,
                "ratio": ratio,
                "at_equal_error": ratio * more_steps,
                "gate": GATE,
                "ok": ratio * more_steps <= GATE,
            }
    return {
        "command": "python -m benchmarks.dynamics_speed --json benchmarks/results/dynamics_speed.json",
        "machine": machine(),
        "torchdiffeq": torchdiffeq.__version__,
        "size": {"environments": S, "trajectories": N, "samples": T, "experts": E, "width": WIDTH},
        "steps_for_equal_error": more_steps,
        "over_torchdiffeq_rk4": rows,
    }


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    table = Table("a solve", "CPU ms", "over torchdiffeq", "at equal error", "gate")
    for name, row in report["over_torchdiffeq_rk4"].items():
        cells = [f"{row[key]:.2f}" for key in ("ms", "ratio", "at_equal_error", "gate")]
        table.add_row(name, *cells, style=None if row["ok"] else "red")
    Console(highlight=False).print(table)


def main(args: list[str] | None = None) -> int:
    """Measure, print, write; 1 when a gate is missed."""

    def ok(report: dict[str, Any]) -> bool:
        return all(row["ok"] for row in report["over_torchdiffeq_rk4"].values())

    return command("dynamics_speed", __doc__, args, measure=measure, show=show, ok=ok)


if __name__ == "__main__":
    raise SystemExit(main())
