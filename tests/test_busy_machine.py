# SPDX-License-Identifier: Apache-2.0
"""Where a machine is busy, a training says what helps; else it is silent."""

from __future__ import annotations

import os

import pytest

from moeapps.commands.threads import busy_hint


@pytest.mark.parametrize(
    ("threads", "load", "own", "told"),
    [(2, 9.0, None, True), (2, 1.5, None, False), (1, 9.0, None, False), (2, 9.0, "2", False)],
)
def test_who_shares_a_busy_machine_is_told(
    monkeypatch: pytest.MonkeyPatch, threads: int, load: float, own: str | None, told: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)

    assert ("OMP_NUM_THREADS=1" in busy_hint(threads)) == told
