# SPDX-License-Identifier: Apache-2.0
"""The committed choices of a backend are those of the committed ratios; the narrower gates name rows there are."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase

from benchmarks import backend_table, few_rows
from benchmarks.core_rows import all_rows
from moeapps.moe.backends.table import read_tables


def test_choices_follow_the_ratios_and_what_was_not_measured_the_place_with_fewer_rows() -> None:
    ratios = {"16": {"8": 0.9, "64": 0.99}, "256": {"8": 1.2}}

    assert backend_table.words_of(ratios, [16, 256], [8, 64]) == ["gs", "ss"]


def test_the_table_of_the_package_is_what_the_committed_ratios_say() -> None:
    table, results = read_tables(), json.loads(backend_table.RESULTS.read_text(encoding="utf-8"))

    assert set(table["choices"]) == set(results["sets"])
    for capability, measured in results["sets"].items():
        for dtype, ratios in measured["ratios"].items():
            assert table["choices"][capability][dtype] == backend_table.words_of(
                ratios, table["rows"], table["widths"]
            ), (capability, dtype)


def test_every_narrower_gate_names_rows_of_the_core_benchmark() -> None:
    names = [row.name for row in all_rows() if row.mode != "saved"]

    assert all(any(fnmatchcase(name, f"{gate}*") for name in names) for gate in few_rows.GATES)
