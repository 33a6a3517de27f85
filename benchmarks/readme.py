# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md from committed results: ``python -m benchmarks.readme [RUN RUN]``.

The table of one full training: with two run folders (the mixture and its dense twin, of one seed) their test results
are first put into ``benchmarks/results/point_moe_demo.json``: under ``runs`` for seed 0, which is the table, and under
``seeds`` for any other, whose means stand below it. Without, only the tables are written anew. ``--seeds`` prints what
is known of other seeds. The table of verdicts: what the evidence of every system says of the comparisons that a reader
asks for first.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.markdown import wrapped
from moeapps.evaluation.results import RunResults, read_results
from moeapps.evidence.report import LEVEL
from moeapps.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "point_moe_demo.json"
BLOCK = re.compile(r"(<!-- demo:begin -->\n).*?(<!-- demo:end -->)", re.DOTALL)
VERDICTS = re.compile(r"(<!-- verdicts:begin -->\n).*?(<!-- verdicts:end -->)", re.DOTALL)
COMMAND = "lightning fit --config configs/point_moe.yaml --config configs/data/real_als.yaml"
ROLES = ("seen", "validation", "unseen")
CLAIMS = (
    ("point_moe", "C1a"),
    ("point_moe", "C2a"),
    ("home", "C9a"),
    ("home", "C9b"),
    ("home", "C9j"),
    ("home", "C4a"),
    ("aw_moe", "C1a"),
    ("aw_moe", "C1d"),
    ("aw_moe", "C2d"),
    ("aw_moe", "C7a"),
    ("aw_moe", "C7b"),
    ("aw_moe", "C4f"),
    ("mixer", "C1h"),
    ("mixer", "C1g"),
    ("mixer", "C6c"),
    ("mixer", "C7a"),
    ("promoe", "C1a"),
    ("promoe", "C1g"),
    ("promoe", "C1i"),
    ("unimoe_audio", "C8a"),
    ("unimoe_audio", "C3b"),
    ("unimoe_audio", "C2d"),
    ("unimoe_audio", "C7m"),
    ("meta_dmoe", "C2b"),
    ("meta_dmoe", "C2d"),
    ("meta_dmoe", "C1c"),
    ("meta_dmoe", "C7g"),
)
"""System and claim: the mixture beside its dense twin or its first rival, as published and where experts pay."""
_NAMES = {
    "point_moe": "Point-MoE",
    "home": "HoME",
    "aw_moe": "AW-MoE",
    "mixer": "MixER",
    "promoe": "ProMoE",
    "unimoe_audio": "UniMoE-Audio",
    "meta_dmoe": "Meta-DMoE",
}
_SCORES = {
    "miou": "mean over classes of the intersection of prediction and truth over their union",
    "gauc_expected": "share of a user's pairs of impressions that are ranked right, by the generated log's own "
    "probabilities in place of drawn answers",
    "list_auc": "share of a list's pairs, one taken and one not, that are ranked right",
    "list_auc_expected": "the same by the generated log's own probabilities",
    "truncation_gap": "by how much list AUC falls when a user's history is cut to three items",
    "mse": "mean squared error of a trajectory",
    "relative_mse_median": "median over environments of the squared error over the squared size of the state",
    "loss": "what training makes small, on test images",
    "bits_0": "bits per code of the first of the codec's books",
    "accuracy": "share of images named right",
}
"""What the scores of `CLAIMS` are, for a legend below their table."""
_TIMES = 100
"""From here on a ratio of compute says only that the second of a comparison counts rather than trains."""
_WORDS = {"supported": "**yes**", "not supported": "**no**", "inconclusive": "open"}


