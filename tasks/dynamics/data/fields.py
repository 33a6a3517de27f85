# SPDX-License-Identifier: Apache-2.0
"""Vector fields by formula, each one readable line, and the families that are made of them.

A field takes the states one by one, then the parameters, and returns the derivatives one by one. All are tensors of
one shape; the sources are Strogatz' textbook systems as ODEBench lists them (d'Ascoli et al. 2023,
sdascoli/odeformer) and the systems of Nzoyem et al. (ddrous/ncflow), written here from their formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from tasks.dynamics.nets.solvers import solve

Formula = Callable[..., tuple[Tensor, ...]]
Setting = tuple[float, ...]
"""One value per parameter: what makes an environment."""


def _glycolysis(*values: Tensor) -> tuple[Tensor, ...]:
    """Yeast glycolysis, seven species (Ruoff et al. 2003 as in Nzoyem et al. 2025)."""
    s1, s2, s3, s4, s5, s6, s7, k1, big_k1 = values
    v1 = k1 * s1 * s6 / (1 + (s6 / big_k1) ** 4)
    v2, v3, v4 = 6.0 * s2 * (1 - s5), 16.0 * s3 * (4 - s6), 100.0 * s4 * s5
    v5, v6, out = 1.28 * s6, 12.0 * s2 * s5, 13.0 * (s4 - s7)
    return (
        2.5 - v1,
        2 * v1 - v2 - v6,
        v2 - v3,
        v3 - v4 - out,
        v2 - v4 - v6,
        -2 * v1 + 2 * v3 - v5,
        0.1 * out - 1.8 * s7,
    )


def _lorenz96(sense: int) -> Formula:
    """Lorenz 1996: dx_i = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + F on a ring; sense -1 mirrors the ring."""

    def formula(*values: Tensor) -> tuple[Tensor, ...]:
        x, forcing = values[:-1], values[-1]
        n = len(x)
        return tuple(
            (x[(i + sense) % n] - x[(i - 2 * sense) % n]) * x[(i - sense) % n] - x[i] + forcing for i in range(n)
        )

    return formula


FORMULAS: dict[str, Formula] = {
    "harmonic": lambda x, y, c: (y, -c * x),
    "damped": lambda x, y, c, d: (y, -c * x - d * y),
    "pendulum": lambda x, y, c: (y, -c * x.sin()),
    "friction_pendulum": lambda x, y, c, d: (y, -c * x.sin() - d * y),
    "double_well": lambda x, y, c: (y, -c * y - x * x * x + x),
    "bead_on_hoop": lambda x, y, c: (y, (x.cos() - c) * x.sin()),
    "shear_flow": lambda x, y, c: (x.cos() / y.tan(), x.sin() * (c * y.sin() ** 2 + y.cos() ** 2)),
    "van_der_pol": lambda x, y, c: (y, -c * y * (x * x - 1) - x),
    "lienard": lambda x, y, c: (c * (y + x - x**3 / 3), -x / c),
    "glycolytic_2d": lambda x, y, a, b: (a * y + x**2 * y - x, b - a * x - x**2 * y),
    # ODEBench calls this Duffing; it is van der Pol's equation, written otherwise.
    "duffing": lambda x, y, c: (y, c * y * (1 - x * x) - x),
    "lotka_volterra": lambda x, y, a, b, d, g: (a * x - b * x * y, d * x * y - g * y),
    "brusselator": lambda x, y, b: (1 + x**2 * y - (b + 1) * x, b * x - x**2 * y),
    "selkov": lambda x, y, a, b: (-x + a * y + x**2 * y, b - a * y - x**2 * y),
    "glycolytic": _glycolysis,
    "lorenz96": _lorenz96(1),
    "lorenz96_mirrored": _lorenz96(-1),
}
"""Field name -> formula(states..., parameters...)."""

OSCILLATORS = frozenset(
    {"harmonic", "damped", "pendulum", "friction_pendulum", "double_well", "bead_on_hoop", "van_der_pol", "duffing"}
)
"""Fields of the form x' = y, y' = f(x, y), which can be made alike by mixing in one common oscillator."""


@dataclass(frozen=True)
class Family:
    """One form of equation and the environments that share it.

    Attributes:
        name: name of the family, and of its domain.
        field: key of `FORMULAS`.
        low: lower corner of the box of initial conditions, one number per state.
        high: upper corner.
        horizon: seconds of a trajectory.
        settings: group -> parameter settings. ``train`` are the environments to train on (or to adapt to, where the
            family is not seen); every other group is a domain of environments to adapt to.
        first: initial conditions that every training split begins with.
        substeps: Runge-Kutta steps between two samples of the generator.
    """

    name: str
    field: str
    low: Setting
    high: Setting
    horizon: float
    settings: Mapping[str, tuple[Setting, ...]]
    first: tuple[Setting, ...] = ()
    substeps: int = 50


def field_of(name: str, settings: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The right-hand side of S environments.

    Args:
        name: key of `FORMULAS`.
        settings: parameters [S, P].

    Returns:
        ``field(t [S], x [S, N, D]) -> [S, N, D]``; it does not depend on t.

    Raises:
        ValueError: unknown name.
    """
    if name not in FORMULAS:
        raise ValueError(f"field {name!r} is unknown; use one of {', '.join(FORMULAS)}")
    formula = FORMULAS[name]
    parameters = settings[:, None].unbind(-1)  # each [S, 1]

    def right_hand_side(t: Tensor, x: Tensor) -> Tensor:
        return torch.stack(formula(*x.unbind(-1), *parameters), -1)

    return right_hand_side


