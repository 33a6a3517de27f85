# SPDX-License-Identifier: Apache-2.0
"""How many cases of each test that docs/reliability.md names pytest collects."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.reliability.page import NAMED


def count_cases(page: Path) -> dict[str, int]:
    """Collect all tests; return the cases of each that a page names, 0 where pytest finds none.

    Raises:
        RuntimeError: the tests cannot be collected; the message has the end of pytest's output.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:xdist", "tests"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOEAPPS_FUZZ")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the tests cannot be collected:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    found = Counter(re.findall(r"^tests/[^\s:]+\.py::(?:\w+::)*(test_\w+)", done.stdout, re.MULTILINE))
    return {name: found[name] for name in sorted({*NAMED.findall(page.read_text(encoding="utf-8"))})}
