# SPDX-License-Identifier: Apache-2.0
"""Values of logs: whatever file, type, spelling or compression holds them, the same rows, ids and labels are read."""

from __future__ import annotations

import datetime
import gzip
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.data.readers import text
from tasks.recommendation.data.readers.blocks import write_blocks, write_table
from tasks.recommendation.data.readers.columns import BagColumn, DenseColumn, IdColumn, TableColumns, TaskColumn
from tasks.recommendation.data.readers.tables import TableDomain, TableFiles, TableSplit
from tasks.recommendation.data.readers.text import TextFormat, read_batches
from tasks.recommendation.data.readers.values import TableError, hash_values, to_numbers

SIZE = 2**31 - 1
COLUMNS = TableColumns(
    tasks=[TaskColumn("click", "watch", "click")],
    user="user",
    ids=[IdColumn("item", SIZE)],
    bags=[BagColumn("tags", SIZE, max_length=3)],
    dense=[DenseColumn("x")],
)
BARE = TableColumns(tasks=COLUMNS.tasks, user="user", ids=COLUMNS.ids)


def read(
    root: Path, files: list[str], columns: TableColumns = COLUMNS, where: Any = None, **options: Any
) -> list[Interactions]:
    """The rows of the files, block by block."""
    domain = TableDomain(test=TableSplit(files), where=where or {})
    source = TableFiles(root=root, columns=columns, domains={"d": domain}, **options)
    source.bind({"seen": [], "validation": [], "unseen": ["d"]})
    return [source.read("d", "test", block) for block in source.blocks("d", "test", root / "cache")]


def ids(root: Path, files: list[str], **options: Any) -> list[int]:
    return [int(x) for part in read(root, files, BARE, **options) for x in part.ids[:, 0]]


def one(values: pa.Array) -> list[int]:
    return hash_values(values)[0].tolist()  # type: ignore[no-any-return]


def equal(first: Interactions, second: Interactions) -> bool:
    names = ("dense", "ids", "label", "mask", "user", "row")
    return all(torch.equal(getattr(first, n), getattr(second, n)) for n in names) and all(
        torch.equal(a, b) for n in first.bags for a, b in zip(first.bags[n], second.bags[n], strict=True)
    )


# Properties -----------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(codec="utf-8", exclude_characters='\x00\r\n\t",', exclude_categories=["Cs"]), max_size=12)
INTS = st.integers(-(2**63), 2**63 - 1)
TAGS = st.lists(st.integers(0, 99), max_size=5)
ROW = st.tuples(
    st.one_of(st.integers(0, 9), INTS),
    st.one_of(st.none(), INTS),
    TAGS,
    st.sampled_from([0, 1, None]),
    st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False, width=32)),
)
NAMES = ("user", "item", "tags", "click", "x")
KINDS = {"user": pa.int64(), "item": pa.int64(), "tags": pa.list_(pa.int64()), "click": pa.int8(), "x": pa.float64()}


def save(path: Path, rows: list[Any], block: int = 4, item: pa.DataType | None = None) -> None:
    columns = dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=True))
    if path.suffix == ".parquet":
        kinds = KINDS | ({} if item is None else {"item": item})
        table = pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})
        parquet.write_table(table, path, row_group_size=block)
    else:
        write_table(path, columns)


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=12), st.booleans())
def test_any_table_gives_the_same_rows_in_every_format_and_as_text_ids(rows: list[Any], words: bool) -> None:
    if words:  # ids that are text in every file
        rows = [(user, None if item is None else f"w{item}", *rest) for user, item, *rest in rows]
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for name in ("t.parquet", "t.csv", "t.tsv"):
            save(Path(folder) / name, rows, item=pa.string() if words else None)
            found.append(Interactions.cat(read(Path(folder), [name], csv_rows=4)))
    assert found[0].row.tolist() == list(range(len(rows)))
    assert found[0].label[:, 0].tolist() == [row[3] or 0 for row in rows]
    assert found[0].mask[:, 0].tolist() == [row[3] is not None for row in rows]
    assert [i == 0 for i in found[0].ids[:, 0].tolist()] == [row[1] is None for row in rows]
    assert len(set(found[0].user.tolist())) == len({row[0] for row in rows})
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])