# --- grids of parameters ----------------------------------------------------------------------------------------------


def scaled(
    reference: Setting, scales: tuple[float, ...], *, vary: tuple[int, ...] | None = None
) -> tuple[Setting, ...]:
    """Settings with the parameters ``vary`` (None: all) multiplied by each scale in turn."""
    chosen = range(len(reference)) if vary is None else vary
    return tuple(tuple(v * s if i in chosen else v for i, v in enumerate(reference)) for s in scales)


def linspace(low: float, high: float, num: int) -> tuple[float, ...]:
    """``num`` evenly spaced numbers from low to high."""
    return tuple(torch.linspace(low, high, num, dtype=torch.float64).tolist())


def grid(reference: Setting, num: int, low: float, high: float) -> tuple[Setting, ...]:
    """``num`` settings of the smallest full grid of at least ``num`` points on [low, high] x reference.

    Where the grid holds more points than asked for, evenly spaced ones are kept. ddrous/MixER rounds the values to two
    decimals, which makes environments equal; they are not rounded here.
    """
    side = math.ceil(num ** (1 / len(reference)) - 1e-9)
    points = list(product(*[[v * s for s in linspace(low, high, side)] for v in reference]))
    return tuple(points[round(i)] for i in linspace(0, len(points) - 1, num))


# --- sets of families -------------------------------------------------------------------------------------------------

TRAIN_SCALES = (0.8, 0.9, 1.0, 1.1, 1.2)
# Off the training grid, and no two groups share a setting.
ODEFAM_SCALES = {"train": TRAIN_SCALES, "between": (0.95, 1.05), "inside": (0.85, 1.15), "outside": (0.7, 1.3)}


def _odefam(
    name: str, reference: Setting, low: Setting, high: Setting, horizon: float, vary: int = 0, field: str = ""
) -> Family:
    settings = {group: scaled(reference, scales, vary=(vary,)) for group, scales in ODEFAM_SCALES.items()}
    return Family(name, field or name, low, high, horizon, settings)


