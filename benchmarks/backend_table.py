# SPDX-License-Identifier: Apache-2.0
"""Which backend is faster where, on this processor: ``python -m benchmarks.backend_table [--pairs N]``.

For every number of rows per expert and every width a step (forward and backward) of a bank of four experts by
``segments`` is timed beside one by ``grouped_mm``: one thread, CPU time, pairs in alternating order, the median. The
choices of this instruction set are written into moeapps/moe/backends/table.json, all ratios into
benchmarks/results/backend_table.json; other instruction sets stay as they are. ``ATEN_CPU_CAPABILITY=avx2
MKL_ENABLE_INSTRUCTIONS=AVX2`` measures a smaller set on a larger processor. Three minutes on an idle core.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.core import machine
from benchmarks.core_cases import Size, moe_step, paired_ratios
from moeapps.files import write_json
from moeapps.moe.backends.table import PATH, capability, read_tables

RESULTS = Path(__file__).parent / "results" / "backend_table.json"
EXPERTS = 4
MOST_WORK = 1 << 28
"""Multiply-adds of a layer per expert; places of more work are taken to be like the one with fewer rows."""
MARGIN = 0.97
"""``grouped_mm`` keeps more for backward and must be faster than this, for ``segments`` to be passed over."""


def ratio_at(rows: int, width: int, dtype: torch.dtype, pairs: int) -> float:
    """CPU time of a step by ``grouped_mm`` over one by ``segments``."""
    size = Size(rows * EXPERTS, EXPERTS, 1, width, width)
    grouped, segments = (
        moe_step(size, "silu-mlp", "fwd+bwd", name, dtype=dtype) for name in ("grouped_mm", "segments")
    )
    return statistics.median(paired_ratios(grouped, segments, pairs=pairs))


def measure(pairs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Dtype -> rows -> width -> ratio."""
    axes = read_tables()
    native = torch.cpu._is_avx512_bf16_supported() and capability() in ("AVX512", "AMX")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in (torch.float32, *([torch.bfloat16] if native else [])):
        name = str(dtype).removeprefix("torch.")
        places = [(r, w) for r in axes["rows"] for w in axes["widths"] if r * w * w <= MOST_WORK]
        for rows, width in track(places, description=name, transient=True):
            ratio = round(ratio_at(rows, width, dtype, pairs), 3)
            found.setdefault(name, {}).setdefault(str(rows), {})[str(width)] = ratio
    return found


def words_of(ratios: dict[str, dict[str, float]], rows: list[int], widths: list[int]) -> list[str]:
    """The choices, a word for each number of rows; what was not measured is like the place with fewer rows.

    Args:
        ratios: rows -> width -> ``grouped_mm`` over ``segments``.
        rows: of the table.
        widths: of the table.
    """
    words: list[str] = []
    for r in rows:
        known = ratios.get(str(r), {})
        letters = ["" if str(w) not in known else "g" if known[str(w)] < MARGIN else "s" for w in widths]
        words.append("".join(letter or (words[-1][i] if words else "s") for i, letter in enumerate(letters)))
    return words


def main(args: list[str] | None = None) -> int:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backend_table", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--pairs", type=int, default=9, help="alternated pairs per place (default 9)")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    ratios, table = measure(options.pairs), read_tables()
    own = {name: words_of(by_rows, table["rows"], table["widths"]) for name, by_rows in ratios.items()}
    here = capability()
    table["choices"][here] = own
    write_json(PATH, table)  # choices alone: the package holds no numbers of a machine
    kept: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    sets = {**kept.get("sets", {}), here: {"machine": machine(), "pairs": options.pairs, "ratios": ratios}}
    write_json(RESULTS, {"command": "python -m benchmarks.backend_table", "margin": MARGIN, "sets": sets})
    for name, words in own.items():
        print(here, name, *(f"{r}:{word}" for r, word in zip(table["rows"], words, strict=True)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