@settings(max_examples=30, deadline=None)
@given(st.lists(ROW, min_size=2, max_size=12), st.data(), st.integers(1, 13), st.integers(1, 13))
def test_files_laid_end_to_end_are_one_file_and_block_sizes_do_not_matter(
    rows: list[Any], data: Any, first: int, second: int
) -> None:
    cut = data.draw(st.integers(1, len(rows) - 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder / "all.csv", rows)
        save(folder / "a.csv", rows[:cut])
        save(folder / "b.parquet", rows[cut:], block=second)
        whole = read(folder, ["all.csv"], csv_rows=first)
        parts = read(folder, ["a.csv", "b.parquet"], csv_rows=second)
    assert equal(Interactions.cat(whole), Interactions.cat(parts))
    assert all(len(part) == first for part in whole[:-1])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(INTS.map(str), WORDS, INTS.map(lambda n: f"{n}.0"), st.integers().map(str)), min_size=1))
def test_text_is_one_value_exactly_where_it_spells_one_value(words: list[str]) -> None:
    """The oracle: Python's own integers and strings."""

    def value(word: str) -> Any:
        stem = word[:-2] if word.endswith(".0") else word
        plain = stem.isascii() and stem.removeprefix("-").isdigit() and (str(int(stem)) == stem or stem == "-0")
        if plain and -(2**63) < int(stem) < 2**63:
            return int(stem)
        return {"true": 1, "false": 0}.get(word.lower(), word) if word in ("True", "true", "TRUE") else word

    hashed, null = hash_values(pa.array(words))
    assert null.tolist() == [word == "" for word in words]
    seen: dict[Any, int] = {}
    for word, number in zip(words, hashed.tolist(), strict=True):
        assert seen.setdefault(value(word), number) == number
    assert len(set(seen.values())) == len(seen)
    integers = [value(word) for word in words if isinstance(value(word), int)]
    assert one(pa.array(integers, pa.int64())) == [seen[number] for number in integers]
    again = pa.chunked_array([pa.array(words).dictionary_encode()]).slice(len(words) // 2)
    assert one(again) == hashed.tolist()[len(words) // 2 :]


# Kinds of columns -----------------------------------------------------------------------------------------------------

BIG = 9_007_199_254_740_993_123


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array([7, 8]), pa.array(["7", "8.0"])),
        (pa.array([7, 8]), pa.array([7.0, 8.0])),
        (pa.array([7, 8], pa.uint8()), pa.array(["7", "8"]).dictionary_encode()),
        (pa.array([BIG, BIG + 1]), pa.array([str(BIG), f"{BIG + 1}.0"])),
        (pa.array([2**64 - 1, 2**63], pa.uint64()), pa.array([str(2**64 - 1), str(2**63)])),
        (pa.array([True, False]), pa.array(["True", "false"])),
        (pa.array([True, False]), pa.array([1, 0])),
        (pa.array([datetime.date(2022, 4, 8)]), pa.array(["2022-04-08"])),
        (pa.array([datetime.datetime(2022, 4, 8, 10)]), pa.array(["2022-04-08 10:00:00"])),
        (pa.array(["a", "b"], pa.large_string()), pa.array(["a", "b"]).dictionary_encode()),
        (pa.array([-5, 0]), pa.array(["-5.00", "-0.0"])),
    ],
)
def test_one_value_is_one_id_whatever_its_type(first: pa.Array, second: pa.Array) -> None:
    assert one(first) == one(second)
    assert len(set(one(first))) == len(first)


def test_values_without_meaning_as_ids_are_refused_or_missing() -> None:
    assert hash_values(pa.array([None, ""]))[1].all()
    assert hash_values(pa.nulls(2))[1].all()
    assert hash_values(pa.array([float("nan"), None]))[1].all()
    assert hash_values(pa.array(["a", None]).dictionary_encode())[1].tolist() == [False, True]
    with pytest.raises(TableError, match="lost digits"):
        hash_values(pa.array([float(BIG)]))
    with pytest.raises(TableError, match="fraction are no ids"):
        hash_values(pa.array([1.5]))
    with pytest.raises(TableError, match=r"give lists under columns.bags"):
        hash_values(pa.array([[1]]))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (pa.array([True, None]), [1.0, np.nan]),
        (pa.array(["true", "FALSE", ""]), [1.0, 0.0, np.nan]),
        (pa.array([" 1.5", "1e3", None]), [1.5, 1000.0, np.nan]),
        (pa.array([datetime.datetime(1970, 1, 2)]), [86400.0]),
        (pa.array([datetime.date(1970, 1, 2)]), [86400.0]),
        (pa.array(["1970-01-02", "1970-01-01 00:00:01"]), [86400.0, 1.0]),
        (pa.array(["1970-01-01T01:00:00+01:00"]), [0.0]),
        (pa.array(["3", "4"]).dictionary_encode(), [3.0, 4.0]),
        (pa.nulls(1), [np.nan]),
    ],
)
def test_numbers_truth_values_and_times_are_numbers(values: pa.Array, wanted: list[float]) -> None:
    np.testing.assert_array_equal(to_numbers(values, "x"), wanted)


