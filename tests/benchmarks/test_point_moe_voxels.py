# SPDX-License-Identifier: Apache-2.0
"""The benchmark of Point-MoE's growth says what its file holds; no clock is trusted here."""

from __future__ import annotations

import json
import statistics
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from benchmarks import point_moe_step as served
from benchmarks import point_moe_voxels as voxels
from benchmarks.system_share import build

REPORT = json.loads(voxels.RESULTS.read_text(encoding="utf-8")) if voxels.RESULTS.exists() else None


def test_the_readme_says_what_the_committed_file_holds_and_nothing_before_there_is_one() -> None:
    block = voxels.BLOCK.search(Path("tasks/point_cloud/README.md").read_text(encoding="utf-8"))

    assert block is not None
    assert block[0] == block[1] + ("" if REPORT is None else voxels.paragraph(REPORT)) + block[2]


def test_a_committed_file_has_both_sizes_and_judges_them_right() -> None:
    sizes = {} if REPORT is None else REPORT["sizes"]

    assert [row["voxels"] for row in sizes.values()] in ([], [15_000, 150_000])
    for row in sizes.values():
        assert len(row["pairs"]) % 2 == 1
        assert row["over"] == statistics.median(row["pairs"])
    assert voxels.GOALS == {"growth": 1.1, "over_before": 0.75, "bytes_per_voxel": 20_000}
    if REPORT is not None:
        assert REPORT["goals"] == voxels.GOALS
        assert REPORT["ok"] == voxels.verdicts(sizes)


class Tree:
    """A tree whose step takes as long as said, and twice as long once its allocator is glibc's own."""

    def __init__(self, seconds: dict[str, float], memory: int = 0) -> None:
        self.seconds, self.memory, self.factor = seconds, memory, 1.0

    def __call__(self, size: str, what: str) -> dict[str, float]:
        voxels = {"15k": 15_000, "150k": 150_000}[size]
        self.factor = {"glibc": 2.0, "keep": 1.0}.get(what, self.factor)
        if what.startswith("memory"):
            return {"voxels": voxels, "bytes": self.memory * voxels}
        if what == "limit":
            return {"voxels": voxels, "seconds": self.seconds[size] / 4, "bytes": self.memory * voxels / 2}
        return {"voxels": voxels, "seconds": self.factor * self.seconds[size], "faults": 7}


@pytest.mark.parametrize(
    ("seconds", "memory", "missed"),
    [
        ({"15k": 0.75, "150k": 7.5}, 20_000, set()),
        ({"15k": 0.5, "150k": 6.0}, 20_000, {"growth"}),
        ({"15k": 0.76, "150k": 7.5}, 20_001, {"over_before", "bytes_per_voxel"}),
    ],
)
def test_goals_are_judged_at_the_worse_size(seconds: dict[str, float], memory: int, missed: set[str]) -> None:
    told: list[int] = []
    before = Tree({"15k": 1.0, "150k": 12.0})
    rows = voxels.compare(Tree(seconds, memory), before, pairs=3, done=lambda rows: told.append(len(rows)))

    assert {goal for goal, ok in voxels.verdicts(rows).items() if not ok} == missed
    assert voxels.growth(rows, "theirs") == pytest.approx(1.2)
    assert [row["pairs"] for row in rows.values()] == [[seconds["15k"]] * 3, [round(seconds["150k"] / 12, 3)] * 3]
    assert [row["allocator"] for row in rows.values()] == [0.5, 0.5]
    assert [row["other_ways"] for row in rows.values()] == [
        {key: {"step": 1.0, "memory": 1.0} for key in served.OTHER_WAYS}
    ] * 2
    assert [row["limit"] for row in rows.values()] == [
        {"products_over_before": round(seconds["15k"] / 4, 3), "kept_bytes_per_voxel": round(memory / 2)},
        {"products_over_before": round(seconds["150k"] / 48, 3), "kept_bytes_per_voxel": round(memory / 2)},
    ]
    assert len(told) == 8  # after each pair and each end


@pytest.mark.parametrize("name", served.OTHER_WAYS)
def test_another_way_gives_the_same_loss_and_gradients_and_is_taken(name: str) -> None:
    files = ["--config", "configs/debug/tiny.yaml", "--config", "configs/debug/point_moe.yaml"]
    task, batch = build("point_moe", files)
    task.eval()
    found = []
    for ways in ([], served.OTHER_WAYS[name]()):
        with ExitStack() as stack:
            for way in ways:
                stack.enter_context(way)
            loss = task.shared_step(batch, "train").loss
            found.append([loss, *torch.autograd.grad(loss, [p for p in task.parameters() if p.requires_grad])])

    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True)) or name != "attention by products"


def test_the_trees_run_without_settings_of_the_allocator_that_the_user_made(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, str]] = []

    class Process:
        def __init__(self, *_: object, env: dict[str, str], **__: object) -> None:
            found.append(env)

        def kill(self) -> None: ...

        def wait(self) -> None: ...

    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setattr(served.subprocess, "Popen", Process)
    with served.tree(Path()):
        pass

    assert found[0]["OMP_NUM_THREADS"] == "1"
    assert not any(name.startswith("MALLOC_") for name in found[0])


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_the_paragraph_names_the_goals_that_are_missed(factor: float) -> None:
    ours = Tree({"15k": 0.5 * factor, "150k": 5.0 * factor}, 20_000)
    sizes = voxels.compare(ours, Tree({"15k": 1.0, "150k": 12.0}, 23_456), pairs=1, done=lambda rows: None)
    report = {
        "before": "abc1234",
        "machine": {"cpu": "AVX512"},
        "ok": voxels.verdicts(sizes),
        "growth": {"ours": voxels.growth(sizes, "ours"), "before": voxels.growth(sizes, "theirs")},
        "sizes": sizes,
    }

    text = " ".join(voxels.paragraph(report).split())

    assert "grows 10.0 times (before: 12.0)" in text
    assert "20.0 and 20.0 kB of memory a voxel at its peak (before: 23.5 and 23.5)" in text
    assert f"a step costs {0.5 * factor:.2f} and {0.4167 * factor:.2f} of one before" in text
    assert ("Goals that are missed: 0.75 of a step before." if factor == 2.0 else "Goals, all met:") in text
