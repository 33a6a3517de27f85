# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md from committed results: ``python -m benchmarks.readme [RUN RUN]``.

The demo's table: with two run folders (the mixture and its dense twin) their test results are first copied to
``benchmarks/results/point_moe_demo.json``; without, only the table is written anew. The table of verdicts: what the
evidence of every system says of the comparisons that a reader asks for first.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from moeapps.evaluation.results import RunResults, read_results
from moeapps.training.run import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "point_moe_demo.json"
BLOCK = re.compile(r"(<!-- demo:begin -->\n).*?(<!-- demo:end -->)", re.DOTALL)
VERDICTS = re.compile(r"(<!-- verdicts:begin -->\n).*?(<!-- verdicts:end -->)", re.DOTALL)
ROLES = ("seen", "validation", "unseen")
CLAIMS = (
    ("point_moe", "C1a"),
    ("point_moe", "C2a"),
    ("home", "C4a"),
    ("home", "C8b"),
    ("mixer", "C1a"),
    ("mixer", "C1c"),
    ("mixer", "C6c"),
    ("promoe", "C1a"),
    ("promoe", "C1g"),
    ("promoe", "C1i"),
)
"""System and claim: the mixture beside its dense twin or its first rival, as published and where experts pay."""
_NAMES = {"point_moe": "Point-MoE", "home": "HoME", "mixer": "MixER", "promoe": "ProMoE"}
_WORDS = {"supported": "**yes**", "not supported": "**no**", "inconclusive": "open"}


def collect(moe: Path, dense: Path) -> dict[str, Any]:
    """Return what the table needs of the two runs of ``make demo``."""
    runs = {"point_moe": read_results(moe), "dense": read_results(dense)}
    return {"command": "make demo", "runs": {name: summary(run) for name, run in runs.items()}}


def summary(run: RunResults) -> dict[str, Any]:
    """Return the header, roles and main metric of one run."""
    metric = str(run.header["main_metric"])
    return {"header": run.header, "metric": metric, "roles": run.roles, "values": run.values[metric]}


def table(report: dict[str, Any]) -> str:
    """Return the Markdown of the demo: one row per domain, one column per run, and means by role."""
    moe, dense = report["runs"]["point_moe"], report["runs"]["dense"]
    rows = ["| domain | role | Point-MoE | dense twin |", "|---|---|---|---|"]
    for role in ROLES:
        names = [name for name in moe["roles"] if moe["roles"][name] == role]
        cells = [(moe["values"][name], dense["values"][name]) for name in names]
        rows += [f"| {name} | {role} | {a:.3f} | {b:.3f} |" for name, (a, b) in zip(names, cells, strict=True)]
        means = [sum(column) / len(column) for column in zip(*cells, strict=True)]
        if len(cells) > 1:
            rows.append(f"| **mean {role}** | | **{means[0]:.3f}** | **{means[1]:.3f}** |")
    header = moe["header"]
    minutes = [run["header"]["fit_seconds"] / 60 for run in (moe, dense)]
    note = (
        f"Mean IoU over the classes present, at the raw points; `{report['command']}`, one seed ({header['seed']}), "
        f"torch {header['versions']['torch']}, 2 cores; training took {minutes[0]:.1f} and {minutes[1]:.1f} minutes. "
        "One seed decides nothing. Over eight seeds of a shorter training the difference to the dense twin is within "
        "the noise on seen and on unseen domains: [docs/evidence.md](docs/evidence.md). "
        "From [benchmarks/results/point_moe_demo.json](benchmarks/results/point_moe_demo.json)."
    )
    return "\n".join(["", *rows, "", note, "", ""])


def verdicts() -> str:
    """Return the Markdown of the verdicts: one row per comparison, from the committed results of its system."""
    rows = ["| system | claim | difference | holds |", "|---|---|---|---|"]
    for system, name in CLAIMS:
        path = ROOT / "benchmarks" / "results" / f"{system}.json"
        claims = json.loads(path.read_text(encoding="utf-8"))["claims"]
        claim = next(c for c in claims if c["id"] == name)
        rows.append(f"| {_NAMES[system]} | {claim['text']} | {difference(claim)} | {_WORDS[claim['verdict']]} |")
    return "\n".join(rows) + "\n"


def difference(claim: dict[str, Any]) -> str:
    """Say by how much the mixture differs, with the interval; a difference of logarithms as a factor."""
    values = [claim["diff_mean"], *(claim["ci95"] or [])]
    factor = claim["scale"] == "log10"
    shown = [f"{10**v:.2f}" if factor else f"{v:+.4f}".replace("-", "−") for v in values]
    interval = f" [{shown[1]}, {shown[2]}]" if len(shown) == 3 else ""
    sign = " times" if factor else ""
    better = {"higher": "↑", "lower": "↓"}[claim["direction"]]
    return f"{shown[0]}{sign}{interval} {claim['metric']} {better}"


def write_readme(report: dict[str, Any], readme: Path) -> None:
    """Replace the blocks between the marks of the demo and of the verdicts."""
    text = readme.read_text(encoding="utf-8")
    text = BLOCK.sub(lambda found: found[1] + table(report) + found[2], text)
    write_text(readme, VERDICTS.sub(lambda found: found[1] + verdicts() + found[2], text))


def main(args: list[str]) -> int:
    """Collect the runs, if given, and rewrite the tables."""
    if len(args) == 2:
        write_json(RESULTS, collect(Path(args[0]), Path(args[1])))
    elif args:
        print("usage: python -m benchmarks.readme [RUN_MOE RUN_DENSE]", file=sys.stderr)
        return 2
    write_readme(json.loads(RESULTS.read_text(encoding="utf-8")), ROOT / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
