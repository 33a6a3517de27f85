# SPDX-License-Identifier: Apache-2.0
"""How well trajectories are reconstructed, and how well experts recover the hidden families.

S environments, N trajectories per environment, T samples, D state size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.sparse import check_sparse_tensor_invariants
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.clustering import adjusted_rand_score
from torchmetrics.utilities.data import dim_zero_cat

from tasks.dynamics.nets.solvers import diverged

Error = Literal["mse", "relative_mse", "diverged"]
Summary = Literal["mean", "median"]

TAU = 1e-2
"""Relative squared error below which an environment counts as reconstructed."""


def environment_errors(pred: Tensor, truth: Tensor, scored: Tensor | None = None) -> dict[str, Tensor]:
    """Errors of each environment.

    ``mse`` = mean over trajectories, times and dimensions of (pred - truth)^2.
    ``relative_mse`` = mean over trajectories and times of ||pred - truth||^2 / ||max(|truth|, 1e-6)||^2.
    ``diverged`` = share of trajectories with a scored sample whose prediction is not finite at one; their squared
        errors count as inf.

    Args:
        pred: [S, N, T, D].
        truth: [S, N, T, D].
        scored: bool [S, N, T], False where a sample is missing or was given; None scores all.

    Returns:
        name -> float64 [S]; nan where an environment has no scored sample.

    Raises:
        ValueError: shapes that differ.

    Source: Nzoyem et al. 2025, public code (``rel_l2``) for the relative error; the share is ours.
    """
    if pred.shape != truth.shape or (scored is not None and scored.shape != pred.shape[:3]):
        raise ValueError(
            f"pred {tuple(pred.shape)}, truth {tuple(truth.shape)} and scored "
            f"{None if scored is None else tuple(scored.shape)} must be [S, N, T, D] twice and [S, N, T]"
        )
    pred, truth = pred.double(), truth.double()
    keep = torch.ones(pred.shape[:3], dtype=torch.bool, device=pred.device) if scored is None else scored
    square = (pred - truth).square().sum(-1)
    square = square.masked_fill(~square.isfinite(), torch.inf)  # nan would be left out of means over domains
    size = truth.abs().clamp(min=1e-6).square().sum(-1)
    bad = diverged(pred.masked_fill(~keep[..., None], 0.0))  # [S, N]
    return {
        "mse": _mean(square / pred.shape[-1], keep),
        "relative_mse": _mean(square / size, keep),
        "diverged": _mean(bad.double(), keep.any(2)),
    }


def _mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of the kept values of each environment: [S] from [S, N, T] or [S, N]."""
    return values.masked_fill(~keep, 0.0).flatten(1).sum(1) / keep.flatten(1).sum(1)


