# SPDX-License-Identifier: Apache-2.0
"""Trajectories of a new system, a file or arrays, as a batch of one environment to adapt to.

Shape legend: N observed and M wanted trajectories, T samples, G given samples, D state size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeapps.data.images.arrays import read_array
from moeapps.data.numbers import real_numbers
from tasks.dynamics.data.batch import Trajectories
from tasks.dynamics.data.source import increment_scale


def environment_of(
    inputs: Any, state_dim: int, *, dt: float | None, start: Any, steps: int | None
) -> tuple[Trajectories, int]:
    """Make a batch of one environment: observed trajectories, and where the wanted ones start.

    Args:
        inputs: what was observed: an array [N, T, D] or [T, D], a .npy file of one, or a .csv file as
            docs/series_formats.md describes; nan where a sample is missing.
        state_dim: D.
        dt: seconds between samples; None means 1, or what the .csv file says.
        start: initial states [M, D], or leading samples [M, G, D]; None starts where the observed ones start.
        steps: samples of each wanted trajectory, the given ones included; None means T.

    Returns:
        The batch, whose query has at least so many samples, and ``steps``.

    Raises:
        ValueError: another form, other than real numbers, infinity, too few samples, or a step that is not above 0.
    """
    seen, own_dt = _read(inputs)
    seconds = own_dt if dt is None else dt
    seen = _three(seen, "observed trajectories", state_dim)
    if seen.shape[1] < 2 or not np.isfinite(seconds) or not seconds > 0:
        raise ValueError(f"{seen.shape[1]} samples, dt={seconds}; give 2 samples or more, and seconds above 0")
    given = seen[:, :1] if start is None else real_numbers(start, "start")
    given = _three(given[:, None] if given.ndim == 2 else given, "start", state_dim)
    steps = seen.shape[1] if steps is None else steps
    if steps <= given.shape[1] or not np.isfinite(given).all():
        raise ValueError(
            f"steps={steps}, {given.shape[1]} given samples; ask for more samples than are given, all known"
        )
    length = max(steps, seen.shape[1])
    x = np.full((len(seen) + len(given), length, state_dim), np.nan, np.float32)
    x[: len(seen), : seen.shape[1]], x[len(seen) :, : given.shape[1]] = seen, given
    mask = np.asarray(np.isfinite(x).all(-1))
    none = torch.tensor([-1])
    batch = Trajectories(
        x=torch.from_numpy(np.nan_to_num(x)[None]),
        dt=torch.tensor([seconds], dtype=torch.float32),
        env=none,
        family=none,
        mask=torch.from_numpy(mask[None]),
        scale=torch.from_numpy(increment_scale(seen[None].astype(np.float64)).astype(np.float32)),
        num_support=len(seen),
        num_given=given.shape[1],
    )
    return batch, steps


def _read(inputs: Any) -> tuple[NDArray[Any], float]:
    if not isinstance(inputs, str | Path):
        return real_numbers(inputs, "what was observed"), 1.0
    path = Path(inputs)
    if not path.is_file() or path.suffix.lower() not in (".npy", ".csv"):
        raise ValueError(f"{path}: no such file of .npy or .csv; give one, or an array [N, T, D]")
    if path.suffix.lower() == ".csv":
        from tasks.dynamics.data.readers.csv_format import read_csv  # pyarrow, which a training on arrays never needs

        held = read_csv(path)
        longest = max(len(part) for part in held.series)
        padded = [np.pad(part, ((0, longest - len(part)), (0, 0)), constant_values=np.nan) for part in held.series]
        return np.stack(padded), held.dt
    return real_numbers(read_array(path), str(path)), 1.0


def _three(x: NDArray[Any], what: str, state_dim: int) -> NDArray[np.float32]:
    x = x[None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[2] != state_dim or not len(x):
        raise ValueError(f"{what} of shape {x.shape}; give (trajectories, samples, {state_dim})")
    with np.errstate(over="ignore"):
        found = x.astype(np.float32)
    if np.isinf(found).any():
        raise ValueError(f"{what} hold infinity, or numbers that float32 cannot; leave nan where a sample is missing")
    return found
