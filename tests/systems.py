# SPDX-License-Identifier: Apache-2.0
"""All systems as tests see them: whatever lies under configs/ is tested, later systems included."""

from __future__ import annotations

import re
from pathlib import Path

CONFIGS = Path("configs")
TINY = CONFIGS / "debug" / "tiny.yaml"
BASES = sorted(CONFIGS.glob("*.yaml"))
# Folders whose files belong to one base config: the one whose name they begin with.
OWNED = ("baselines", "paper")
BASELINES = sorted(CONFIGS.glob("baselines/*.yaml"))
PAPERS = sorted(CONFIGS.glob("paper/*.yaml"))
OTHERS = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in OWNED)
GOLDEN = Path("tests") / "golden"


def base_of(overlay: Path) -> Path:
    """Return the base config an overlay belongs to: the longest whose name begins the overlay's."""
    owners = [base for base in BASES if re.match(rf"{re.escape(base.stem)}(_|$)", overlay.stem)]
    assert owners, f"{overlay} must be named <base config>_<variant>.yaml; base configs: {[b.stem for b in BASES]}"
    return max(owners, key=lambda base: len(base.stem))


def flags(*files: Path) -> list[str]:
    """Return the ``--config`` flags of files in order."""
    return [word for file in files for word in ("--config", str(file))]


def tiny(base: Path, *overlays: Path) -> list[str]:
    """Return the flags of a base config, overlays, and the tiny settings (of the system too, where it has some)."""
    own = CONFIGS / "debug" / base.name
    return flags(base, *overlays, TINY, *([own] if own.is_file() else []))


def name(path: Path) -> str:
    """Return the test id of a file."""
    return f"{path.parent.name}/{path.stem}" if path.parent != CONFIGS else path.stem
