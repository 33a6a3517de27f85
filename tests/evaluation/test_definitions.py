# SPDX-License-Identifier: Apache-2.0
"""A cell is known again by what its configs come to, not by how they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeapps.evidence.grid import Grid, GridError, Variant

BASE = "model: {lr: 1, net: {dim: 8, depth: 2}}\ntrainer: {callbacks: [a]}\n"


def definition(folder: Path, *overlays: str, base: str = BASE, flags: tuple[str, ...] = ()) -> str:
    """The digest of a base config under overlays, given as texts."""
    names = [f"{i}.yaml" for i in range(len(overlays) + 1)]
    for name, text in zip(names, (base, *overlays), strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    grid = Grid(system="toy", config=names[0], variants={"x": Variant(tuple(names[1:]), flags)}, claims=(), headline=())
    return grid.definition("x", folder)


def test_what_a_later_config_overrides_does_not_count(tmp_path: Path) -> None:
    given = definition(tmp_path, "model: {lr: 5}\n")
    assert definition(tmp_path, "model: {lr: 3, net: {dim: 8}}\n", "model: {lr: 5}\n") == given
    assert definition(tmp_path, "# why\nmodel:\n  lr: 5\n") == given


@pytest.mark.parametrize(
    "above",
    [
        ("model: {lr: 5, net: {depth: 3}}\n",),
        ("model: {lr: 5, seed: 1}\n",),
        ("model: {lr: 5}\n", "model: {lr: 1}\n"),
        ("model: {lr: 5}\ntrainer: {callbacks: [a, b]}\n",),
        ("model: {lr: 5}\ntrainer: {callbacks+: [a]}\n",),
    ],
)
def test_what_holds_in_the_end_does(tmp_path: Path, above: tuple[str, ...]) -> None:
    assert definition(tmp_path, *above) != definition(tmp_path, "model: {lr: 5}\n")


def test_lists_that_add_do_not_replace_each_other(tmp_path: Path) -> None:
    one, two = "trainer: {callbacks+: [b]}\n", "trainer: {callbacks+: [c]}\n"
    assert len({definition(tmp_path, *above) for above in ((one,), (two,), (one, two), (two, one))}) == 4


def test_flags_count_and_a_missing_file_is_named(tmp_path: Path) -> None:
    assert definition(tmp_path) != definition(tmp_path, flags=("--model.lr=1",))
    grid = Grid(system="toy", config="absent.yaml", variants={"x": Variant()}, claims=(), headline=())
    with pytest.raises(GridError, match=r"'x': cannot read absent\.yaml"):
        grid.definition("x", tmp_path)
