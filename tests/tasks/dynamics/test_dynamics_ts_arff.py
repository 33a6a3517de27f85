# SPDX-License-Identifier: Apache-2.0
"""Series in .ts and .arff files: series, classes and targets come back, and damage is named with its line."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from series_files import write_ts

from tasks.dynamics.data.readers.arff_format import read_arff
from tasks.dynamics.data.readers.ts_format import SeriesFormatError, read_ts
from tasks.dynamics.data.series import TsFiles
from tests.tasks.dynamics.series_common import ENOUGH, NUMBERS

SERIES = st.integers(1, 3).flatmap(
    lambda channels: st.lists(
        st.integers(1, 6).flatmap(
            lambda length: st.lists(
                st.lists(NUMBERS, min_size=channels, max_size=channels), min_size=length, max_size=length
            )
        ),
        min_size=1,
        max_size=4,
    )
)


@ENOUGH
@given(SERIES, st.lists(st.sampled_from(["1", "-1.5", "walk"]), min_size=4, max_size=4))
def test_ts_with_classes_comes_back(series: Any, labels: list[str]) -> None:
    arrays = [np.array(values) for values in series]
    with tempfile.TemporaryDirectory() as folder:
        write_ts(Path(folder) / "a.ts", arrays, labels[: len(arrays)])
        found = read_ts(Path(folder) / "a.ts")

    assert (found.labels, found.targets) == (labels[: len(arrays)], None)
    for got, wanted in zip(found.series, arrays, strict=True):
        np.testing.assert_array_equal(got, wanted)


def as_text(values: Any) -> str:
    return ",".join("?" if np.isnan(v) else repr(float(v)) for v in values)


@ENOUGH
@given(SERIES, st.lists(st.floats(-1e9, 1e9), min_size=4, max_size=4))
def test_ts_of_regression_gives_series_and_targets(series: Any, targets: list[float]) -> None:
    head = "@problemName x\n@timestamps false\n@targetlabel true\n@data\n"
    rows = [":".join([*map(as_text, np.array(x).T), repr(t)]) for x, t in zip(series, targets, strict=False)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.ts"
        path.write_text(head + "\n".join(rows) + "\n")
        found = read_ts(path)

    assert (found.labels, found.targets) == (None, targets[: len(series)])
    for got, wanted in zip(found.series, series, strict=True):
        np.testing.assert_array_equal(got, np.array(wanted))


@ENOUGH
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5)).flatmap(
        lambda shape: st.lists(
            st.lists(st.lists(NUMBERS, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]),
            min_size=1,
            max_size=3,
        )
    ),
    st.booleans(),
)
def test_arff_flat_and_relational_gives_the_series_of_the_rows(rows: Any, labelled: bool) -> None:
    """``rows`` [n, D, T]: a relational attribute where there are several channels."""
    x = np.array(rows)
    n, channels, length = x.shape
    samples = "".join(f"@attribute a{i} numeric\n" for i in range(length))
    head = samples if channels == 1 else f"@attribute r relational\n{samples}@end r\n"
    lines = [as_text(one[0]) if channels == 1 else "'" + r"\n".join(map(as_text, one)) + "'" for one in x]
    labels = ["up", "down", "up"][:n]
    if labelled:
        head, lines = head + "@attribute c {up,down}\n", [f"{a},{b}" for a, b in zip(lines, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.arff"
        path.write_text(f"@relation x\n{head}@data\n" + "\n".join(lines) + "\n")
        found = read_arff(path)

    assert (found.labels, found.targets) == (labels if labelled else None, None)
    np.testing.assert_array_equal(np.stack(found.series), x.transpose(0, 2, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@attribute a numeric\n@attribute c {x,y}\n@data\n1,x\ntwo,y\n", "a.arff, line 6 cannot be read"),
        ("@attribute a numeric\n@attribute c {x,y}\n@data\n1,x\n1,z\n", "a.arff, line 6 cannot be read"),
        ("@attribute a numeric\n@attribute b {x,y}\n@attribute c {x,y}\n@data\n1,x,y\n", "kinds nominal, numeric"),
        ("@attribute a numeric\n@data\n", "holds no series"),
        ("@attribute a numeric\n@data\ninf\n", "series 1: an infinite value"),
        ("@data\n1\n", "a.arff"),
        ("", "a.arff"),
    ],
)
def test_damaged_arff_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.arff").write_text(f"@relation x\n{text}")

    with pytest.raises(SeriesFormatError, match=message):
        read_arff(tmp_path / "a.arff")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@targetlabel true\n@data\n1,2:x\n", "line 3: could not convert"),
        ("@targetlabel true\n@data\n1,2:nan\n", "line 3: .* a target that is no number"),
        ("@targetlabel true\n@classlabel true a\n@data\n1,2:a\n", "announces a class and a target"),
        ("@data\n1,inf\n", "line 2: an infinite value"),
    ],
)
def test_damaged_regression_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.ts").write_text(text)

    with pytest.raises(SeriesFormatError, match=message):
        read_ts(tmp_path / "a.ts")


def test_arff_files_and_files_without_classes_are_environments(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    head = (
        "@relation x\n"
        + "".join(f"@attribute a{i} numeric\n" for i in range(12))
        + "@attribute target numeric\n@data\n"
    )
    for name in ("TRAIN", "TEST"):
        rows = [as_text(row) for row in rng.normal(size=(4, 13))]
        (tmp_path / f"{name}.arff").write_text(head + "\n".join(rows) + "\n")
    source = TsFiles(root=tmp_path, train_file="TRAIN.arff", test_file="TEST.arff", val_steps=2, test_steps=3)

    assert source.default_seen == ["series"]
    assert source.load("series", "train", ["series"]).x.shape == (4, 1, 7, 1)