def collect(moe: Path, dense: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what the table needs of the two runs, or of the same with another seed.

    Args:
        moe: run folder of the mixture.
        dense: that of its dense twin.
        known: what was collected before; a run of seed 0 takes the place of its table, any other seed is added.

    Raises:
        ValueError: the two have different seeds, or the first one collected has another seed than 0.
    """
    runs = {"point_moe": read_results(moe), "dense": read_results(dense)}
    seeds = {run.seed for run in runs.values()}
    if len(seeds) > 1:
        raise ValueError(f"{moe} and {dense} have the seeds {sorted(map(str, seeds))}; give two runs of one seed")
    report = {"command": COMMAND, **(known or {})}
    found, seed = {name: summary(run) for name, run in runs.items()}, seeds.pop()
    if seed == 0:
        return {**report, "runs": found}
    if "runs" not in report:
        raise ValueError(f"{moe} has seed {seed}, but the table is that of seed 0; collect that one first")
    held = {**report.get("seeds", {}), str(seed): found}
    return {**report, "seeds": {key: held[key] for key in sorted(held, key=int)}}


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
        rows += [f"| {name} | {role} | {_score(a)} | {_score(b)} |" for name, (a, b) in zip(names, cells, strict=True)]
        both = [(a, b) for a, b in cells if _defined(a) and _defined(b)]
        means = [sum(column) / len(column) for column in zip(*both, strict=True)]
        if len(both) > 1:
            rows.append(f"| **mean {role}** | | **{means[0]:.3f}** | **{means[1]:.3f}** |")
    header = moe["header"]
    minutes = [run["header"]["fit_seconds"] / 60 for run in (moe, dense)]
    note = (
        f"Mean IoU over the classes present, at the raw points; `{report['command']}`, one seed ({header['seed']}), "
        f"torch {header['versions']['torch']}, 2 cores; training took {minutes[0]:.1f} and {minutes[1]:.1f} minutes. "
        f"One seed decides nothing. {short_trainings()}: [docs/evidence.md](docs/evidence.md). "
        "From [benchmarks/results/point_moe_demo.json](benchmarks/results/point_moe_demo.json)."
    )
    other = [full_trainings(report), ""] if report.get("seeds") else []
    return "\n".join(["", *rows, "", *other, note, "", ""])


def seen_mean(run: dict[str, Any]) -> float:
    """Return the mean of the main metric over the seen domains of one run."""
    values = [value for name, value in run["values"].items() if run["roles"][name] == "seen" and _defined(value)]
    return float(sum(values) / len(values))


def _defined(value: float | None) -> bool:
    """Whether a domain has a score: a file says null for nan."""
    return value is not None and not math.isnan(value)


def _score(value: float | None) -> str:
    return f"{value:.3f}" if value is not None and _defined(value) else "-"


def full_trainings(report: dict[str, Any]) -> str:
    """Say what the same training gave with each seed, and whether the seeds or the models differ by more."""
    every = {str(report["runs"]["point_moe"]["header"]["seed"]): report["runs"], **report.get("seeds", {})}
    means = {seed: (seen_mean(runs["point_moe"]), seen_mean(runs["dense"])) for seed, runs in every.items()}
    told = ", ".join(f"{a:.3f} against {b:.3f} (seed {seed})" for seed, (a, b) in means.items())
    columns = list(zip(*means.values(), strict=True))
    spread = max(max(column) - min(column) for column in columns)
    effect = sum(a - b for a, b in means.values()) / len(means)
    line = f"Mean seen mIoU of full trainings, Point-MoE against its dense twin: {told}."
    if len(means) < 2:
        return line
    verdict = "more" if spread > abs(effect) else "less"
    effect_text, spread_text = f"{effect:+.3f}".replace("-", "−"), f"{spread:.3f}"
    return (
        f"{line} The models differ by {effect_text} on average, the seeds of one model by up to {spread_text}: the "
        f"seeds differ by {verdict} than the models."
    )


def short_trainings() -> str:
    """Say what the evidence over many seeds of a shorter training finds on seen and on unseen domains."""
    words = {"supported": "in favour of Point-MoE", "not supported": "not in favour of Point-MoE"}
    parts, seeds = [], set()
    for role, name in (("seen", "C1a"), ("unseen", "C2a")):
        claim = claim_of("point_moe", name)
        seeds.add(len(claim["seeds"]))
        parts.append(f"{words.get(claim['verdict'], 'within the noise')} on {role} domains")
    both = " and ".join(parts)
    if len({part.split(" on ")[0] for part in parts}) == 1:
        both = f"{parts[0].split(' on ')[0]} on seen and on unseen domains"
    return f"Over {min(seeds)} seeds of a shorter training the difference to the dense twin is {both}"


def claim_of(system: str, name: str) -> dict[str, Any]:
    """Return a claim of the committed results of a system."""
    path = ROOT / "benchmarks" / "results" / f"{system}.json"
    claims = json.loads(path.read_text(encoding="utf-8"))["claims"]
    found: dict[str, Any] = next(claim for claim in claims if claim["id"] == name)
    return found


def verdicts() -> str:
    """Return the Markdown of the verdicts: one row per comparison, from the committed results of its system."""
    names = {claim_of(system, name)["metric"].partition("/")[2] for system, name in CLAIMS}
    scores = "; ".join(f"`{name}`: {meaning}" for name, meaning in _SCORES.items() if name in names)
    return claim_rows(CLAIMS) + wrapped(f"\nScores, behind the domains that they are of: {scores}.\n")


def claim_rows(claims: Iterable[tuple[str, str]]) -> str:
    """Return a table of Markdown with a row per claim.

    Args:
        claims: system and id of each.
    """
    rows = ["| system | claim | difference | compute | runs | holds |", "|---|---|---|---|---|---|"]
    for system, name in claims:
        claim = claim_of(system, name)
        cells = (_NAMES[system], claim["text"], difference(claim), compute(claim), runs(claim), holds(claim))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def runs(claim: dict[str, Any]) -> str:
    """Say how many runs a comparison has of each, and in brackets how many data they are on where some share theirs."""
    return f"{len(claim['seeds'])}" + (f" ({claim['clusters']})" if "clusters" in claim else "")


def holds(claim: dict[str, Any]) -> str:
    """Say whether a claim holds, and whether it does so only while nobody counts how many there are."""
    corrected, decided = claim.get("p_holm"), claim["verdict"] in ("supported", "not supported")
    if decided and corrected is not None and corrected >= LEVEL:
        return _WORDS[claim["verdict"]].strip("*") + ", alone"
    return _WORDS.get(claim["verdict"], str(claim["verdict"]))


def compute(claim: dict[str, Any]) -> str:
    """Say how much more the first of a comparison computed: in training, or in one row where that was not counted."""
    ratio = claim.get("train_flops_ratio")
    if ratio is not None:
        return f"{ratio:.2f}" if ratio < _TIMES else f"over {_TIMES}"
    return f"{claim['flops_ratio']:.2f} a row" if claim.get("flops_ratio") is not None else "not counted"


def difference(claim: dict[str, Any]) -> str:
    """Say by how much the mixture differs, with the interval; a difference of logarithms as a factor."""
    if claim["diff_mean"] is None:
        return "-"
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
    text = BLOCK.sub(lambda found: found[1] + wrapped(table(report)) + found[2], text)
    write_text(readme, VERDICTS.sub(lambda found: found[1] + verdicts() + found[2], text))


def main(args: list[str]) -> int:
    """Collect the runs, if given, and rewrite the tables; or print what is known of other seeds."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else None
    if args == ["--seeds"]:
        print(known_of_seeds(known or {}))
        return 0
    if len(args) == 2:
        try:
            known = collect(Path(args[0]), Path(args[1]), known)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        write_json(RESULTS, known)
    elif args or known is None:
        print("usage: python -m benchmarks.readme [RUN_MOE RUN_DENSE | --seeds]", file=sys.stderr)
        return 2
    write_readme(known, ROOT / "README.md")
    return 0


def known_of_seeds(report: dict[str, Any]) -> str:
    """Return the closing lines of the demo: what other seeds of this training, and of a shorter one, have given."""
    lines = [full_trainings(report)] if report.get("seeds") else []
    return "\n".join([*lines, f"{short_trainings()} (docs/evidence.md)."])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