def test_times_are_in_their_unit_and_other_things_are_no_numbers() -> None:
    assert to_numbers(pa.array([datetime.datetime(2022, 4, 8)]), "x", 0.001).tolist() == [1_649_376_000_000.0]
    for wrong in (pa.array(["1", "yes"]), pa.array([[1]]), pa.array(["1", "1970-01-02"])):
        with pytest.raises(TableError, match=r"x: .*must hold numbers"):
            to_numbers(wrong, "x")


def test_the_days_of_a_log_may_be_iso_text_or_timestamps(tmp_path: Path) -> None:
    days = [datetime.datetime(2022, 4, day) for day in (8, 9, 10)]
    columns = {"user": [1, 2, 3], "item": [1, 2, 3], "click": [0, 1, 0]}
    write_table(tmp_path / "a.csv", {**columns, "at": [str(day) for day in days]})
    write_table(tmp_path / "a.parquet", {**columns, "at": days})
    cut = days[1].replace(tzinfo=datetime.UTC).timestamp()
    for name in ("a.csv", "a.parquet"):
        domain = TableDomain(test=TableSplit([name], since=cut))
        source = TableFiles(root=tmp_path, columns=replace(BARE, time="at"), domains={"d": domain})
        source.bind({"seen": [], "validation": [], "unseen": ["d"]})
        (block,) = source.blocks("d", "test", tmp_path)
        assert source.read("d", "test", block).row.tolist() == [1, 2]
        assert block.times == (cut, cut + 86400)


@pytest.mark.parametrize("allowed", [[1], ["1"], ["1.0"]])
def test_where_compares_values(tmp_path: Path, allowed: list[Any]) -> None:
    plain = {"user": [1, 2], "item": [7, 8], "click": [0, 1]}
    kinds = [
        pa.array([1, 2]),
        pa.array([1.0, None]),
        pa.array([1.0, 0.5]),
        pa.array(["1", "x"]),
        pa.array([True, False]),
    ]
    for k, tab in enumerate([*kinds, pa.array(["1", "2"]).dictionary_encode()]):
        parquet.write_table(pa.table({**plain, "tab": tab}), tmp_path / f"{k}.parquet")
    (tmp_path / "9.csv").write_text("user,item,click,tab\n1,7,0,1\n2,8,1,\n3,9,0,1.0\n")

    found = read(tmp_path, ["*.parquet", "9.csv"], BARE, {"tab": allowed})
    assert [row for part in found for row in part.row.tolist()] == [0, 2, 4, 6, 8, 10, 12, 14]


# Kinds of files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".lz4"])
def test_compressed_text_is_text(tmp_path: Path, ending: str) -> None:
    words = "user,item,click\n" + "".join(f"{k},{k % 7},{k % 2}\n" for k in range(50))
    (tmp_path / "a.csv").write_text(words)
    with pa.output_stream(str(tmp_path / f"b.csv{ending}"), compression="detect") as file:
        file.write(words.encode())
    assert ids(tmp_path, ["a.csv"], csv_rows=8) == ids(tmp_path, [f"b.csv{ending}"], csv_rows=8)
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(words.encode())[:-20])
    with pytest.raises(TableError, match=r"cut.csv.gz"):
        ids(tmp_path, ["cut.csv.gz"])


def test_encodings_and_byte_order_marks(tmp_path: Path) -> None:
    words = "user,item,click\n1,caf\u00e9,0\n2,tea,1\n"
    for name, encoding in (("a", "utf-8"), ("b", "utf-8-sig"), ("c", "latin-1"), ("d", "utf-16")):
        (tmp_path / f"{name}.csv").write_bytes(words.encode(encoding))
    wanted = ids(tmp_path, ["a.csv"])
    assert ids(tmp_path, ["b.csv"]) == wanted
    assert ids(tmp_path, ["c.csv"], text=TextFormat(encoding="latin-1")) == wanted
    assert ids(tmp_path, ["d.csv"], text=TextFormat(encoding="utf-16")) == wanted
    with pytest.raises(TableError, match=r"c.csv: .*set text.encoding, for example to latin-1"):
        ids(tmp_path, ["c.csv"])


