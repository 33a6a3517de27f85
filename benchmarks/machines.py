# SPDX-License-Identifier: Apache-2.0
"""Results of one benchmark on several kinds of processors, in one file: the newest, the others below ``elsewhere``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def kind_of(report: Mapping[str, Any]) -> str:
    """Instruction set that a report was measured with; nothing where it does not say."""
    machine = report.get("machine")
    return str(machine.get("cpu", "") if isinstance(machine, Mapping) else report.get("cpu", ""))


def known_here(report: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a file holds of the kind of processor of a report; rows of two kinds do not belong side by side."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return known if kind_of(known) == kind_of(report) else {}


def with_elsewhere(report: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A report to be written to a file, with what this holds of other kinds of processors below ``elsewhere``.

    Args:
        report: measured here.
        path: the file; need not be there.
    """
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    others = known.pop("elsewhere", {})
    if kind_of(known):
        others[kind_of(known)] = known
    others.pop(kind_of(report), None)
    return {**report, **({"elsewhere": others} if others else {})}
