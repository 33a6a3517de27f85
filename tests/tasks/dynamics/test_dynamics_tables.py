# SPDX-License-Identifier: Apache-2.0
"""Series as programs write them: any spelling of a table reads as that table, or one sentence names the line."""

from __future__ import annotations

import datetime
import logging
import os
import tempfile
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from series_files import write_csv, write_npz, write_ts

from tasks.dynamics.data.readers.arff_format import read_arff
from tasks.dynamics.data.readers.csv_format import CsvFile, read_csv
from tasks.dynamics.data.readers.npz_format import read_npz
from tasks.dynamics.data.readers.ts_format import SeriesFormatError, read_ts
from tasks.dynamics.data.series import CsvSeries
from tests.fuzzing import refused
from tests.tasks.dynamics.series_common import ENOUGH, NUMBERS

TABLES = st.integers(2, 8).flatmap(lambda rows: st.lists(st.tuples(NUMBERS, NUMBERS), min_size=rows, max_size=rows))


def read_text(text: str | bytes) -> CsvFile:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "e.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_csv(path)


def cell(value: float, point: str, missing: str) -> str:
    return missing if np.isnan(value) else f"{value:.6f}".replace(".", point)


def test_a_row_of_missing_values_between_tabs_is_a_row() -> None:
    found = read_text(b"a\tb\n\t\n1\t2\n")

    np.testing.assert_array_equal(found.series[0], [[np.nan, np.nan], [1.0, 2.0]])


@ENOUGH
@given(
    TABLES,
    st.sampled_from([(",", "."), (";", "."), (";", ","), ("\t", "."), ("\t", ",")]),
    st.sampled_from(["", "NaN", "nan", "NA", "null", "?", "  "]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "utf-16"]),
    st.booleans(),
)
def test_every_spelling_of_one_table_reads_as_that_table(
    rows: Any, form: tuple[str, str], missing: str, end: str, encoding: str, quoted: bool
) -> None:
    separator, point = form
    mark = '"' if quoted else ""
    lines = [separator.join(f"{mark}{name}{mark}" for name in ("Flow \u00b0C", "v"))]
    lines += [separator.join(f"{mark}{cell(v, point, missing)}{mark}" for v in row) for row in rows]
    while len(lines) > 2 and not lines[-1].strip("\"' ,;\t"):
        lines, rows = lines[:-1], rows[:-1]  # rows of nothing at the end are no rows
    empty = not lines[-1].strip("\"' ,;\t")
    if empty:
        return
    found = read_text((end.join(lines) + end).encode(encoding))

    assert found.channels == ("Flow \u00b0C", "v")
    np.testing.assert_array_equal(found.series[0], np.round(np.array(rows), 6))


@ENOUGH
@given(
    st.sampled_from(["time", "Time", "t", "T", "timestamp", "Timestamp", "DATE", "time (s)", "Time [s]", "time_s", ""]),
    st.floats(0.001, 100),
    st.integers(2, 20),
    st.floats(-1000, 1000).map(lambda v: v + 0.5),
)
def test_a_time_column_is_known_by_any_of_its_names(name: str, step: float, rows: int, start: float) -> None:
    start = start if name else start + 0.25 * step + 0.1  # an index without name that is no count of rows
    text = "\n".join([f"{name},flow", *(f"{start + i * step!r},{i}" for i in range(rows))])
    found = read_text(text)

    assert found.channels == ("flow",)
    assert found.dt == pytest.approx(step, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "seconds"), [("time (ms)", 0.002), ("t [us]", 2e-6), ("Time_min", 120.0), ("timestamp (h)", 7200.0)]
)
def test_a_unit_in_the_name_of_the_time_counts(name: str, seconds: float) -> None:
    assert read_text(f"{name},u\n0,1\n2,1\n4,1\n").dt == pytest.approx(seconds)


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "index"])
@pytest.mark.parametrize("start", [0, 1])
def test_a_count_of_rows_is_neither_time_nor_channel(name: str, start: int) -> None:
    found = read_text("\n".join([f"{name},time,u", *(f"{start + i},{i / 4},{i * i}" for i in range(5))]))
    assert (found.channels, found.dt) == (("u",), 0.25)
    alone = read_text("\n".join([f"{name},u", *(f"{start + i},{i * i}" for i in range(5))]))
    assert (alone.channels, alone.dt, alone.time) == (("u",), 1.0, None)


ZONES = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", None])


