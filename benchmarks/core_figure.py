# SPDX-License-Identifier: Apache-2.0
"""Draw the ratios of the core and write its table into docs/core.md: ``python -m benchmarks.core_figure``.

Reads benchmarks/results/core.json and system_share.json, as ``make bench`` and ``benchmarks.system_share`` write them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.markdown import wrapped
from moeapps.files import write_text
from moeapps.reporting.figures import save_figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "core.json"
SHARES = ROOT / "benchmarks" / "results" / "system_share.json"
PAGE, FIGURE = ROOT / "docs" / "core.md", ROOT / "docs" / "figures" / "core.png"
BLOCK = re.compile(r"(<!-- core:begin -->\n).*?(<!-- core:end -->)", re.DOTALL)
REGIMES = ("R=1024", "R=128", "R=64", "R=64 small", "R=16")
BACKENDS = ("auto", "segments", "grouped_mm", "loop")
KINDS = ("silu-mlp", "reglu", "swiglu", "gelu-mlp-bias")


def found(report: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The rows with these values."""
    return [row for row in report["rows"] if all(row[key] == value for key, value in wanted.items())]


def one(report: dict[str, Any], regime: str, mode: str, backend: str, expert: str) -> str:
    """A ratio as text, bold where it misses its gate."""
    rows = found(report, regime=regime, mode=mode, backend=backend, expert=expert, dtype="float32", threads=1)
    if not rows or rows[0]["ratio"] is None:
        return "n/a"
    text = f"{rows[0]['ratio']:.2f}"
    return f"**{text}**" if rows[0]["ok"] is False else text


def block(report: dict[str, Any]) -> str:
    """The measured part of the page."""
    lines = ["", "![Time over a dense network, by rows per expert, backend and kind of expert](figures/core.png)", ""]
    lines += ["| regime | N, E, k | gate | " + " | ".join(BACKENDS) + " |", "|---" * 7 + "|"]
    for regime in REGIMES:
        row = found(report, regime=regime, mode="fwd+bwd", backend="auto", expert="silu-mlp")[0]
        cells = [one(report, regime, "fwd+bwd", backend, "silu-mlp") for backend in BACKENDS]
        size = f"{row['n']}, {row['e']}, {row['k']}"
        lines.append(f"| {regime} | {size} | {row['gate']:.2f} | " + " | ".join(cells) + " |")
    lines += ["", "Forward + backward of two-layer experts without bias, over dense; bold misses the gate.", ""]
    lines += ["| `auto`, forward + backward | " + " | ".join(KINDS) + " |", "|---" * 5 + "|"]
    for regime in REGIMES:
        cells = [one(report, regime, "fwd+bwd", "auto", kind) for kind in KINDS]
        lines.append(f"| {regime} | " + " | ".join(cells) + " |")
    lines += ["", "| beside dense or a rival | ratio | bound |", "|---|---|---|"]
    for row in report["rows"]:
        special = row["regime"] not in REGIMES and row["mode"] != "forward" and row["ratio"] is not None
        if special or row["unit"] == "ms":
            bound = "" if row["gate"] is None else f"{row['gate']:.2f}"
            lines.append(f"| {row['regime']}, {row['expert']} | {row['ratio']:.2f} {row['unit']} | {bound} |")
    missed = [row for row in report["rows"] if row["gated"] and row["ok"] is False]
    lines += ["", f"Gates that hold: {report['summary']['gates']}; stretch goals: {report['summary']['stretch']}."]
    for row in missed:
        tried = ", ".join(f"{entry['way']} {entry['ratio']:.2f}" for entry in row["tried"])
        name = f"{row['regime']}, {row['mode']}, {row['expert']}"
        lines.append(f"- {name}: {row['ratio']:.2f} where {row['gate']:.2f} was wanted; tried {tried}; {row['reason']}")
    machine = report["machine"]
    lines += ["", f"`{report['command']}`, torch {machine['torch']}, {machine['cpu']}, one thread, CPU time.", "", ""]
    return "\n".join(lines)


def share_block(shares: dict[str, Any]) -> str:
    """What the layers take of a training step of each system."""
    head = "| system | CPU ms per step | calls of MoE layers | their share | step over the one before |"
    lines = [head, "|---" * 5 + "|"]
    for system, row in shares["systems"].items():
        before = row.get("note", "not compared") if row.get("over_before") is None else f"{row['over_before']:.2f}"
        lines.append(f"| {system} | {row['step_ms']:.0f} | {row['moe_calls']} | {row['moe_share']:.0%} | {before} |")
    what = "first batch of the default config; forward, backward and AdamW on one thread"
    return "\n".join([*lines, "", f"`{shares['command']}`: {what}.", "", ""])


def write_page(report: dict[str, Any], shares: dict[str, Any], page: Path) -> None:
    """Replace the block between the two marks."""
    text = page.read_text(encoding="utf-8")
    write_text(page, BLOCK.sub(lambda match: match[1] + wrapped(block(report) + share_block(shares)) + match[2], text))


def draw(report: dict[str, Any], path: Path) -> None:
    """Two panels: backends side by side per regime, and kinds of expert under ``auto``, with the gates as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    panels = [(axes[0], BACKENDS, "backend"), (axes[1], KINDS, "expert")]
    for axis, names, key in panels:
        for i, name in enumerate(names):
            fixed = {"expert": "silu-mlp"} if key == "backend" else {"backend": "auto"}
            rows = [found(report, regime=r, mode="fwd+bwd", **{key: name}, **fixed) for r in REGIMES]
            heights = [group[0]["ratio"] if group else 0.0 for group in rows]
            axis.bar([x + 0.2 * (i - 1.5) for x in range(len(REGIMES))], heights, 0.19, label=name)
        gates = [found(report, regime=r, mode="fwd+bwd", backend="auto")[0]["gate"] for r in REGIMES]
        axis.hlines(gates, [x - 0.42 for x in range(5)], [x + 0.42 for x in range(5)], colors="black", label="gate")
        axis.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(REGIMES)), REGIMES)
        axis.set_xlabel("rows per expert R")
        axis.legend(fontsize=7, loc="upper left")
    axes[0].set_ylabel("time / dense, forward + backward")
    axes[0].set_title("backends, two-layer experts", fontsize=9)
    axes[1].set_title("auto, kinds of expert", fontsize=9)
    axes[0].set_ylim(0, min(4.0, axes[0].get_ylim()[1]))
    save_figure(figure, path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    """Draw and write."""
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(report, FIGURE)
    write_page(report, json.loads(SHARES.read_text(encoding="utf-8")), PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