def test_a_quote_is_a_letter_in_tsv_and_encloses_in_csv_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('user\titem\tclick\n1\t"5 inch\t0\n2\t5"\t1\n3\t7" single\t0\n')
    (tmp_path / "b.csv").write_text('user,item,click\n1,"""5 inch",0\n2,"5""",1\n3,"7"" single",0\n')
    (tmp_path / "c.tsv").write_text('user\titem\tclick\n1\t"""5 inch"\t0\n2\t5"\t1\n3\t7" single\t0\n')
    wanted = ids(tmp_path, ["b.csv"])
    assert ids(tmp_path, ["a.tsv"], csv_rows=1) == wanted
    assert ids(tmp_path, ["c.tsv"], text=TextFormat(quotes=True)) == wanted
    (tmp_path / "d.csv").write_text('user,item,click\n1,"5 inch,0\n' + "2,x,1\n" * 400_000)
    with pytest.raises(TableError, match=r"is a quote left open\? Then set text.quotes: false"):
        ids(tmp_path, ["d.csv"])
    assert len(ids(tmp_path, ["d.csv"], text=TextFormat(quotes=False))) == 400_001


def test_a_file_that_changes_its_types_midway_is_read_by_value(tmp_path: Path) -> None:
    rows = ["1,7,0"] * 150_000 + ["2,x7,true", "3,7.0,false", "4,,"]
    (tmp_path / "a.csv").write_text("user,item,click\n" + "\n".join(rows) + "\n")
    found = Interactions.cat(read(tmp_path, ["a.csv"], BARE))
    seven, word, again, none = found.ids[-4:, 0].tolist()
    assert (seven, none) == (again, 0)
    assert word not in (seven, 0)
    assert found.label[-3:, 0].tolist() == [1, 0, 0]
    assert found.mask[-3:, 0].tolist() == [True, True, False]


def test_words_for_missing_and_lists_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('user,item,click,tags,x\n1,NA,0,"[1, 2, 3, 4]",NA\n2,5,NA,"7",1\n3,6,1,,2\n')
    (part,) = read(tmp_path, ["a.csv"], text=TextFormat(missing=["", "NA"]))
    assert part.ids[0, 0] == 0
    assert part.mask[:, 0].tolist() == [True, False, True]
    assert part.bags["tags"][1].sum(1).tolist() == [3, 1, 0]
    assert part.dense[:, 0].tolist() == [0, 1, 2]


def test_two_columns_of_one_name_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item,click,item\n1,2,0,3\n")
    with pytest.raises(TableError, match="two columns of one name: user, item, click, item; rename one"):
        ids(tmp_path, ["a.csv"])


def test_a_source_may_build_its_files(tmp_path: Path) -> None:
    class Joined(TableFiles):
        def files(self, domain: str, split: Any, cache: Path | None) -> list[Path]:
            table = pa.table({"user": [1, 2, 3], "item": [4, 5, 6], "click": [0, 1, 0]})
            write_blocks(tmp_path / "joined.parquet", table.to_batches(), rows=2)
            return [tmp_path / "joined.parquet"]

    source = Joined(root=tmp_path, columns=BARE, domains={"d": TableDomain(test=TableSplit([]))})
    source.bind({"seen": [], "validation": [], "unseen": ["d"]})
    assert [block.rows for block in source.blocks("d", "test", tmp_path)] == [2, 1]


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
def test_memory_is_bounded_by_the_block_not_by_the_file(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", 1 << 14)  # pyarrow reads 32 of these ahead
    peaks, usual = [], pa.default_memory_pool()
    for rows in (200_000, 600_000):
        path, numbers = tmp_path / f"{rows}.{ending}", np.random.default_rng(0).integers(0, 10**9, (rows, 3))
        table = pa.table({"user": numbers[:, 0], "item": numbers[:, 1], "click": numbers[:, 2] % 2})
        if ending == "parquet":
            parquet.write_table(table, path, row_group_size=20_000)
        else:
            with pa.output_stream(str(path), compression="detect") as file:
                arrow_csv.write_csv(table, file)
        del table, numbers
        pool = pa.proxy_memory_pool(usual)
        pa.set_memory_pool(pool)
        tracemalloc.start()
        domain = TableDomain(test=TableSplit([path.name]))
        source = TableFiles(root=tmp_path, columns=BARE, domains={"d": domain}, csv_rows=20_000, window=2)
        source.bind({"seen": [], "validation": [], "unseen": ["d"]})
        seen = sum(len(source.read("d", "test", block)) for block in source.blocks("d", "test", tmp_path))
        peaks.append(pool.max_memory() + tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        pa.set_memory_pool(usual)
        assert seen == rows
    # The file grows by 8 MB (23 bytes a row); the blocks' index by a kilobyte each.
    assert peaks[1] - peaks[0] < 500_000, peaks


def test_batches_of_text_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("a\tb\n" + "".join(f"{k}\tx\n" for k in range(300_000)))
    batches = list(read_batches(tmp_path / "a.tsv", {"a": pa.int64()}))
    assert len(batches) > 1
    assert np.array_equal(np.concatenate([batch.column(0).to_numpy() for batch in batches]), np.arange(300_000))
