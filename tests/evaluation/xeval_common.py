# SPDX-License-Identifier: Apache-2.0
"""Run folders with made-up results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROLES = {"a": "seen", "b": "seen", "v": "validation", "u": "unseen", "w": "unseen"}


def write_run(
    folder: Path,
    values: list[float | None],
    *,
    variant: str = "moe",
    seed: int = 0,
    units: dict[str, Any] | None = None,
    direction: str = "max",
    system: str = "toy",
    parts: dict[str, Any] | None = None,
    stage: str = "test",
    roles: dict[str, str] | None = None,
    **header: Any,
) -> Path:
    rows = [
        {"domain": d, "role": r, "metric": m, "value": x if m == "acc" else 1.0, "n": 4, "direction": direction}
        for (d, r), x in zip((roles or ROLES).items(), values, strict=True)
        for m in ("loss", "acc")
    ]
    header = {"system": system, "name": variant, "seed": seed, "main_metric": "acc", **header}
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    text = json.dumps({"header": header, "rows": rows, "units": units or {}, "parts": parts or {}})
    (folder / "metrics" / f"{stage}.json").write_text(text)
    return folder