class TrajectoryScore(Metric):
    """One number from the errors of the environments of a domain, each environment counting once.

    Args:
        error: ``mse``, ``relative_mse`` or ``diverged``, see `environment_errors`.
        summary: ``mean`` or ``median`` over environments.

    Shape:
        update(pred [S, N, T, D], truth [S, N, T, D], scored [S, N, T] or None); compute() -> scalar, nan without a
        scored sample.

    Raises:
        ValueError: an unknown error or summary.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    values: list[Tensor]

    def __init__(self, error: Error = "mse", summary: Summary = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if error not in ("mse", "relative_mse", "diverged") or summary not in ("mean", "median"):
            raise ValueError(f"error={error!r} or summary={summary!r} is unknown; see the docstring")
        self.error, self.summary = error, summary
        self.add_state("values", [], dist_reduce_fx="cat")
        self.set_dtype(torch.float64)  # until the metric is moved, which torchmetrics makes float32

    def update(self, pred: Tensor, truth: Tensor, scored: Tensor | None = None) -> None:
        """Add the environments of one batch."""
        # In the dtype of the metric: a process without a batch sends an empty tensor of that dtype to the others.
        self.values.append(environment_errors(pred, truth, scored)[self.error].to(self.dtype))

    def compute(self) -> Tensor:
        """The summary over all environments since the last reset."""
        values = dim_zero_cat(self.values) if len(self.values) else torch.empty(0)
        values = values[~values.isnan()]
        return self.summarise(values) if len(values) else torch.tensor(torch.nan)

    def summarise(self, values: Tensor) -> Tensor:
        """The summary of at least one value, none of them nan."""
        if self.summary == "mean":
            return values.mean()
        # torch's median of an even number takes the lower of the middle two.
        return values.sort().values[[(len(values) - 1) // 2, len(values) // 2]].mean()


class ReconstructedShare(TrajectoryScore):
    """Share of the environments of a domain whose relative squared error is below a threshold.

    Args:
        tau: the threshold.

    Raises:
        ValueError: tau <= 0.
    """

    higher_is_better = True

    def __init__(self, tau: float = TAU, **kwargs: Any) -> None:
        super().__init__("relative_mse", **kwargs)
        if tau <= 0:
            raise ValueError(f"tau={tau} is not allowed; use a positive threshold")
        self.tau = tau

    def summarise(self, values: Tensor) -> Tensor:
        """The share."""
        return (values < self.tau).double().mean()


def trajectory_metrics(tau: float = TAU) -> MetricCollection:
    """All scores of the trajectories of one domain.

    ``mse``, ``relative_mse`` (means over environments), ``relative_mse_median``, ``reconstructed`` (share of
    environments with a relative error below ``tau``) and ``diverged`` (share of trajectories).
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "mse": TrajectoryScore("mse"),
        "relative_mse": TrajectoryScore("relative_mse"),
        "relative_mse_median": TrajectoryScore("relative_mse", "median"),
        "reconstructed": ReconstructedShare(tau),
        "diverged": TrajectoryScore("diverged"),
    }
    groups = [["mse"], ["relative_mse", "relative_mse_median", "reconstructed"], ["diverged"]]
    return MetricCollection(metrics, compute_groups=groups)


# --- families ---------------------------------------------------------------------------------------------------------


def adjusted_rand_index(expert: Tensor, family: Tensor) -> float:
    """Agreement of two partitions of the environments, 1 for the same one and 0 on average for a random one.

    Args:
        expert: expert of each environment, int64 [S].
        family: hidden family of each environment, int64 [S]; negative ones are left out.

    Returns:
        Hubert and Arabie's adjusted Rand index, at most 1; nan where no family is known.
    """
    if not (family >= 0).any():
        return float("nan")
    known = family >= 0
    with check_sparse_tensor_invariants(False):  # torchmetrics' table is sparse, and warns unless this is said
        return float(adjusted_rand_score(expert[known], family[known]))


def purity(expert: Tensor, family: Tensor) -> float:
    """Share of environments that are of the most frequent family of their expert.

    Args:
        expert: expert of each environment, int64 [S].
        family: hidden family of each environment, int64 [S]; negative ones are left out.

    Returns:
        In (0, 1]; nan where no family is known.
    """
    if not (family >= 0).any():
        return float("nan")
    known = family >= 0
    same = [family[known & (expert == k)].unique(return_counts=True)[1].max() for k in expert[known].unique()]
    return float(torch.stack(same).sum() / known.sum())


def merged(family: Tensor, names: Sequence[str], alike: Iterable[Iterable[str]]) -> Tensor:
    """Give families that cannot be distinguished the same label.

    Args:
        family: labels [S], indices into ``names``.
        names: family names.
        alike: groups of names; those that are not among ``names`` are ignored.

    Returns:
        int64 [S]; each group has the smallest label of its members.
    """
    table = torch.arange(len(names))
    for group in alike:
        members = [names.index(name) for name in group if name in names]
        if members:
            table[members] = min(members)
    table = torch.cat([table, torch.tensor([-1])]).to(family.device)  # -1, unknown, stays -1
    return table[family]
