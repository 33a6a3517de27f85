# SPDX-License-Identifier: Apache-2.0
"""What the readers of public logs share: files as text, look-ups, splits, and tables kept as Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.recommendation.data.readers.ali_ccp import AliCCP
from tasks.recommendation.data.readers.aliexpress import AliExpress
from tasks.recommendation.data.readers.arrow_text import Lookup, read_csv, read_json, read_lines, share_of
from tasks.recommendation.data.readers.census import CensusIncome
from tasks.recommendation.data.readers.kuairand import KuaiRand
from tasks.recommendation.data.readers.kuairec import KuaiRec
from tasks.recommendation.data.readers.public import by_time, write_parts
from tasks.recommendation.data.readers.values import TableError
from tests.tasks.recommendation import public_layouts as layouts
from tests.tasks.recommendation.test_public_logs import split_rows


def test_a_conversion_is_made_once_and_again_when_a_file_or_a_setting_changes(tmp_path: Path) -> None:
    layouts.write_kuairec(tmp_path)
    folder = KuaiRec(root=tmp_path).convert(tmp_path / "cache")
    stamp = (folder / "rows.json").stat().st_mtime_ns

    assert KuaiRec(root=tmp_path).convert(tmp_path / "cache") == folder
    assert (folder / "rows.json").stat().st_mtime_ns == stamp
    assert KuaiRec(root=tmp_path, test_from="2020-08-24").convert(tmp_path / "cache") != folder
    layouts.write_kuairec(tmp_path, seed=1)
    assert KuaiRec(root=tmp_path).convert(tmp_path / "cache") != folder


def test_a_conversion_that_broke_off_is_made_anew(tmp_path: Path) -> None:
    layouts.write_kuairec(tmp_path)
    good = split_rows(KuaiRec(root=tmp_path), tmp_path / "cache")
    folder = KuaiRec(root=tmp_path).convert(tmp_path / "cache")
    (folder / "rows.json").unlink()
    (folder / "train" / "short.parquet").write_bytes(b"half a file")
    (folder / "train" / "old.parquet").write_bytes(b"")

    assert split_rows(KuaiRec(root=tmp_path), tmp_path / "cache") == good


def test_a_domain_without_rows_is_told_with_those_that_have_some(tmp_path: Path) -> None:
    layouts.write_kuairand(tmp_path)
    source = KuaiRand(root=tmp_path)
    source.bind({"seen": ["tab_0"], "validation": [], "unseen": ["tab_14"]})

    with pytest.raises(TableError, match=r"domain 'tab_14' has no test rows; domains with some: tab_0, tab_1"):
        source.prepare(tmp_path / "cache")
    with pytest.raises(ValueError, match="has no domain 'tab_15'"):
        source.bind({"seen": ["tab_15"], "validation": [], "unseen": []})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda r: KuaiRand(root=r, version="2k"), "version='2k' is unknown; allowed: pure, 1k, 27k"),
        (lambda r: KuaiRand(root=r, tasks=("love",)), "unknown task 'love'; allowed: click, long_view"),
        (lambda r: KuaiRand(root=r, test_from="2022-04-08"), "the validation must begin before the test"),
        (lambda r: KuaiRec(root=r, val_from="2020-09-01"), "the validation must begin before the test"),
        (lambda r: AliExpress(root=r, countries=("de",)), "allowed are nl, es, fr, us, ru"),
        (lambda r: AliExpress(root=r, val_share=1.0), "val_share=1.0 must be between 0 and 1"),
        (lambda r: AliCCP(root=r, val_share=0.0), "val_share=0.0 must be between 0 and 1"),
        (lambda r: CensusIncome(root=r, tasks=("age",)), "allowed are income, never_married, college"),
    ],
)
def test_wrong_options_are_refused_at_once(tmp_path: Path, make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(tmp_path)


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 100])
def test_parts_are_written_whole_in_their_order_in_groups_of_the_size_asked_for(tmp_path: Path, rows: int) -> None:
    number = np.arange(23)
    splits = [(["train", "val", "test", None])[k % 4] for k in number]
    whole = pa.table({"n": number, "split": pa.array(splits), "domain": ["a" if k % 3 else "b" for k in number]})
    counts = write_parts((whole.slice(k, 5) for k in range(0, 23, 5)), tmp_path, rows=rows)

    assert counts.pop("left_out") == 5
    for name, count in counts.items():
        split, domain = name.split("/")
        wanted = [k for k in number if splits[k] == split and ("a" if k % 3 else "b") == domain]
        table = pyarrow.parquet.read_table(tmp_path / f"{name}.parquet")
        assert table["n"].to_pylist() == wanted
        assert count == len(wanted)
        meta = pyarrow.parquet.read_metadata(tmp_path / f"{name}.parquet")
        assert max(meta.row_group(k).num_rows for k in range(meta.num_row_groups)) <= rows


@given(st.lists(st.one_of(st.none(), st.integers(-5, 25)), min_size=1), st.integers(0, 9), st.integers(10, 20))
def test_times_are_split_as_their_order_says(times: list[int | None], val: int, test: int) -> None:
    got = by_time(pa.chunked_array([pa.array(times, pa.int64())]), val, test).to_pylist()

    def wanted(time: int | None) -> str | None:
        return None if time is None else "train" if time < val else "val" if time < test else "test"

    assert got == [wanted(time) for time in times]


@given(st.lists(st.tuples(st.one_of(st.integers(-9, 9), st.none()), st.integers())), st.lists(st.integers(-12, 12)))
def test_a_lookup_finds_what_a_dictionary_finds(rows: list[tuple[int | None, int]], wanted: list[int]) -> None:
    rows = [(key, value % 1000) for key, value in rows if key is not None]
    if not rows:
        return
    known: dict[int, int] = {}
    for key, value in rows:
        known.setdefault(key, value)
    for kind in (pa.int64(), pa.string()):
        keys, values = zip(*rows, strict=True)
        table = pa.table({"k": pa.array(keys, pa.int64()).cast(kind), "v": pa.array(values, pa.int64())})
        asked = pa.table({"k": pa.array(wanted, pa.int64()).cast(kind)})
        lookup = Lookup(iter([table]), "k", "test")
        assert lookup.add(asked, "k")["v"].to_pylist() == [known.get(key) for key in wanted]
        inner = lookup.add(asked, "k", inner=True)
        assert inner["v"].to_pylist() == [known[key] for key in wanted if key in known]
        less = lookup.without(pa.array([0, 1], pa.int64()).cast(kind)).add(asked, "k")
        assert less["v"].to_pylist() == [None if key in (0, 1) else known.get(key) for key in wanted]


def test_shares_of_keys_are_even_seeded_and_the_same_in_pieces() -> None:
    words = pa.array([f"key {k}" for k in range(20_000)])
    share = share_of(pa.chunked_array([words]))

    assert np.array_equal(share, share_of(pa.chunked_array([words[:7], words[7:]])))
    assert np.array_equal(share[5:9], share_of(pa.chunked_array([words[5:9]])))
    assert len(np.unique(share)) == len(share)
    counts = np.histogram(share, 20, (0, 1))[0]
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000 * 0.95)
    assert abs(np.corrcoef(share, share_of(pa.chunked_array([words]), seed=1))[0, 1]) < 0.05


def test_text_is_read_in_parts_with_exact_ids_packed_or_not(tmp_path: Path) -> None:
    rows = [{"id": 2**62 + k, "x": None if k % 3 else k / 4, "note": "a, b"} for k in range(200)]
    layouts.write_rows(tmp_path / "t.csv", rows)
    layouts.write_lines(tmp_path / "t.csv.gz", (tmp_path / "t.csv").read_text().splitlines())
    for name in ("t.csv", "t.csv.gz"):
        parts = list(read_csv(tmp_path / name, {"x": pa.float64(), "id": pa.int64()}, block=1000))
        assert len(parts) > 3
        whole = pa.concat_tables(parts)
        assert whole["id"].to_pylist() == [row["id"] for row in rows]
        assert whole["x"].to_pylist() == [row["x"] for row in rows]


def test_lines_and_json_that_are_not_what_they_should_be_are_shown(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_text("1::2\n3:4\n")
    (tmp_path / "a.json").write_text('{"a": 1}\n{"b": 2}\n')
    (tmp_path / "b.json").write_text('{"a": 1}\n{"a": "one"}\n')

    (tmp_path / "empty.dat").write_text("")
    (tmp_path / "latin.dat").write_bytes("caf\u00e9::2\n".encode("latin-1"))
    for name, text in (("empty", "Empty CSV file"), ("latin", "UTF8")):
        with pytest.raises(TableError, match=f"{name}.dat: .*{text}.*; expected are lines A::B in utf-8"):
            list(read_lines(tmp_path / f"{name}.dat", "^(?P<a>.*)::(?P<b>[0-9]+)$", expected="A::B"))
    with pytest.raises(TableError, match="the line '3:4' is not A::B"):
        list(read_lines(tmp_path / "a.dat", "^(?P<a>[0-9]+)::(?P<b>[0-9]+)$", expected="A::B"))
    with pytest.raises(
        TableError, match=r"1 lines have no 'a'; the first line reads '.\"a\": 1.', expected are: a \(int"
    ):
        list(read_json(tmp_path / "a.json", {"a": pa.int64()}, required=["a"]))
    with pytest.raises(TableError, match=r"expected are JSON lines with a \(int64\)"):
        list(read_json(tmp_path / "b.json", {"a": pa.int64()}))
