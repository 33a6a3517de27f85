# SPDX-License-Identifier: Apache-2.0
"""What is said of reading streams is what was measured, on blocks that were read while it was."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import streams

REPORT = json.loads(streams.RESULTS.read_text(encoding="utf-8"))


def test_every_kind_of_stream_was_measured_and_takes_less_than_the_gate() -> None:
    assert set(REPORT) == set(streams.CASES) == set(streams.KINDS)
    for name, row in REPORT.items():
        assert row["ok"] == (row["read"] < streams.GATE), name
        assert row["read_ms"] > 0, name
        assert row["blocks"] >= 1, name


def test_the_page_on_data_says_what_was_measured() -> None:
    page = " ".join(Path("docs/data.md").read_text(encoding="utf-8").split())

    assert streams.sentence(REPORT) in page