ODEFAM: tuple[Family, ...] = (
    _odefam("harmonic", (2.1,), (0.5, 0.5), (0.75, 0.75), 6),
    _odefam("lotka_volterra", (0.5, 0.75, 0.5, 0.5), (1.0, 1.0), (2.0, 2.0), 8, vary=1),
    _odefam("double_well", (0.1,), (-0.7, -0.7), (-0.5, -0.5), 8),
    _odefam("van_der_pol", (0.886,), (0.3, 0.0), (0.4, 0.1), 8),
    _odefam("damped", (4.5, 0.43), (0.5, 0.5), (0.75, 0.75), 6),
    _odefam("pendulum", (0.9, 0.15), (1.5, 0.0), (2.2, 0.3), 8, field="friction_pendulum"),
    _odefam("selkov", (0.1, 0.6), (0.5, 0.5), (1.5, 1.5), 12, vary=1),
    _odefam("brusselator", (2.5,), (1.0, 1.0), (1.5, 2.0), 8),
)
"""Small, smooth and bounded families. The first four are the default seen ones."""

_ODEBENCH: tuple[tuple[str, Setting, Setting, Setting, float], ...] = (
    ("harmonic", (2.1,), (0.4, -0.03), (0.0, 0.2), 10),
    ("damped", (4.5, 0.43), (0.12, 0.043), (0.0, -0.3), 8),
    ("pendulum", (0.9,), (-1.9, 0.0), (0.3, 0.8), 15),
    ("double_well", (0.18,), (-1.8, -1.8), (-2.8, 1.0), 5),
    ("bead_on_hoop", (0.93,), (2.1, 0.0), (-1.2, -0.2), 20),
    ("shear_flow", (4.2,), (1.13, -0.3), (0.7, -1.7), 5),
    ("van_der_pol", (0.43,), (2.2, 0.0), (0.1, 3.2), 15),
    ("lienard", (3.37,), (0.7, 0.0), (-1.1, -0.7), 15),
    ("glycolytic_2d", (2.4, 0.07), (0.4, 0.31), (0.2, -0.7), 4),
    ("duffing", (0.886,), (0.63, -0.03), (0.2, 0.2), 10),
)
ODEBENCH_ALIKE: tuple[frozenset[str], ...] = (
    frozenset({"van_der_pol", "duffing"}),
    frozenset({"harmonic", "damped"}),
)
"""Families of ODEBench that no router can tell apart by their field: the same one, and one with the other as its limit
(which the settings do not reach, but nothing marks the border)."""


def odebench(num: int) -> tuple[Family, ...]:
    """The ten planar families with ``num`` training environments each.

    Parameters lie on linspace(0.9, 1.1) x reference, new environments on its diagonal: 0.8, 0.933, 1.067, 1.2 as in
    ddrous/MixER (there the support and the query trajectories came from different grids), and 0.96, 1.04 for choices.
    """
    inner, outer = (14 / 15, 16 / 15), (0.8, 1.2)
    families = []
    for name, reference, first, second, horizon in _ODEBENCH:
        settings = {
            "train": grid(reference, num, 0.9, 1.1),
            "between": scaled(reference, (0.96, 1.04)),
            "inside": scaled(reference, inner),
            "outside": scaled(reference, outer),
        }
        low, high = tuple(map(min, first, second)), tuple(map(max, first, second))
        families.append(Family(name, name, low, high, horizon, settings, first=(first, second)))
    return tuple(families)


def _pairs(first: tuple[float, ...], second: tuple[float, ...]) -> tuple[Setting, ...]:
    return tuple(product(first, second))


_LV_B_D = {
    "train": _pairs((0.5, 0.75, 1.0), (0.5, 0.75, 1.0)),
    "between": _pairs((0.6, 0.9), (0.6, 0.9)),
    "adapt": _pairs((0.625, 1.125), (0.625, 1.125)),
}
LOTKA_VOLTERRA: tuple[Family, ...] = (
    Family(
        "lotka_volterra",
        "lotka_volterra",
        (1.0, 1.0),
        (3.0, 3.0),
        9.5,
        {group: tuple((0.5, b, d, 0.5) for b, d in pairs) for group, pairs in _LV_B_D.items()},
    ),
)