@ENOUGH
@given(
    ZONES,
    st.datetimes(datetime.datetime(1980, 1, 1), datetime.datetime(2060, 1, 1)),
    st.integers(1, 10**7),
    st.integers(2, 30),
    st.sampled_from("T "),
)
def test_dates_with_a_zone_are_seconds_also_where_clocks_change(
    zone: str | None, start: datetime.datetime, step: int, rows: int, between: str
) -> None:
    """Python's own calendar writes them: across a change of clocks the offset changes, the steps do not."""
    times = [start + datetime.timedelta(milliseconds=step) * i for i in range(rows)]
    if zone is not None:
        times = [t.replace(tzinfo=datetime.UTC).astimezone(ZoneInfo(zone)) for t in times]
    found = read_text("\n".join(["timestamp,u", *(f"{t.isoformat(between)},{i}" for i, t in enumerate(times))]))

    assert found.dt == pytest.approx(step / 1000, rel=1e-9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5,1\n0.25,2\n", "e.csv, line 1: 0.5, 1 holds numbers where names of columns belong"),
        ("2024-01-01,1\n2024-01-02,2\n", "line 1: 2024-01-01, 1 holds numbers where names"),
        ("flow,1.5\n2,2\n", "line 1: flow, 1.5 holds numbers where names"),
        ("date,time,u\n2024-01-01,0,1\n", "line 1: 'date' and 'time' are both times; keep one"),
        ("u,,v\n1,2,3\n", "line 1: column 2 has no name"),
        ("time,u\n31.03.2024 14:00,1\n", r"line 2: '31.03.2024 14:00' is neither seconds nor a date such as 2024-03"),
        ("time,u\n2024-03-31,1\n2024-02-30,2\n", "line 3: '2024-02-30' is no date"),
        ("time,u\n2024-03-30T00:00,1\n2024-03-31T00:00Z,2\n", "line 3: '2024-03-31T00:00Z' has another zone setting"),
        ("t,u\n0,1\n1,2\n5,3\n6,3\n", "line 4: column 't' is taken for the time .* or rename the column"),
        ("timestamp,u\n1700000000000,1\n1700000000010,1\n", r"line 3: .* is no time in seconds; .*'timestamp \(ms\)'"),
        ("u;v\n1,5;2\n1.5;2\n", "line 3: a decimal point, but other cells of the file have decimal commas"),
        ("u,v\n1,5,2,5\n", "line 2: 4 cells, but 2 columns are named; decimal commas need ;"),
        ('u,v\n"1,5","2,x"\n', "line 2: '2,x' is not a number"),
        ("u,v\n1,2\n\n1,two\n", "line 4: 'two' is not a number"),
        ("u,v\n1,2\n1,1e999\n", "line 3: a number too large"),
        ('u,v\n1,2\n"1,2\n', "line 3: a quote is opened and not closed"),
        ("trajectory,u\n1,2\n,3\n", "line 3: trajectory is missing"),
        ("date,t_h,u\n2024-01-01,0,1\n", "line 1: 'date' and 't_h' are both times"),
        ("trajectory,Trajectory,u\n1,2,3\n", "two columns are called trajectory"),
        ("u,v\n,\n", "at least one row"),
        ("", "at least one row"),
    ],
)
def test_what_could_be_read_wrongly_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(SeriesFormatError, match=message):
        read_text(text)


def test_what_spreadsheets_add_is_no_data() -> None:
    found = read_text("sep=;\nu;v;\n1,5;2;\n3;;\n;;\n;;\n")

    assert found.channels == ("u", "v")
    np.testing.assert_array_equal(found.series[0], [[1.5, 2], [3, np.nan]])


def test_a_blank_line_in_a_table_of_one_column_is_a_missing_value() -> None:
    np.testing.assert_array_equal(read_text("u\n1\n\n3\n\n").series[0], [[1], [np.nan], [3]])
    np.testing.assert_array_equal(read_text("u,v\n1,2\n\n3,4\n").series[0], [[1, 2], [3, 4]])


def test_trajectories_may_be_interleaved_and_are_known_in_any_spelling() -> None:
    found = read_text("Trajectory,time,u\nb,0,1\na,0,10\nb,2,3\na,2,30\n")

    assert [series[:, 0].tolist() for series in found.series] == [[1, 3], [10, 30]]
    assert found.dt == 2


def test_numbers_of_trajectories_are_compared_as_numbers() -> None:
    found = read_text("trajectory,time,u\n1,0,1\n1.0,2,3\n01,4,5\n12345678901234567,0,1\n12345678901234568,0,2\n")

    assert [series[:, 0].tolist() for series in found.series] == [[1, 3, 5], [1], [2]]


def test_beside_a_time_t_min_is_a_channel() -> None:
    assert read_text("date,T_min,T_max\n2024-01-01,3,5\n2024-01-02,1,9\n").channels == ("T_min", "T_max")
    assert read_text("t_min,u\n0,1\n1,2\n").dt == 60


# --- folders of tables ------------------------------------------------------------------------------------------------


def folder_of(root: Path, **options: Any) -> CsvSeries:
    return CsvSeries(root=root, **{"seen": ["a"], "val_steps": 2, "test_steps": 3, **options})


