# SPDX-License-Identifier: Apache-2.0
"""How Point-MoE's step grows with its voxels: ``python -m benchmarks.point_moe_voxels --before TREE [--pairs 9]``.

A step is forward with recording, loss, backward and AdamW, on 6 and on 60 training crops of 2,500 voxels of the
default config. TREE is a checkout of an earlier commit (``git worktree add --detach TREE COMMIT``): its steps and ours
are taken by turns, in alternating order, each tree in a process of its own, one thread, by CPU time, the kernel's
included. Ours runs as ``moeapps fit`` does, with `moeapps.allocator`; what that alone gives is measured against steps
of the same process with glibc's own thresholds, as far as it raises them by itself.

Memory is the peak of a step (`benchmarks.point_moe_step`) per voxel, in bytes; weights and optimizer are there before.

How far one could come: the products of a step at the speed of this machine's fastest one, over a step before; and what
autograd keeps of the forward pass, per voxel.

Writes benchmarks/results/point_moe_voxels.json and the paragraph in tasks/point_cloud/README.md; fails when a goal of
`GOALS` is missed. Eight minutes on two idle cores; 11 GB of memory.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machines import with_elsewhere
from benchmarks.point_moe_step import CROPS, OTHER_WAYS, Ask, tree
from benchmarks.timed import commit_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "point_moe_voxels.json"
README = ROOT / "tasks" / "point_cloud" / "README.md"
BLOCK = re.compile(r"(<!-- voxels:begin -->\n).*?(<!-- voxels:end -->)", re.DOTALL)
GOALS = {"growth": 1.10, "over_before": 0.75, "bytes_per_voxel": 20_000}
"""CPU per voxel at 150k over 15k; a step over the step before; memory. Set beforehand."""

Report = dict[str, Any]


def compare(ours: Ask, theirs: Ask, *, pairs: int, done: Callable[[Report], None]) -> Report:
    """Steps of both trees by turns at every size; ``done`` is told of what there is after every pair.

    Returns:
        For each size ``voxels``, ``over`` (the median of ``pairs``, ours over theirs), ``ours`` and ``theirs`` with
        microseconds, page faults and bytes per voxel, ``allocator`` (ours over ours without it), ``other_ways`` (time
        and memory over ours) and ``limit``.
    """
    rows: Report = {size: {} for size in CROPS}
    trees = {"ours": ours, "theirs": theirs}
    for size, row in rows.items():
        memory = {name: peak(ask, size) for name, ask in trees.items()}
        warm = {name: ask(size, "step") for name, ask in trees.items()}  # brings back what that made it give away
        voxels = row["voxels"] = int(warm["ours"]["voxels"])
        taken: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        row["pairs"] = []
        for pair in range(pairs):
            for name in list(trees)[:: -1 if pair % 2 else 1]:
                taken[name].append(trees[name](size, "step"))
            row["pairs"].append(round(taken["ours"][-1]["seconds"] / taken["theirs"][-1]["seconds"], 3))
            row["over"] = round(statistics.median(row["pairs"]), 3)
            for name, costs in taken.items():
                seconds = statistics.median(cost["seconds"] for cost in costs)
                row[name] = {
                    "microseconds_per_voxel": round(1e6 * seconds / voxels, 2),
                    "faults": round(statistics.median(cost["faults"] for cost in costs)),
                    "bytes_per_voxel": round(memory[name] / voxels),
                }
            done(rows)
        ours(size, "glibc")
        alone = [ours(size, "step")["seconds"] for _ in range(max(1, pairs // 3))]
        without = 1e6 * statistics.median(alone) / voxels
        row["allocator"] = round(row["ours"]["microseconds_per_voxel"] / without, 3)
        ours(size, "keep")
        row["other_ways"] = {name: other_way(ours, size, name, pairs=max(1, pairs // 3)) for name in OTHER_WAYS}
        limit = ours(size, "limit")
        before = statistics.median(cost["seconds"] for cost in taken["theirs"])
        row["limit"] = {
            "products_over_before": round(limit["seconds"] / before, 3),
            "kept_bytes_per_voxel": round(limit["bytes"] / voxels),
        }
        done(rows)
    return rows


def other_way(ours: Ask, size: str, name: str, *, pairs: int) -> dict[str, float]:
    """A step with one thing done in another way over a step as it is: its time, and the memory of its peak."""
    way = name.replace(" ", "_")
    ratios = [ours(size, f"step {way}")["seconds"] / ours(size, "step")["seconds"] for _ in range(pairs)]
    memory = peak(ours, size, f" {way}") / peak(ours, size)
    return {"step": round(statistics.median(ratios), 3), "memory": round(memory, 3)}


def peak(ask: Ask, size: str, way: str = "") -> float:
    """The middle of three peaks: how the heap is cut up differs from step to step."""
    return statistics.median(ask(size, f"memory{way}")["bytes"] for _ in range(3))


def growth(rows: Report, name: str) -> float:
    """CPU per voxel at the large size over that at the small one."""
    small, large = (float(rows[size][name]["microseconds_per_voxel"]) for size in CROPS)
    return round(large / small, 3)


def verdicts(sizes: Report) -> dict[str, bool]:
    """Whether each goal is met, at the worse of both sizes."""
    return {
        "growth": growth(sizes, "ours") <= GOALS["growth"],
        "over_before": max(row["over"] for row in sizes.values()) <= GOALS["over_before"],
        "bytes_per_voxel": max(row["ours"]["bytes_per_voxel"] for row in sizes.values()) <= GOALS["bytes_per_voxel"],
    }


def measure(before: Path, *, pairs: int, done: Callable[[Report], None]) -> Report:
    """Measure everything; ``done`` is told of the report as far as it goes, whenever it has something of each size."""
    from benchmarks.core import machine

    commit = commit_of(before)

    def report(sizes: Report) -> Report:
        return {
            "command": "python -m benchmarks.point_moe_voxels --before TREE",
            "before": commit,
            "machine": machine(),
            "threads": 1,
            "goals": GOALS,
            "ok": verdicts(sizes),
            "growth": {"ours": growth(sizes, "ours"), "before": growth(sizes, "theirs")},
            "sizes": sizes,
        }

    def told(sizes: Report) -> None:
        if all("other_ways" in row for row in sizes.values()):
            done(report(sizes))

    with tree(ROOT) as ours, tree(before) as theirs:
        return report(compare(ours, theirs, pairs=pairs, done=told))


def show(report: Report) -> None:
    """Print the report as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "voxels", "step over before", "us per voxel", "before", "bytes per voxel", "before", "allocator alone"
    )
    for row in report["sizes"].values():
        mine, other = row["ours"], row["theirs"]
        cells = (mine["microseconds_per_voxel"], other["microseconds_per_voxel"])
        memory = (mine["bytes_per_voxel"], other["bytes_per_voxel"])
        table.add_row(*map(str, (row["voxels"], row["over"], *cells, *memory, row["allocator"])))
    console = Console(highlight=False)
    console.print(table)
    found = report["growth"]
    console.print(f"per voxel, 150k over 15k: {found['ours']} (before: {found['before']}); goals met: {report['ok']}")


