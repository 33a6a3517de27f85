# SPDX-License-Identifier: Apache-2.0
"""Three illnesses of multi-gate experts as numbers with thresholds: collapse, degradation, underfitting.

Pure functions of what a level computed on some rows. Names and thresholds: docs/papers/home.md, equation 14; the
threshold of collapse (0.9) is the paper's, the others are ours.

Shape legend: N rows, E experts, o units of an expert, G gates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ZERO = 1e-6
"""A unit smaller than this counts as silent."""
QUIET = 0.01
"""A unit smaller than this share of the spread over all experts counts as quiet; also for activations without zeros."""


@dataclass(frozen=True)
class Thresholds:
    """When a number is called an illness.

    Args:
        zero_frac: share of zero outputs above which an expert has collapsed (paper: 0.9).
        effective_users: a shared expert used by effectively fewer gates than this is owned by one.
        own_share: a task whose own experts get less than this part of a fair share of its gate ignores them ...
        rare_rate: ... which counts where its positive rate is below this.
    """

    zero_frac: float = 0.9
    effective_users: float = 1.5
    own_share: float = 0.25
    rare_rate: float = 0.01


@dataclass(frozen=True)
class LevelSample:
    """What one level did on some rows.

    Args:
        output: expert outputs [N, E, o].
        share: weights of the mixing gates [G, N, E], rows summing to 1.
        weight: what was applied, self-gates or residuals included, [G, N, E].
        allowed: bool [G, E].
        owned: bool [G, E], each gate's own experts.
        experts: names of the E experts.
        gates: names of the G gates.
    """

    output: Tensor
    share: Tensor
    weight: Tensor
    allowed: Tensor
    owned: Tensor
    experts: Sequence[str]
    gates: Sequence[str]


@dataclass
class LevelReport:
    """The numbers of one level: per expert, per gate, and over all; and what is wrong in words."""

    per_expert: dict[str, dict[str, float]]
    per_gate: dict[str, dict[str, float]]
    overall: dict[str, float]
    findings: dict[str, list[str]] = field(default_factory=dict)


def diagnose(
    sample: LevelSample,
    rates: dict[str, float],
    category: dict[str, str],
    thresholds: Thresholds | None = None,
) -> LevelReport:
    """All numbers of one level.

    Args:
        sample: what the level did.
        rates: positive rate of each task, for gates that are tasks.
        category: category of each task and of each category itself.
        thresholds: when to call it an illness.

    Returns:
        Per expert ``zero_frac``, ``quiet_frac``, ``dead_units``, ``std``, ``mean_abs`` and, where several gates see it,
        ``occupancy`` and ``effective_users``. Per gate ``entropy`` (over its maximum), ``max_weight`` (mean over rows
        of the largest), and with own experts ``own_mass``, ``fair``. Over all the extremes, ``dist_ratio``,
        ``mean_ratio``, divergences between gates and ``foreign_mass``.
    """
    limits = thresholds or Thresholds()
    per_expert = collapse(sample)
    for name, numbers in degradation(sample).items():
        per_expert[name] |= numbers
    per_gate = gates(sample)
    report = LevelReport(per_expert, per_gate, _overall(sample, per_expert, per_gate, category))
    silent = [e for e, x in per_expert.items() if x["zero_frac"] > limits.zero_frac]
    taken = [e for e, x in per_expert.items() if x.get("effective_users", math.inf) < limits.effective_users]
    starved = [
        g
        for g, x in per_gate.items()
        if rates.get(g, 1.0) < limits.rare_rate and x.get("own_mass", 1.0) < limits.own_share * x.get("fair", 0.0)
    ]
    report.findings = {"collapse": silent, "degradation": taken, "underfitting": starved}
    for name, found in report.findings.items():
        report.overall[f"{name}_count"] = float(len(found))
    return report


def collapse(sample: LevelSample) -> dict[str, dict[str, float]]:
    """How silent each expert is."""
    h_NEo = sample.output.double()
    size = h_NEo.abs()
    spread = float(h_NEo.std(correction=0))
    found = {}
    for e, name in enumerate(sample.experts):
        found[name] = {
            "zero_frac": float((size[:, e] < ZERO).double().mean()),
            "quiet_frac": float((size[:, e] < QUIET * spread).double().mean()),
            "dead_units": float((size[:, e] < ZERO).all(0).double().mean()),
            "std": float(h_NEo[:, e].std(correction=0)),
            "mean_abs": float(h_NEo[:, e].mean().abs()),
        }
    return found


def degradation(sample: LevelSample) -> dict[str, dict[str, float]]:
    """How evenly the gates that see a shared expert use it; experts seen by one gate are left out."""
    mean_GE = sample.share.double().mean(1)
    found = {}
    for e, name in enumerate(sample.experts):
        users = sample.allowed[:, e]
        use = mean_GE[users, e]
        if int(users.sum()) > 1 and float(use.sum()) > 0:
            use = use / use.sum()
            entropy = float(torch.special.entr(use).sum())
            found[name] = {"occupancy": float(use.max()), "effective_users": math.exp(entropy)}
    return found


def gates(sample: LevelSample) -> dict[str, dict[str, float]]:
    """How certain each gate is, and how much weight its own experts get."""
    share_GNE = sample.share.double()
    found = {}
    for g, name in enumerate(sample.gates):
        seen = int(sample.allowed[g].sum())
        entropy = float(torch.special.entr(share_GNE[g]).sum(-1).mean())
        numbers = {
            "entropy": entropy / math.log(seen) if seen > 1 else 0.0,
            "max_weight": float(share_GNE[g].max(-1).values.mean()),
        }
        own = sample.owned[g] & sample.allowed[g]
        if bool(own.any()):
            numbers |= {"own_mass": float(share_GNE[g][:, own].sum(-1).mean()), "fair": int(own.sum()) / seen}
        found[name] = numbers
    return found


def divergence(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon divergence of two distributions [E], in nats: 0 for equal ones, at most log 2."""
    middle = (p + q) / 2
    entropy = torch.special.entr
    return max(0.0, float(entropy(middle).sum() - (entropy(p).sum() + entropy(q).sum()) / 2))


