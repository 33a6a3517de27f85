# SPDX-License-Identifier: Apache-2.0
"""A cell gets another digest only with every difference told; what it measured is never touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.evidence.restamp import Snapshot, compare, restamp
from moeapps.evidence.cells import read_cells, write_cell
from tests.evaluation.evidence_common import result


def tree(digest: str, **says: Any) -> Snapshot:
    return {"moe": {"digest": digest, "says": {"config": says, "words": ["--a=old.place.Net"]}}}


def test_every_leaf_that_differs_is_told_and_moved_class_paths_are_not() -> None:
    before = tree("old", net={"class_path": "old.place.Net", "dim": 8}, lr=1)
    after = tree("new", net={"class_path": "new.room.Net", "depth": 2}, lr=3)
    after["moe"]["says"]["words"] = ["--a=new.room.Net"]
    told = compare(before, after, {"old.place": "new.room"})
    assert list(told) == ["changed config.lr: 1 -> 3", "added config.net.depth: 2", "gone config.net.dim: 8"]
    assert compare(before, after, {}).keys() - told.keys() == {
        "changed config.net.class_path: 'old.place.Net' -> 'new.room.Net'",
        "changed words.0: '--a=old.place.Net' -> '--a=new.room.Net'",
    }


def test_a_prefix_is_a_whole_word_of_a_path() -> None:
    before, after = tree("old", a="old.place2.Net", b="my.old.place.Net"), tree("new", a="old.place2.Net", b="x")
    assert compare(before, after, {"old.place": "new"}).keys() >= {"changed config.b: 'my.old.place.Net' -> 'x'"}
    assert not any("config.a" in line for line in compare(before, after, {"old.place": "new"}))


def test_only_the_digest_changes_and_only_of_cells_made_with_the_old_configs(tmp_path: Path) -> None:
    made = [result("moe", 1, 0.5, definition="old"), result("moe", 2, 0.7, definition="older"), result("dense", 1, 0.1)]
    for cell in made:
        write_cell(tmp_path, cell)
    assert restamp(tmp_path, "toy", tree("old"), tree("new")) == 1
    assert read_cells(tmp_path, "toy") == {
        cell.cell: replace(cell, definition="new") if cell.definition == "old" else cell for cell in made
    }
    assert restamp(tmp_path, "toy", tree("new"), tree("newer"), only="dense") == 0