def paragraph(report: Mapping[str, Any]) -> str:
    """What the README says of the report."""
    from benchmarks.markdown import wrapped

    small, large = report["sizes"].values()
    alone = " and ".join(f"{row['allocator']:.2f}" for row in (small, large))
    before, after = report["growth"]["before"], report["growth"]["ours"]
    return wrapped(
        f"From {small['voxels']:,} voxels to {large['voxels']:,} the CPU time of a training step grows "
        f"{10 * after:.1f} times (before: {10 * before:.1f}), {small['ours']['microseconds_per_voxel']:.0f} and "
        f"{large['ours']['microseconds_per_voxel']:.0f} µs a voxel; a step costs {small['over']:.2f} and "
        f"{large['over']:.2f} of one before, and needs {small['ours']['bytes_per_voxel'] / 1000:.1f} and "
        f"{large['ours']['bytes_per_voxel'] / 1000:.1f} kB of memory a voxel at its peak (before: "
        f"{small['theirs']['bytes_per_voxel'] / 1000:.1f} and {large['theirs']['bytes_per_voxel'] / 1000:.1f}). Memory "
        f"that the allocator keeps from step to step is alone worth {alone}. "
        f"{_goals(report)} Done otherwise, a step costs with {_ways(small, large, 'step')} as much, and its peak is "
        f"{_ways(small, large, 'memory')} as high. The limit: the products alone, at this machine's full speed, are "
        f"{small['limit']['products_over_before']:.2f} and {large['limit']['products_over_before']:.2f} of a step "
        f"before, and {small['limit']['kept_bytes_per_voxel'] / 1000:.1f} kB a voxel are kept for the backward "
        "pass. From "
        f"`python -m benchmarks.point_moe_voxels --before TREE`, {len(large['pairs'])} "
        f"alternated pairs with commit {report['before']}, one thread, {report['machine']['cpu']}: "
        "[benchmarks/results/point_moe_voxels.json](../../benchmarks/results/point_moe_voxels.json).\n"
    )


def _ways(small: Report, large: Report, of: str) -> str:
    ways = [(name, *(row["other_ways"][name][of] for row in (small, large))) for name in OTHER_WAYS]
    texts = [f"{name} {a:.2f} and {b:.2f}" for name, a, b in ways]
    return ", ".join(texts) + " times"


def _goals(report: Mapping[str, Any]) -> str:
    sizes = list(report["sizes"].values())
    slow = [f"{row['voxels']:,}" for row in sizes if row["over"] > GOALS["over_before"]]
    at = f" at {slow[0]} voxels" if 0 < len(slow) < len(sizes) else ""
    texts = {
        "growth": f"at most {GOALS['growth']:.2f} times the time per voxel",
        "over_before": f"{GOALS['over_before']:.2f} of a step before{at}",
        "bytes_per_voxel": f"{GOALS['bytes_per_voxel'] / 1000:.0f} kB a voxel",
    }
    missed = [texts[goal] for goal, ok in report["ok"].items() if not ok]
    return f"Goals that are missed: {', '.join(missed)}." if missed else f"Goals, all met: {', '.join(texts.values())}."


def main(args: list[str] | None = None) -> int:
    """Measure, print, write; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.point_moe_voxels", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--before", type=Path, metavar="TREE", help="checkout of the commit to compare with")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to write the report")
    parser.add_argument("--pairs", type=int, default=9, help="alternated pairs per comparison (default 9)")
    options = parser.parse_args(args)
    if options.before is None or not (options.before / "configs" / "point_moe.yaml").is_file():
        parser.error("--before TREE: a checkout of an earlier commit, as `git worktree add --detach TREE COMMIT` makes")
    report = measure(options.before.resolve(), pairs=options.pairs, done=lambda report: save(report, options.json))
    show(report)
    save(report, options.json)
    return 0 if all(report["ok"].values()) else 1


def save(report: Report, file: Path) -> None:
    """Write the report and, beside the committed one, what the README says of it."""
    from moeapps.files import write_json, write_text

    write_json(file, with_elsewhere(report, file))
    if file == RESULTS:
        text = README.read_text(encoding="utf-8")
        write_text(README, BLOCK.sub(lambda block: block[1] + paragraph(report) + block[2], text))


if __name__ == "__main__":
    raise SystemExit(main())
