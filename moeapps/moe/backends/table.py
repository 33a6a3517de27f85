# SPDX-License-Identifier: Apache-2.0
"""Which of two backends is faster on the CPU, from a table that was measured: ``table.json`` beside this file.

``python -m benchmarks.backend_table`` (the end of ``make bench``) measures the instruction set of its machine and
writes its part of the table. Nothing is timed at run time: the same call takes the same backend, today and tomorrow.

Shape legend: R rows per busy expert, D input width, H width of the first layer's output.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

PATH = Path(__file__).with_name("table.json")
Preferred = Literal["segments", "grouped_mm"]
_LETTERS: dict[str, Preferred] = {"s": "segments", "g": "grouped_mm"}


@dataclass(frozen=True)
class Table:
    """The choices of one instruction set and dtype.

    Attributes:
        rows: Rows per expert that were measured, ascending.
        widths: Widths sqrt(D H) that were measured, ascending.
        choices: For each of ``rows`` a word with a letter for each of ``widths``: ``s`` for ``segments``, ``g`` for
            ``grouped_mm``.

    Raises:
        ValueError: If the table is not complete or not in order.

    Example:
        >>> Table((16, 256), (32, 128), ("gg", "gs")).choice(rows=1000.0, width=100.0)
        'segments'
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    choices: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, axis in (("rows", self.rows), ("widths", self.widths)):
            if not axis or axis[0] < 1 or any(a >= b for a, b in itertools.pairwise(axis)):
                raise ValueError(f"{name}={list(axis)}: give ascending numbers, 1 or more; {_ANEW}.")
        whole = len(self.choices) == len(self.rows) and all(len(w) == len(self.widths) for w in self.choices)
        if not whole or set("".join(self.choices)) - set(_LETTERS):
            raise ValueError(
                f"choices={list(self.choices)}: give {len(self.rows)} words of {len(self.widths)} letters "
                f"{sorted(_LETTERS)}; {_ANEW}."
            )

    def choice(self, *, rows: float, width: float) -> Preferred:
        """The choice at the nearest measured place, by ratios; the edge holds for what lies beyond it."""
        return _LETTERS[self.choices[_nearest(self.rows, rows)][_nearest(self.widths, width)]]


_ANEW = "python -m benchmarks.backend_table writes the table anew"


def _nearest(axis: tuple[int, ...], value: float) -> int:
    return sum(value * value > low * high for low, high in itertools.pairwise(axis))


def read_tables(path: Path = PATH) -> dict[str, Any]:
    """Return the content of the file: axes, the choices of every instruction set and dtype, and the default one."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@functools.cache
def table_of(capability: str, dtype: torch.dtype) -> Table:
    """The table of an instruction set, as `capability` names it, and a dtype.

    An unknown set has the table of the default one, a dtype that was not measured that of float32.
    """
    content = read_tables()
    known = content["choices"]
    own = known.get(capability, known[content["default"]])
    words = own.get(str(dtype).removeprefix("torch."), own["float32"])
    return Table(tuple(content["rows"]), tuple(content["widths"]), tuple(words))


@functools.cache
def capability() -> str:
    """Instruction set that torch uses here; AMX where an AVX-512 processor has tiles for products in bfloat16, too."""
    name = torch.backends.cpu.get_cpu_capability()
    return "AMX" if name == "AVX512" and torch.cpu._is_amx_tile_supported() else name


def preferred(rows: float, weights: int, dtype: torch.dtype) -> Preferred:
    """The faster backend for ``rows`` per busy expert whose first layer has ``weights`` numbers, D H."""
    return table_of(capability(), dtype).choice(rows=rows, width=math.sqrt(weights))
