# SPDX-License-Identifier: Apache-2.0
"""Tables of one's own: what is written is read, in both formats, a few blocks at a time; what is wrong is named."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from tasks.recommendation.data.readers.blocks import open_blocks, write_table
from tasks.recommendation.data.readers.columns import BagColumn, DenseColumn, IdColumn, TableColumns, TaskColumn
from tasks.recommendation.data.readers.hashing import hash_integers, to_ids
from tasks.recommendation.data.readers.tables import TableDomain, TableFiles, TableSplit
from tasks.recommendation.data.readers.values import TableError, hash_values
from tasks.recommendation.datamodule import RecommendationData

ROWS, BLOCK = 400, 32
COLUMNS = TableColumns(
    tasks=[
        TaskColumn("click", "watch", "clicked"),
        TaskColumn("long", "watch", "seconds", above=30.0),
        TaskColumn("like", "act", "liked", mask_column="asked"),
    ],
    user="who",
    ids=[IdColumn("video", 1000), IdColumn("tab", 4, hashed=False, offset=1)],
    bags=[BagColumn("tags", 50, max_length=3)],
    dense=[DenseColumn("seconds", log=True, mean=3.0, std=2.0), DenseColumn("age", fill=-1.0)],
    time="ts",
)
ROLES: dict[str, Any] = {"seen": ["a"], "validation": [], "unseen": ["b"]}


def log(rows: int = ROWS, start: int = 1_000_000, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "who": [f"user{k}" for k in rng.integers(0, 9, rows)],
        "video": rng.integers(0, 10**12, rows).tolist(),
        "tab": rng.integers(0, 3, rows).tolist(),
        "tags": [rng.integers(0, 99, rng.integers(0, 6)).tolist() for _ in range(rows)],
        "clicked": [None if x < 0.1 else int(x > 0.5) for x in rng.random(rows)],
        "seconds": (rng.random(rows) * 60).round(3).tolist(),
        "liked": rng.integers(0, 2, rows).tolist(),
        "asked": rng.integers(0, 2, rows).tolist(),
        "age": [None if x < 0.2 else float(round(x * 80)) for x in rng.random(rows)],
        "ts": (start + np.sort(rng.integers(0, 9999, rows))).tolist(),
    }


SEEN = sum(tab < 2 for tab in log()["tab"])  # training rows of domain a


def domains(ending: str) -> dict[str, TableDomain]:
    train, test = TableSplit([f"train.{ending}"]), TableSplit([f"test.{ending}"])
    both = TableDomain(train=train, val=test, test=test)
    return {"a": replace(both, where={"tab": [0, 1]}), "b": replace(both, where={"tab": [2]}), "all": both}


def write(folder: Path, ending: str, **changes: Any) -> None:
    write_table(folder / f"train.{ending}", {**log(), **changes}, rows_per_block=BLOCK)
    write_table(folder / f"test.{ending}", log(120, start=2_000_000, seed=1), rows_per_block=BLOCK)


def source(folder: Path, ending: str = "csv", **options: Any) -> TableFiles:
    settings: dict[str, Any] = {"columns": COLUMNS, "domains": domains(ending), "window": 3, "csv_rows": BLOCK}
    return TableFiles(root=folder, **{**settings, **options})


def module(
    folder: Path, ending: str = "csv", roles: dict[str, Any] | None = None, **options: Any
) -> RecommendationData:
    return RecommendationData(
        source=source(folder, ending, **options), batch_size=16, cache_dir=folder / "cache", **(roles or ROLES)
    )


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_what_is_written_is_read(tmp_path: Path, ending: str) -> None:
    write(tmp_path, ending)
    data = module(tmp_path, ending, {**ROLES, "seen": ["all"], "unseen": []})
    dataset = data.get_dataset("all", "train")
    rows = dataset.__getitems__(range(ROWS))  # type: ignore[attr-defined]
    wrote = log()

    data.source.schema.check(rows, "all")
    assert rows.row.tolist() == list(range(ROWS))
    known = [x is not None for x in wrote["clicked"]]
    assert rows.mask[:, 0].tolist() == known
    assert rows.label[:, 0].tolist() == [x or 0 for x in wrote["clicked"]]
    assert rows.label[:, 1].tolist() == [float(x > 30) for x in wrote["seconds"]]
    assert rows.mask[:, 2].tolist() == [bool(x) for x in wrote["asked"]]
    assert not rows.label[:, 2][~rows.mask[:, 2]].any()
    assert rows.ids[:, 1].tolist() == [1 + tab for tab in wrote["tab"]]
    scaled = (np.log1p(wrote["seconds"]) - 3) / 2
    np.testing.assert_allclose(rows.dense[:, 0], scaled, atol=1e-6)
    assert rows.dense[:, 1].tolist() == [-1.0 if x is None else x for x in wrote["age"]]
    ids, weight = rows.bags["tags"]
    assert weight.sum(1).tolist() == [min(3, len(tags)) for tags in wrote["tags"]]
    assert ((ids > 0).float() == weight).all()
    same_user = rows.user[:, None] == rows.user
    same_name = np.equal.outer(wrote["who"], wrote["who"])
    assert np.array_equal(same_user.numpy(), same_name)


def test_csv_and_parquet_give_the_same_tensors(tmp_path: Path) -> None:
    found = []
    for ending in ("csv", "parquet"):
        write(tmp_path, ending)
        found.append(module(tmp_path, ending).get_dataset("a", "train").__getitems__([5, 0, 199]))  # type: ignore[attr-defined]

    for name in ("dense", "ids", "label", "mask", "user", "row"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name
    assert torch.equal(found[0].bags["tags"][0], found[1].bags["tags"][0])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_an_epoch_holds_few_rows_at_a_time_and_reads_each_block_about_once(tmp_path: Path, ending: str) -> None:
    write(tmp_path, ending)
    data = module(tmp_path, ending, {**ROLES, "seen": ["all"], "unseen": []})
    seen = torch.cat([batch.row for batch in data.train_dataloader()])
    held = data.get_dataset("all", "train").held  # type: ignore[attr-defined]

    assert len(seen) == ROWS // 16 * 16
    assert len(seen.unique()) == len(seen)
    assert 0 < held.peak_rows <= 3 * BLOCK < ROWS
    assert held.reads <= 2 * -(-ROWS // BLOCK)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_loader_processes_see_what_one_process_sees(tmp_path: Path, ending: str) -> None:
    write(tmp_path, ending)
    alone = module(tmp_path, ending)
    helped = module(tmp_path, ending)
    helped.num_workers = 2

    rows = [torch.cat([batch.row for batch in data.train_dataloader()]) for data in (alone, helped)]
    both = alone.get_dataset("a", "train")
    assert set(rows[1].tolist()) <= set(both.__getitems__(range(len(both))).row.tolist())  # type: ignore
    assert len(rows[1].unique()) == len(rows[1])
    assert len(rows[1]) >= len(rows[0]) - 2 * 16
    again = pickle.loads(pickle.dumps(both))
    assert torch.equal(again.__getitems__([3]).row, both.__getitems__([3]).row)  # type: ignore[attr-defined]


def test_domains_are_the_rows_their_columns_say(tmp_path: Path) -> None:
    write(tmp_path, "csv")
    data, tabs = module(tmp_path), np.array(log()["tab"])
    train = data.get_dataset("a", "train")

    assert train.__getitems__(range(len(train))).row.tolist() == np.flatnonzero(tabs < 2).tolist()  # type: ignore
    test = torch.cat([batch.row for batch in data.test_dataloader()[1]])
    assert test.tolist() == np.flatnonzero(np.array(log(120, seed=1)["tab"]) == 2).tolist()


def test_since_and_before_cut_one_file_into_splits(tmp_path: Path) -> None:
    write(tmp_path, "csv")
    times, cut = np.array(log()["ts"]), 1_005_000
    part = TableDomain(
        train=TableSplit(["train.csv"], before=cut),
        val=TableSplit(["test.csv"]),
        test=TableSplit(["train.csv"], since=cut),
    )
    data = module(tmp_path, domains={"a": part, "b": part})

    for split, wanted in (("train", times < cut), ("test", times >= cut)):
        dataset = data.get_dataset("a", split)  # type: ignore[arg-type]
        assert dataset.__getitems__(range(len(dataset))).row.tolist() == np.flatnonzero(wanted).tolist()  # type: ignore


def test_training_on_rows_later_than_a_test_row_is_refused_unless_allowed(tmp_path: Path) -> None:
    write(tmp_path, "csv", ts=(np.array(log()["ts"]) + 10**6).tolist())

    with pytest.raises(TableError, match="training would see the future"):
        module(tmp_path).train_dataloader()
    assert len(module(tmp_path, later_training_rows=True).train_dataloader())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ts": log()["ts"][::-1]}, r"time of row \d+ \(\d+\) is before that of the row above; sort the file by ts"),
        ({"ts": [*log()["ts"][:-1], 10**13]}, "lies in the future; mend it, or set time_unit"),
        ({"ts": [None, *log()["ts"][1:]]}, "row 0 has no time"),
        ({"clicked": [0] * ROWS}, f"task 'click' has no positive among {SEEN} training labels"),
        ({"clicked": [1] * ROWS}, f"task 'click' has no negative among {SEEN} training labels"),
        ({"clicked": [2] * ROWS}, r"label 'clicked' of task 'click' holds 2; labels are 0 or 1, or give above"),
        ({"clicked": ["yes"] * ROWS}, "this column must hold numbers"),
    ],
)
def test_wrong_rows_are_told_before_training(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    write(tmp_path, "csv", **changes)

    with pytest.raises(TableError, match=text):
        module(tmp_path).train_dataloader()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tab": [1, *[3] * (ROWS - 1)]}, r"field 'tab': value 3 gives no id in 0 .. 3; raise its cardinality"),
        ({"who": ["", *["u"] * (ROWS - 1)]}, r"1 rows have no user \(who\)"),
    ],
)
def test_wrong_ids_are_told_when_their_block_is_read(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    write(tmp_path, "csv", **changes)
    data = module(tmp_path, roles={**ROLES, "seen": ["all"], "unseen": []})

    with pytest.raises(TableError, match=text):
        data.get_dataset("all", "train").__getitems__(range(64))  # type: ignore[attr-defined]


def test_missing_columns_files_and_domains_are_told(tmp_path: Path) -> None:
    write(tmp_path, "csv")
    lacking = replace(COLUMNS, dense=[DenseColumn("height")])

    with pytest.raises(TableError, match="no column 'height'; it has: who, video"):
        module(tmp_path, columns=lacking).train_dataloader()
    with pytest.raises(TableError, match=r"no file .*other.csv"):
        module(tmp_path, domains={k: TableDomain(*[TableSplit(["other.csv"])] * 3) for k in "ab"}).train_dataloader()
    with pytest.raises(ValueError, match="has no domain 'c'; allowed: a, b, all"):
        module(tmp_path, roles={**ROLES, "unseen": ["c"]})
    with pytest.raises(ValueError, match="seen domain 'a' has no train files"):
        module(tmp_path, domains={**domains("csv"), "a": TableDomain(test=TableSplit(["test.csv"]))})
    with pytest.raises(ValueError, match="mixing='balanced' needs all rows at hand"):
        RecommendationData(source=source(tmp_path), mixing="balanced", **ROLES)
    with pytest.raises(ValueError, match="name the time column"):
        source(tmp_path, columns=replace(COLUMNS, time=None), domains={"a": TableDomain(TableSplit(["x"], since=1))})


def test_damaged_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3\n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "c.csv").write_text("")
    (tmp_path / "d.json").write_text("{}")

    with pytest.raises(TableError, match="record 2 has 1 fields, the header 2"):
        open_blocks(tmp_path / "a.csv", cache=tmp_path)
    with pytest.raises(TableError, match="not a readable Parquet file"):
        open_blocks(tmp_path / "b.parquet")
    with pytest.raises(TableError, match="is empty; a header line"):
        open_blocks(tmp_path / "c.csv", cache=tmp_path)
    with pytest.raises(TableError, match=r"'.json' is unknown; allowed are .parquet, .csv and .tsv"):
        open_blocks(tmp_path / "d.json")


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 8, 9])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blocks_of_text_are_found_again_whatever_is_quoted(tmp_path: Path, rows: int, end: str) -> None:
    words = [f"{k}" if k % 3 else f'"a ""{k}""\nline, two"' for k in range(rows)]
    text = end.join(["name,n", *(f"{word},{k}" for k, word in enumerate(words))]) + (end if rows % 2 else "")
    (tmp_path / "t.csv").write_text(text, newline="")
    file = open_blocks(tmp_path / "t.csv", 4, cache=tmp_path)
    read = [file.read(block, ["name", "n"]).to_pydict() for block in range(len(file.sizes))]

    assert file.sizes == [4] * (rows // 4) + ([rows % 4] if rows % 4 else [])
    assert [n for part in read for n in part["n"]] == list(range(rows))
    wanted = [str(k) if k % 3 else f'a "{k}"\nline, two' for k in range(rows)]
    assert [name for part in read for name in part["name"]] == wanted


def test_a_second_run_reads_the_counts_from_the_cache(tmp_path: Path) -> None:
    write(tmp_path, "csv")
    first = module(tmp_path)
    first.prepare_data()
    kept = sorted((tmp_path / "cache").rglob("blocks-*.json"))
    second = module(tmp_path)
    second.source._count = None  # type: ignore[attr-defined]  # counting again would fail

    second.prepare_data()
    assert sorted((tmp_path / "cache").rglob("blocks-*.json")) == kept
    assert [b.rows for b in second.source.blocks("a", "train", tmp_path / "cache")] == [  # type: ignore[attr-defined]
        b.rows
        for b in first.source.blocks("a", "train", tmp_path / "cache")  # type: ignore[attr-defined]
    ]


def test_hashes_are_the_published_function_spread_evenly_and_agree_between_text_and_numbers() -> None:
    # splitmix64 of state 0: the first output of the reference implementation.
    assert int(hash_integers(np.array([0]))[0]) == 0xE220A8397B1DCDAF
    numbers = np.arange(-5, 5)
    words = pa.array([str(n) for n in numbers])
    assert np.array_equal(hash_values(pa.array(numbers), 7)[0], hash_values(words, 7)[0])
    assert np.array_equal(hash_values(words, 7)[0], hash_integers(numbers, 7))
    assert not np.array_equal(hash_values(words, 7)[0], hash_values(words, 8)[0])
    assert len(set(hash_values(pa.array(["007", "7", "7.5", "seven"]))[0].tolist())) == 4
    ids = to_ids(hash_integers(np.arange(100_000)), 11)
    counts = np.bincount(ids, minlength=11)
    assert counts[0] == 0
    assert abs(counts[1:] - 10_000).max() < 500


def test_kuairands_layout_is_read_as_its_overlay_says(tmp_path: Path) -> None:
    """Files of the published header, in three days of April and May 2022, read by configs/data/kuairand.yaml."""
    rng, rows, day = np.random.default_rng(0), 600, 86_400_000
    flags = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")

    def file(name: str, first: int, days: int) -> None:
        columns: dict[str, Any] = {
            "user_id": rng.integers(0, 50, rows),
            "video_id": rng.integers(0, 900, rows),
            "date": [20220421] * rows,
            "hourmin": [1300] * rows,
            "time_ms": rng.integers(first, first + days * day, rows),
            **{flag: rng.integers(0, 2, rows) for flag in flags},
            "play_time_ms": rng.integers(0, 99_999, rows),
            "duration_ms": rng.integers(0, 99_999, rows),
            "profile_stay_time": [0] * rows,
            "comment_stay_time": [0] * rows,
            "is_profile_enter": [0] * rows,
            "is_rand": [0] * rows,
            "tab": rng.integers(0, 15, rows),
        }
        write_table(tmp_path / f"{name}_pure.csv", columns)

    file("log_standard_4_08_to_4_21", 1_649_376_000_000, 14)
    file("log_standard_4_22_to_5_08", 1_650_585_600_000, 17)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(RecommendationData, "data")
    config = yaml.safe_load(Path("configs/data/kuairand.yaml").read_text())["data"]
    config["init_args"]["source"]["init_args"]["root"] = str(tmp_path)
    config["init_args"] |= {"cache_dir": str(tmp_path / "cache"), "batch_size": 16}
    data = parser.instantiate(parser.parse_object({"data": config})).data

    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    data.source.schema.check(batch, "kuairand")
    assert data.facts["categories"] == ["watch"] * 2 + ["interaction"] * 4
    assert set(batch.ids[:, 2].tolist()) == {1, 2}
    assert {int(b.ids[0, 2]) for b in data.test_dataloader()[-1]} == {5}
    assert 0.2 < float(batch.label.mean()) < 0.8
