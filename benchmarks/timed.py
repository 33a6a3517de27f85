# SPDX-License-Identifier: Apache-2.0
"""A command as a process of its own, and what it cost; the commit that a checkout has."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def timed(words: Sequence[str], log: Path, variables: Mapping[str, str]) -> dict[str, float]:
    """Run ``moeapps WORDS`` from the repository's root, one thread, and return ``cpu_seconds`` and ``seconds``.

    Args:
        words: after ``moeapps``.
        log: file for all that it says.
        variables: of the environment, beside ours.

    Raises:
        RuntimeError: the command failed; its last lines are in the message.
    """
    command = [sys.executable, "-m", "moeapps", *words]
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **variables}
    begun = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - begun
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} failed:\n{tail}")
    return {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1), "seconds": round(seconds, 1)}


def commit_of(tree: Path) -> str:
    """The commit of a checkout, short.

    Raises:
        subprocess.CalledProcessError: it is none.
    """
    done = subprocess.run(["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], check=True, capture_output=True)
    return done.stdout.decode().strip()