def foreign_mass(sample: LevelSample, category: dict[str, str]) -> float:
    """Largest weight that any gate of a category gave, on any row, to an expert of another category."""
    of_expert = [category.get(name.rsplit(".", 1)[0]) for name in sample.experts]
    most = 0.0
    for g, name in enumerate(sample.gates):
        own = category.get(name)
        foreign = [e for e, c in enumerate(of_expert) if own is not None and c is not None and c != own]
        if foreign:
            most = max(most, float(sample.weight[g][:, foreign].abs().max()))
    return most


def _overall(
    sample: LevelSample,
    per_expert: dict[str, dict[str, float]],
    per_gate: dict[str, dict[str, float]],
    category: dict[str, str],
) -> dict[str, float]:
    def extreme(table: dict[str, dict[str, float]], key: str, pick: str) -> dict[str, float]:
        values = [numbers[key] for numbers in table.values() if key in numbers]
        if not values:
            return {}
        value = {"max": max(values), "min": min(values), "mean": sum(values) / len(values)}[pick]
        return {f"{key}_{pick}": value}

    std, mean = ([x[key] for x in per_expert.values()] for key in ("std", "mean_abs"))
    numbers = {
        **extreme(per_expert, "zero_frac", "max"),
        **extreme(per_expert, "quiet_frac", "max"),
        **extreme(per_expert, "dead_units", "max"),
        **extreme(per_expert, "occupancy", "max"),
        **extreme(per_expert, "effective_users", "min"),
        **extreme(per_gate, "entropy", "mean"),
        **extreme(per_gate, "max_weight", "max"),
        "foreign_mass": foreign_mass(sample, category),
    }
    for key, values in (("dist_ratio", std), ("mean_ratio", mean)):
        numbers[key] = max(values) / max(min(values), 1e-12)
    mean_GE = sample.share.double().mean(1)
    pairs: dict[str, list[float]] = {"within": [], "across": []}
    for i, a in enumerate(sample.gates):
        for j in range(i):
            ca, cb = category.get(a), category.get(sample.gates[j])
            if ca is not None and cb is not None:
                pairs["within" if ca == cb else "across"].append(divergence(mean_GE[i], mean_GE[j]))
    return numbers | {f"js_{name}": sum(found) / len(found) for name, found in pairs.items() if found}


def rate_correlation(own_over_fair: dict[str, float], rates: dict[str, float]) -> float | None:
    """Correlation, over tasks, of own-expert mass (over its fair share) with the logarithm of the positive rate.

    Near 1: the rarer a task, the more it leans on shared experts. None with fewer than three tasks or no variation.
    """
    names = [name for name in own_over_fair if rates.get(name, 0.0) > 0]
    if len(names) < 3:
        return None
    both = torch.tensor([[own_over_fair[n] for n in names], [math.log(rates[n]) for n in names]], dtype=torch.float64)
    if bool((both.std(1) < 1e-12).any()):
        return None
    return float(torch.corrcoef(both)[0, 1])
