# SPDX-License-Identifier: Apache-2.0
"""Tables and series made to fill memory or to keep a reader busy: read within bounds, or told in one sentence."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tasks.adaptation.data.readers.table import read_csv as read_image_table
from tasks.audio.data.readers.clip_table import read_clip_table
from tasks.dynamics.data.readers.arff_format import read_arff
from tasks.dynamics.data.readers.csv_format import read_csv
from tasks.dynamics.data.readers.ts_format import read_ts
from tasks.point_cloud.data.readers.nuscenes import _index_rows as read_sweeps
from tasks.recommendation.data.readers.blocks import open_blocks
from tasks.recommendation.data.readers.ratings import read_ratings
from tasks.recommendation.data.readers.text import ends_in_quotes
from tests.bounds_common import HUGE, Read, told
from tests.guarded import guarded


def test_a_row_group_of_millions_of_equal_rows_is_told(tmp_path: Path) -> None:
    rows = np.zeros(1 << 23, np.int8)
    parquet.write_table(pa.table({"a": rows}), tmp_path / "a.parquet", row_group_size=len(rows))
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    told(open_blocks, tmp_path / "a.parquet", "a row group of 8,388,608 rows, which would fill memory")


TABLES: dict[str, tuple[Read, str]] = {
    "image table": (lambda path: read_image_table(path, {"file", "domain"}), "file,domain\n"),
    "clip table": (read_clip_table, "file,domain,kind,text\n"),
    "series": (read_csv, "time,a\n"),
    "log": (lambda path: open_blocks(path, cache=path.parent), "user,item\n"),
}


@pytest.mark.parametrize("name", TABLES)
def test_one_open_quote_is_told(tmp_path: Path, name: str) -> None:
    read, head = TABLES[name]
    (tmp_path / "a.csv").write_text(head + '1,"2\n' + "3,4\n" * 50_000)
    told(read, tmp_path / "a.csv", "a.csv")
    (tmp_path / "a.csv").write_text('"' + head + "3,4\n" * 50_000)
    told(read, tmp_path / "a.csv", "a.csv")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (b'a,b\n1,"2\n3,4\n', True),
        (b'"a,b\n1,2\n', True),
        (b'a,b\n1,"x""\n', True),
        (b'a,b\n1,"x""y"\n', False),
        (b'a,b\n5" pipe,1\n', False),
        (b'a,b\n"1\n2",""\n', False),
        (b'a,b\r\n"1","2\r\n"\r\n', False),
        (b"", False),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
def test_an_open_quote_is_told_from_a_letter(
    monkeypatch: pytest.MonkeyPatch, text: bytes, inside: bool, chunk: int
) -> None:
    monkeypatch.setattr("tasks.recommendation.data.readers.text.CHUNK_BYTES", chunk)
    assert ends_in_quotes(io.BytesIO(text), b",") is inside


@pytest.mark.parametrize("name", TABLES)
def test_a_cell_of_megabytes_is_told_or_read(tmp_path: Path, name: str) -> None:
    read, head = TABLES[name]
    path = tmp_path / "a.csv"
    path.write_text(head + "x" * 2_000_000 + ",1\n")
    found = guarded(partial(read, path))
    assert found.kind == "value" or (found.kind.endswith("Error") and found.text.count("x") < 5000), found
    assert found.within(path.stat().st_size)


def test_a_compressed_header_without_an_end_is_told(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"a" * 10_000_000, 1) * 50)
    told(lambda path: open_blocks(path, cache=path.parent), path, "a.csv.gz")


def test_numbers_of_users_are_no_sizes(tmp_path: Path) -> None:
    (tmp_path / "ml-100k.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t1\t3\t5\n")
    (tmp_path / "ml-100k.item").write_text("item_id:token\trelease_year:token\tclass:token_seq\n1\t1995\tComedy\n")
    (tmp_path / "ml-100k.user").write_text(
        f"user_id:token\tage:token\tgender:token\toccupation:token\n{HUGE}\t5\tM\tnone\n"
    )
    told(read_ratings, tmp_path, "user_id goes from")
    (tmp_path / "ml-100k.item").write_text("item_id:token\trelease_year:token\tclass:token_seq\n1\t" + "9" * 200_000)
    told(read_ratings, tmp_path, "is not a readable table")


def test_a_late_mistake_in_a_long_arff_file_is_found_quickly(tmp_path: Path) -> None:
    path = tmp_path / "a.arff"
    path.write_text("@relation x\n@attribute a numeric\n@attribute c {p,q}\n@data\n" + "1.5,p\n" * 40_000 + "x,p\n")
    told(read_arff, path, "a.arff, line 40005 cannot be read")


def test_reading_arff_leaves_the_bound_on_cells_of_tables_as_it_is(tmp_path: Path) -> None:
    path, before = tmp_path / "a.arff", csv.field_size_limit(131_072)
    try:
        path.write_text("@relation x\n@attribute a numeric\n@attribute c {p,q}\n@data\n1.5,p\n2.5,q\n")
        read_arff(path)
        assert csv.field_size_limit() == 131_072
    finally:
        csv.field_size_limit(before)


# Tables of very short lines: what Python keeps of a line of two bytes is fifty times as much --------------------------

TS_HEAD, ARFF_HEAD = "@classLabel true a b\n@data\n", "@relation x\n@attribute a numeric\n@attribute c {p,q}\n@data\n"
CLIPS_HEAD = "file,domain,kind\n"
WIDE_HEAD = ",".join(f"c{place}" for place in range(1000)) + "\n"
SHORT_LINES: dict[str, tuple[Read, Callable[[int], str]]] = {
    "a.csv": (read_csv, lambda rows: "x\n" + "1\n" * rows),
    "cells.csv": (read_csv, lambda cells: WIDE_HEAD + (",".join(["1"] * 1000) + "\n") * (cells // 1000)),
    "pairs.csv": (read_csv, lambda rows: "trajectory,x\n" + "".join(f"{row // 2},1\n" for row in range(rows))),
    "clips.csv": (
        read_clip_table,
        lambda rows: "file,domain,kind\n" + "".join(f"{k:x},x,speech\n" for k in range(rows)),
    ),
    "images.csv": (partial(read_image_table, columns={"a", "b"}), lambda rows: "a,b\n" + "1,2\n" * rows),
    "sweeps.csv": (read_sweeps, lambda rows: "points,labels,split\n" + "a,,val\n" * rows),
    "a.ts": (read_ts, lambda rows: TS_HEAD + "1:a\n" * rows),
    "one.ts": (read_ts, lambda rows: TS_HEAD + "1," * rows + "1:a\n"),
    "a.arff": (read_arff, lambda rows: ARFF_HEAD + "1,p\n" * rows),
}


@pytest.mark.parametrize("name", [name for name in SHORT_LINES if name != "cells.csv"])  # read: 34 bytes a cell
def test_millions_of_short_lines_are_told_before_memory_is_taken(tmp_path: Path, name: str) -> None:
    read, text = SHORT_LINES[name]
    (tmp_path / name).write_text(text(6_000_000))
    told(read, tmp_path / name, "would fill memory")


@pytest.mark.parametrize("name", SHORT_LINES)
def test_short_lines_are_read_within_bounds(tmp_path: Path, name: str) -> None:
    read, text = SHORT_LINES[name]
    path = tmp_path / name
    path.write_text(text(200_000))
    found = guarded(partial(read, path))
    assert found.kind == "value", found
    assert found.within(path.stat().st_size), found
