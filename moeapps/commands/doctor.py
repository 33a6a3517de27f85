# SPDX-License-Identifier: Apache-2.0
"""``moeapps doctor``: versions and settings of this installation, and problems with it."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import entry_points
from pathlib import Path


def script_owner(name: str) -> list[str]:
    """Return the installed packages that declare a console script of this name."""
    return sorted({entry.dist.name for entry in entry_points(group="console_scripts", name=name) if entry.dist})


def report() -> list[tuple[str, str]]:
    """Return (name, finding) pairs; imports torch."""
    import torch

    from moeapps.data.cache import cache_dir
    from moeapps.training.folders import runs_root
    from moeapps.training.run import git_commit, versions

    lines = [(name, number) for name, number in versions().items()]
    lines.append(("commit", git_commit() or "not a checkout"))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines.append(("threads", f"torch uses {torch.get_num_threads()} of {cpus} cores"))
    lines.append(("accelerator", _accelerator()))
    lines.append(("bf16", f"autocast works on CPU: {_bf16_works()}"))
    where = shutil.which("lightning")
    owners = script_owner("lightning")
    lines.append(("lightning", f"{where or 'not on PATH'}; declared by: {', '.join(owners) or 'nobody'}"))
    if "lightning-sdk" in owners:
        lines.append(("", "lightning-sdk declares it too: the package installed last wins; `moeapps` always works"))
    cache = cache_dir()
    lines.append(("cache", f"{cache} ({_free(cache)} free)"))
    lines.append(("runs", f"{runs_root()} ({_free(runs_root())} free)"))
    return lines


def _accelerator() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return "none; everything runs on the CPU"


def _bf16_works() -> str:
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    return "yes" if product.dtype == torch.bfloat16 else "no"


def _free(folder: Path) -> str:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB"


def main(args: list[str]) -> int:
    """Print the report; ``-h`` explains."""
    if args and args[0] in ("-h", "--help"):
        print("usage: moeapps doctor\n\nShow versions, threads, caches, free disk, bf16, and who owns `lightning`.")
        return 0
    for name, finding in report():
        print(f"{name:<16}{finding}")
    return 0