def test_a_table_that_would_be_lost_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "a" / "one.csv", np.random.default_rng(0).normal(size=(1, 12, 1)), ["u"], 0.5)
    for clutter in (".DS_Store", ".hidden.csv", "README.md", "Thumbs.db"):
        (tmp_path / "a" / clutter).write_text("x")
    (tmp_path / "a" / ".ipynb_checkpoints").mkdir()
    assert folder_of(tmp_path).environments("a", ["a"]) == ["one"]

    for lost in ("two.xlsx", "two.txt", "two.csv.gz"):
        (tmp_path / "a" / lost).write_text("x")
        with pytest.raises(SeriesFormatError, match=f"domain 'a': .*{lost} is not read"):
            folder_of(tmp_path).environments("a", ["a"])
        (tmp_path / "a" / lost).unlink()
    (tmp_path / "a" / "two.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(SeriesFormatError, match=r"two.csv cannot be read \(No such file"):
        folder_of(tmp_path).environments("a", ["a"])
    (tmp_path / "a" / "two.csv").unlink()
    (tmp_path / "a" / "one.TSV").write_text("time\tu\n")
    with pytest.raises(SeriesFormatError, match="have one name"):
        folder_of(tmp_path).environments("a", ["a"])


def test_domains_of_other_channels_are_told_and_what_was_read_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = np.random.default_rng(0).normal(size=(2, 12, 2))
    write_csv(tmp_path / "a" / "one.csv", x, ["u", "v"], 0.5)
    write_csv(tmp_path / "b" / "one.csv", x, ["v", "u"], 0.5)
    source = folder_of(tmp_path)
    with caplog.at_level(logging.INFO, logger="moeapps"):
        source.recordings("a")

    assert "domain a: 1 files of 2 series, channels u, v, time column 'time', a step of 0.5 s" in caplog.text
    with pytest.raises(SeriesFormatError, match=r"domain 'b' has channels \('v', 'u'\), 'a' \('u', 'v'\)"):
        source.recordings("b")


@ENOUGH
@given(st.floats(-1e9, 1e9).filter(lambda v: abs(v) > 1e-6), st.integers(0, 3), st.floats(0.01, 10))
def test_a_constant_channel_is_divided_by_one(value: float, ulps: int, jump: float) -> None:
    x = np.full((1, 20, 2), value)
    for _ in range(ulps):
        x[0, ::2, 0] = np.nextafter(x[0, ::2, 0], np.inf)
    x[0, :, 1] = np.arange(20)
    x[0, -3:, 0] = value + jump
    with tempfile.TemporaryDirectory() as folder:
        write_csv(Path(folder) / "a" / "e.csv", x, ["idle", "flow"], 1.0)
        test = folder_of(Path(folder)).load("a", "test", ["a"]).x[0, 0]

    np.testing.assert_allclose(test[-3:, 0], jump, rtol=1e-5, atol=1e-15 * abs(value) * 10)
    np.testing.assert_allclose(np.std(test[:15, 1]), 1)


# --- damage -----------------------------------------------------------------------------------------------------------


def originals() -> dict[str, bytes]:
    x = np.random.default_rng(0).normal(size=(2, 6, 2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_csv(folder / "a.csv", x, ["u", "v"], 0.5)
        write_ts(folder / "a.ts", list(x), ["p", "q"])
        write_npz(folder / "a.npz", x[None], np.arange(6.0))
        (folder / "a.arff").write_text("@relation x\n@attribute a numeric\n@attribute c {p,q}\n@data\n1.5,p\n?,q\n")
        return {path.suffix: path.read_bytes() for path in folder.iterdir()}


ORIGINALS = originals()
READERS: dict[str, Any] = {".csv": read_csv, ".ts": read_ts, ".npz": read_npz, ".arff": read_arff}


@pytest.mark.parametrize("form", sorted(READERS))
@settings(max_examples=int(os.environ.get("MOEAPPS_FUZZ", "100")), deadline=5000)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 10000),
)
def test_a_damaged_series_file_is_read_or_told(form: str, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(ORIGINALS[form])
    for place, value in changes:
        data[place % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{form}"
        path.write_bytes(data[: max(cut % (2 * len(data)), 1)])
        told = path.name
        try:
            READERS[form](path)
        except SeriesFormatError as error:
            refused()
            told = str(error)
    assert path.name in told


@pytest.mark.parametrize("text", ["t,a\n", "t,a\n0,abc\n", "t,a\n0,1,2\n", 't,a\n0,"1\n'])
def test_an_error_tells_the_folder_whose_file_it_is(tmp_path: Path, text: str) -> None:
    """Every domain may have a file of that name."""
    path = tmp_path / "machine_b" / "e1.csv"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SeriesFormatError, match=r"^machine_b/e1\.csv"):
        read_csv(path)
