# SPDX-License-Identifier: Apache-2.0
"""The page: results files in words and tables. Ties and losses are printed as plainly as wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeapps.reporting.wrapping import wrapped

_INTRO = """# Evidence

This page is computed by `{command} --summarise` from the files in
`{folder}/<system>/cells/`; do not edit it.

A claim of a paper is a hypothesis here, tested at a size that trains in minutes on one thread. Every row compares two
variants with the same seeds and the same data. The interval is a 95 per cent paired t interval of the difference
(system − baseline) over runs. Rules and margins were fixed before the runs: *superiority* is supported when the whole
interval lies on the better side of the margin, *non-inferiority(m)* when it lies above a loss of m, *exact* when it
holds in every run, *median* when the median over runs reaches the bar. What the interval leaves open is
*inconclusive*. Ratios of compute and parameters are system over baseline; training FLOPs are those of all training
steps, forward and backward, and a claim at equal FLOPs is tested only where they agree within 2 per cent. For a metric
marked log10 the difference is one of logarithms (−0.3 is half the error).

Verdicts are of one claim at a time. *p* is that of its interval (two-sided, of a true difference right at the bar); in
brackets it is corrected for all claims of the system that have an interval (Holm). A verdict whose p is below 0.05 in
brackets, too, holds beside all others; any other may be what one of many looks shows by luck. An interval over three
runs reaches 2.5 standard deviations of their differences to each side: *inconclusive* there says that the runs are too
few to tell, not that two variants tie.
"""
_NONE = "\nNo system has been measured yet.\n"
LEVEL = 0.05
"""What a p value is below where a verdict holds."""
_VERDICTS = ("supported", "not supported", "inconclusive", "not tested")


def render(systems: Sequence[Mapping[str, Any]], folder: str = "evidence") -> str:
    """Give the text of the page.

    Args:
        systems: contents of results files, in any order.
        folder: where they lie, for the text.
    """
    ordered = sorted(systems, key=_name)
    parts = [_INTRO.format(command=_command(ordered), folder=folder)]
    parts += [_overview(ordered)] if ordered else [_NONE]
    parts += [_system(results) for results in ordered]
    return wrapped("\n".join(part.strip("\n") + "\n" for part in parts))


def _name(results: Mapping[str, Any]) -> str:
    """Name of a grid: that of its system, unless there are several."""
    return str(results.get("name", results["system"]))


def _command(systems: Sequence[Mapping[str, Any]]) -> str:
    """What all commands have in common: they end with the name of their grid."""
    found = {str(results["command"]).rpartition(" ")[0] for results in systems}
    return found.pop() if len(found) == 1 and "moeapps evidence" not in found else "moeapps evidence GRID.yaml"


def _overview(systems: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for results in systems:
        counts = [sum(c["verdict"].split(" (")[0] == verdict for c in results["claims"]) for verdict in _VERDICTS]
        cells = f"{results['cells']} of {results['cells_planned']}"
        name = f"[{_name(results)}](#{_name(results)})"
        rows.append([name, cells, _hours(results["cpu_s"]), *map(str, counts), *_decided(results["claims"])])
    return "\n" + _table(["system", "cells", "CPU", *_VERDICTS, "decided by an interval", "corrected"], rows)


def _decided(claims: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """How many claims an interval decides, and how many of them also after the correction."""
    corrected = [c["p_holm"] for c in claims if c.get("p_holm") is not None and c["verdict"] != "inconclusive"]
    return str(len(corrected)), str(sum(p < LEVEL for p in corrected))


def _system(results: Mapping[str, Any]) -> str:
    lines = [
        f"## {_name(results)}",
        "",
        f"`{results['command']}` on `{results['config']}`. Pairs of (seed, data seed): {_pairs(results['seeds'])}. "
        f"{results['cells']} of {results['cells_planned']} cells, {_hours(results['cpu_s'])} of CPU time; "
        f"{'; '.join(results['machine']) or 'no machine yet'}.",
        "",
    ]
    if results["choice"] or results["settings_tried"]:
        lines += [f"Settings tried while choosing: {results['settings_tried']}. {results['choice']}".rstrip(), ""]
    if any("clusters" in claim for claim in results["claims"]):
        lines += ["Runs that share a data seed are averaged first: the interval is over data seeds.", ""]
    lines += [f"Domain {name} is missing: {why}." for name, why in results["missing_domains"].items()]
    if results["ladder"]:
        lines += _ladder(results["ladder"])
    lines += ["### Claims", "", _claims(results["claims"]), "### Variants", "", _variants(results["variants"])]
    return "\n".join(lines)


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    header = ["id", "claim", "rule", "metric", "system", "baseline", "difference", "p (corrected)"]
    header += ["FLOPs a row", "training FLOPs", "params", "verdict"]
    rows = []
    for claim in claims:
        arrow = {"higher": " ↑", "lower": " ↓"}.get(claim["direction"], "")
        metric = claim["metric"] + (arrow if claim["metric"] else "")
        metric = f"log10 {metric}" if claim["scale"] == "log10" else metric
        rows.append(
            [
                claim["id"],
                claim["text"],
                claim["rule"],
                metric + (f" against {claim['baseline_metric']}" if claim["baseline_metric"] else ""),
                _side(claim["system_variant"], claim["system"], (claim["minus"] or [None])[0]),
                _side(claim["baseline_variant"], claim["baseline"], (claim["minus"] or [None])[-1]),
                _difference(claim["diff_mean"], claim["ci95"]),
                _p(claim.get("p"), claim.get("p_holm")),
                _times(claim["flops_ratio"]),
                _times(claim.get("train_flops_ratio")),
                _times(claim["params_ratio"]),
                f"**{claim['verdict']}**",
            ]
        )
    return _table(header, rows)


def _ladder(ladder: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            level["level"],
            _mean(level["system"]),
            _mean(level["baseline"]),
            _difference(level["diff_mean"], level["ci95"]) if not level.get("note") else level["note"],
        ]
        for level in ladder["levels"]
    ]
    header = ["level", ladder["system_variant"], ladder["baseline_variant"], "difference"]
    arrow = {"higher": "higher is better", "lower": "lower is better"}.get(ladder["direction"], "")
    return [
        "### Conflict ladder",
        "",
        f"{ladder['text']} Metric: {ladder['metric']} ({arrow}).",
        "",
        _table(header, rows),
    ]


def _variants(variants: Mapping[str, Mapping[str, Any]]) -> str:
    metrics = list(dict.fromkeys(name for variant in variants.values() for name in variant["mean"]))
    header = ["variant", "cells", "averaged", "parameters", "active", "FLOPs a row", "training FLOPs", *metrics]
    rows = []
    for name, variant in variants.items():
        sizes = [_count(variant[key]) for key in ("params_total", "params_active", "flops_per_token")]
        sizes.append(_number(variant.get("train_flops")))
        means = [_number(variant["mean"].get(metric)) for metric in metrics]
        cells = f"{variant['cells']} of {variant['cells_planned']}"
        rows.append([name, cells, str(variant.get("averaged", "–")), *sizes, *means])
    return (
        "Sizes and scores are averaged over the pairs of seeds that most variants have, so that rows compare; a row "
        "over fewer compares with none.\n\n" + _table(header, rows)
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _side(name: str | None, values: Sequence[float], minus: str | None) -> str:
    label = (name or "constant") + (f" − {minus}" if minus else "")
    return f"{label}: {_mean(values)}" if values else (name or "–")


def _mean(values: Sequence[float]) -> str:
    return _number(sum(values) / len(values)) + f" (n={len(values)})" if values else "–"


def _difference(mean: float | None, interval: Sequence[float] | None) -> str:
    if mean is None:
        return "–"
    return _signed(mean) + (f" [{_signed(interval[0])}, {_signed(interval[1])}]" if interval else "")


def _p(alone: float | None, corrected: float | None) -> str:
    if alone is None:
        return "–"
    return _share(alone) + (f" ({_share(corrected)})" if corrected is not None else "")


def _share(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def _signed(value: float) -> str:
    return f"{value:+.4g}".replace("-", "−")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _pairs(pairs: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"({seed}, {data})" for seed, data in pairs)
