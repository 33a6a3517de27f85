# SPDX-License-Identifier: Apache-2.0
"""The section "Measured" of docs/reliability.md, computed from benchmarks/results/reliability.json."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.markdown import wrapped
from benchmarks.reliability.memory import (
    BOUND_MIB,
    BOUND_TENSORS,
    EVERY,
    FIRST,
    LEAK_STEPS,
    PAGE_KIB,
    PEAK_STEPS,
    growth,
)
from moeapps.files import write_text

PAGE = Path("docs") / "reliability.md"
BLOCK = re.compile(r"(<!-- measured:begin -->\n).*?(<!-- measured:end -->)", re.DOTALL)
NAMED = re.compile(r"`(test_\w+)`")
_ROW = re.compile(r"^(\|[^\n]*`test_\w+`[^\n]*\|)[^|\n]*\|$", re.MULTILINE)
SIGNALS = ("SIGKILL", "SIGINT", "SIGTERM")
TEST = "test_a_chain_of_killed_and_interrupted_processes_takes_every_step_to_the_bit"
Report = dict[str, Any]


def write_page(report: Report, page: Path) -> None:
    """Replace what stands between the marks of the section, and the last column of the tables of promises."""
    text = with_cases(page.read_text(encoding="utf-8"), report.get("tests", {}))
    write_text(page, BLOCK.sub(lambda found: found[1] + wrapped(measured(report)) + found[2], text))


def with_cases(text: str, cases: dict[str, int]) -> str:
    """Write how many cases of the named tests pytest collects into the last cell of each promise."""

    def counted(row: re.Match[str]) -> str:
        known = [cases.get(name, 0) for name in NAMED.findall(row[1])]
        return f"{row[1]} {sum(known):,} |" if all(known) else f"{row[1]} not counted |"

    return _ROW.sub(counted, text)


def measured(report: Report) -> str:
    """Return the Markdown of the section."""
    parts = (faults, fuzzed, peaks, leaks)
    told = "\n\n".join(part(report) for part in parts)
    head = (
        "Computed by `python -m benchmarks.reliability` from [benchmarks/results/reliability.json]"
        "(../benchmarks/results/reliability.json); do not edit it. The command measures what the file lacks."
    )
    return f"\n{head}\n\n{told}\n\n"


def faults(report: Report) -> str:
    """Faults tried, and what was lost."""
    chains = by_case(report.get("faults", {}))
    title = (
        "### Faults\n\nA training goes on after an interruption, of whatever kind, and takes every step as if there "
        f"had been none. `make test-slow` holds it for one seed: `{TEST}`."
    )
    if not chains:
        return f"{title}\n\nNot measured yet."
    tried = Counter(fault["signal"] for held in chains.values() for chain in held for fault in chain["faults"])
    compared = sum(chain["compared"] for held in chains.values() for chain in held)
    differing = sum(lost_of(chain) for held in chains.values() for chain in held)
    counts = ", ".join(f"{tried[name]} {name}" for name in SIGNALS)
    lead = (
        f"{sum(tried.values())} faults ({counts}) in {sum(map(len, chains.values()))} chains of processes, each of "
        "which went on from the newest checkpoint of the one before. Every step of every process is compared with the "
        "same step of a run without faults: weights, optimizer, schedule, random states, loss, and the scores of every "
        f"validation and test. {compared:,} steps and scores compared, {differing or 'none'} not equal to the bit."
    )
    rows = [
        f"| command | chains | {' | '.join(SIGNALS)} | compared | not equal | most steps taken again |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, held in chains.items():
        struck = Counter(fault["signal"] for chain in held for fault in chain["faults"])
        cells = (
            *(name.replace("_curriculum", ", its curriculum"), len(held), *(struck[signal] for signal in SIGNALS)),
            sum(chain["compared"] for chain in held),
            sum(lost_of(chain) for chain in held),
            max(chain["repeated"] for chain in held),
        )
        rows.append(_row(cells))
    return "\n".join((title, "", lead, "", *rows))


def by_case(held: Report) -> dict[str, list[Report]]:
    """Return the chains of each case, of all seeds."""
    found: dict[str, list[Report]] = {}
    for name, chain in held.items():
        found.setdefault(name.rpartition(" ")[0], []).append(chain)
    return found


def lost_of(chain: Report) -> int:
    """Steps and scores of a chain that differ or never came."""
    return len(chain["differing"]) + len(chain["missing"])


def fuzzed(report: Report) -> str:
    """Cases of ``make fuzz`` per reader."""
    held: Report = report.get("fuzz", {})
    title = (
        "### Damaged files\n\nA damaged file gives a sample or is refused in one sentence, whatever its format: tests "
        "named `..._is_read_or_told`. `make fuzz` goes on from what it has tried, up to 10,000 cases each. "
        "Checkpoints that are read here have no digest beside them, and the sums of their zip entries agree: the "
        "damage lies outside of what they hold."
    )
    if not held:
        return f"{title}\n\nNot measured yet."
    cases, losses = sum(row["cases"] for row in held.values()), sum(len(row["losses"]) for row in held.values())
    lead = (
        f"{cases:,} damaged files for {len(held)} readers (`make fuzz`), at least "
        f"{min(row['cases'] for row in held.values()):,} each, in guarded processes. A loss is anything but a sample "
        "or the reader's error: another exception, a crash, five seconds for a file of some kilobytes, or 256 MB. A "
        "reader that had a loss is mended and tried anew from its first case. "
        f"Losses: {losses or 'none'}."
    )
    rows = ["| reader | cases | read | refused | losses |", "|---|---|---|---|---|"]
    for name, row in held.items():
        cells = (f"{row[key]:,}" for key in ("cases", "read", "refused"))
        rows.append(_row((name, *cells, len(row["losses"]))))
    return "\n".join((title, "", lead, "", *rows))


def peaks(report: Report) -> str:
    """Peak memory of the base configs."""
    held: Report = report.get("peak", {})
    title = "### Memory of the base configs"
    if not held:
        return f"{title}\n\nNot measured yet."
    lead = (
        f"Resident memory of a process that makes or reads its data and takes {PEAK_STEPS} steps on the CPU, one "
        "thread: after all imports, at its peak, and the difference."
    )
    rows = ["| system | imported, MiB | peak, MiB | above, MiB | CPU s |", "|---|---|---|---|---|"]
    for name, row in held.items():
        cells = (f"{row[key]:,.0f}" for key in ("imported_mib", "peak_mib", "over_import_mib", "cpu_seconds"))
        rows.append(_row((name, *cells)))
    return "\n".join((title, "", lead, "", *rows))


def leaks(report: Report) -> str:
    """What long trainings leave behind."""
    held: Report = report.get("leak", {})
    title = "### What a long training keeps"
    if not held:
        return f"{title}\n\nNot measured yet."
    grown = {name: growth(row["marks"]) for name, row in held.items()}
    outside = [name for name, found in grown.items() if not found["within"]]
    lead = (
        f"{LEAK_STEPS:,} steps at debug size with a validation every {EVERY}; what is added between step {FIRST:,} "
        "and the last, after the first validation, whose metrics keep a state. Bounds: "
        f"{BOUND_MIB:.1f} MiB of resident memory, which is a page of {PAGE_KIB} KiB per step and less than any kept "
        f"batch or graph, and {BOUND_TENSORS} live tensors, a tenth of one per step. Outside of them: "
        f"{', '.join(outside) or 'none'}."
    )
    if missing := sorted({*report.get("peak", {})} - {*held}):
        lead += f" Still to be measured: {', '.join(missing)}."
    rows = ["| system | resident, MiB | live tensors | their memory at the end, MiB |", "|---|---|---|---|"]
    for name, row in held.items():
        found, end = grown[name], row["marks"][str(LEAK_STEPS)]
        rows.append(_row((name, _signed(found["grown_mib"]), _signed(found["grown_tensors"]), end["tensors_mib"])))
    return "\n".join((title, "", lead, "", *rows))


def _signed(value: float) -> str:
    return f"{value:+}".replace("-", "−")


def _row(cells: tuple[object, ...]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