GLYCOLYTIC: tuple[Family, ...] = (
    Family(
        "glycolytic",
        "glycolytic",
        (0.15, 0.19, 0.04, 0.10, 0.08, 0.14, 0.05),
        (1.60, 2.16, 0.20, 0.35, 0.30, 2.67, 0.10),
        0.95,
        {
            "train": _pairs((100.0, 90.0, 80.0), (1.0, 0.75, 0.5)),
            "between": _pairs((87.5, 97.5), (0.6, 0.9)),
            "adapt": _pairs((85.0, 95.0), (0.625, 0.875)),
        },
    ),
)


def _selkov(name: str, train: tuple[float, ...], between: tuple[float, ...], adapt: tuple[float, ...]) -> Family:
    values = {"train": train, "between": between, "adapt": adapt}
    settings = {group: tuple((0.1, b) for b in bs) for group, bs in values.items()}
    return Family(name, "selkov", (0.0, 0.0), (3.0, 3.0), 40, settings, substeps=200)


SELKOV: tuple[Family, ...] = (
    _selkov("selkov_negative", linspace(-1, -0.25, 7), (-0.45,), (-1.25, -0.65)),
    _selkov("selkov_small", linspace(-0.1, 0.1, 7), (0.05,), (-0.05, 0.02)),
    _selkov("selkov_positive", linspace(0.25, 1, 7), (0.45,), (0.6, 1.2)),
)
"""One equation in three ranges of b, which behave differently; the ranges are the hidden labels."""


def _lorenz(name: str, centre: float) -> Family:
    box = (centre - 2.0,) * 10, (centre + 2.0,) * 10
    settings = {
        "train": tuple((f,) for f in linspace(7.0, 9.0, 32)),
        "between": ((7.3,), (8.7,)),
        "inside": tuple((f,) for f in linspace(7.1, 8.9, 5)),
        "outside": tuple((f,) for f in (6.2, 6.5, 9.5, 9.8, 10.0)),
    }
    return Family(name, name, *box, 3.0, settings, substeps=10)


LORENZ: tuple[Family, ...] = (_lorenz("lorenz96", 2.0), _lorenz("lorenz96_mirrored", 2.0))
"""OUR definition: 64 + 20 environments of ten states. What the authors' Lorenz set of this size is, is not known."""


# --- trajectories -----------------------------------------------------------------------------------------------------


def integrate(
    family: Family, settings: Tensor, x0: Tensor, num_samples: int, *, likeness: float = 0.0, refine: int = 1
) -> Tensor:
    """Integrate environments of one family with Runge-Kutta steps of order 4.

    Args:
        family: its field, horizon and number of steps.
        settings: parameters [S, P].
        x0: initial conditions [S, N, D]; float64 for data.
        num_samples: T.
        likeness: share of the oscillator x'' = -x that is mixed into the field of an oscillator, in [0, 1): 0 leaves
            the families as they are, towards 1 they become one.
        refine: multiple of the family's substeps.

    Returns:
        [S, N, T, D] in the type of x0.

    Raises:
        ValueError: likeness outside [0, 1), or above 0 for a family that is none of `OSCILLATORS`.
    """
    check_likeness(family, likeness)
    own = field_of(family.field, settings)
    swirl = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=x0.dtype)

    def mixed(t: Tensor, x: Tensor) -> Tensor:
        return (1 - likeness) * own(t, x) + likeness * (x @ swirl)

    dt = x0.new_full((len(x0),), family.horizon / (num_samples - 1))
    steps = family.substeps * refine
    return solve(mixed if likeness else own, x0, 0.0, dt, num_samples, substeps=steps)


def check_likeness(family: Family, likeness: float) -> None:
    """Raise ValueError unless the family can be mixed with the common oscillator in this share."""
    if not 0 <= likeness < 1:
        raise ValueError(f"likeness={likeness} is not allowed; use a number from 0 to below 1")
    if likeness > 0 and family.field not in OSCILLATORS:
        raise ValueError(
            f"family {family.name!r} is not an oscillator and cannot be made alike (likeness={likeness}); use families "
            f"of {', '.join(sorted(OSCILLATORS))}"
        )
