# SPDX-License-Identifier: Apache-2.0
"""Readers of public logs of impressions: what is written comes back, nothing of the future does."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.recommendation.data.readers.ali_ccp import AliCCP, unpack
from tasks.recommendation.data.readers.aliexpress import CATEGORICAL, NUMERICAL, AliExpress
from tasks.recommendation.data.readers.census import NAMES, CensusIncome
from tasks.recommendation.data.readers.kuairand import KuaiRand
from tasks.recommendation.data.readers.kuairec import KuaiRec
from tasks.recommendation.data.readers.public import PublicLog
from tasks.recommendation.data.readers.values import TableError
from tasks.recommendation.datamodule import RecommendationData
from tests.tasks.recommendation import public_layouts as layouts

LOGS: dict[str, tuple[type[PublicLog], Any]] = {
    "kuairand": (KuaiRand, layouts.write_kuairand),
    "kuairec": (KuaiRec, layouts.write_kuairec),
    "aliexpress": (AliExpress, layouts.write_aliexpress),
    "ali_ccp": (AliCCP, layouts.write_ali_ccp),
    "census": (CensusIncome, layouts.write_census),
}


def split_rows(source: PublicLog, cache: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of each split as the cache holds them, whatever their domain; plain pyarrow reads them."""
    folder = source.convert(cache)
    return {
        split: [
            row for p in sorted((folder / split).glob("*.parquet")) for row in pyarrow.parquet.read_table(p).to_pylist()
        ]
        for split in ("train", "val", "test")
    }


@pytest.mark.parametrize("name", LOGS)
def test_every_log_trains_and_tests_in_its_default_domains(tmp_path: Path, name: str) -> None:
    reader, write = LOGS[name]
    write(tmp_path)
    data = RecommendationData(source=reader(root=tmp_path), batch_size=16, cache_dir=tmp_path / "cache")  # type: ignore[call-arg]
    data.prepare_data()

    loaders = [data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    for loader in loaders:
        batch = next(iter(loader))
        data.source.schema.check(batch, name)  # type: ignore[arg-type]
    assert all(data.roles.values())
    assert len(loaders) == 1 + sum(len(names) for names in data.roles.values()) * 2 - len(data.roles["unseen"])


@pytest.mark.parametrize("name", LOGS)
def test_a_missing_file_is_named_with_where_it_comes_from_and_on_which_terms(tmp_path: Path, name: str) -> None:
    source = LOGS[name][0](root=tmp_path)  # type: ignore[call-arg]

    with pytest.raises(
        TableError, match=r"no (file|folder) .*; root must be the folder .* Download .* Terms: "
    ) as caught:
        source.convert(tmp_path / "cache")
    assert source.terms in str(caught.value)


@pytest.mark.parametrize("name", LOGS)
def test_a_damaged_layout_is_shown_beside_what_was_expected(tmp_path: Path, name: str) -> None:
    reader, write = LOGS[name]
    write(tmp_path)
    source = reader(root=tmp_path)  # type: ignore[call-arg]
    path = source.files()[0]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["only,three,words", *lines[1:]]) + "\n")

    with pytest.raises(TableError, match=r"only,three,words.*expected|expected.*only,three,words"):
        source.convert(tmp_path / "cache")


@pytest.mark.parametrize("name", LOGS)
def test_text_where_a_number_belongs_names_the_file_and_the_value(tmp_path: Path, name: str) -> None:
    reader, write = LOGS[name]
    write(tmp_path)
    source = reader(root=tmp_path)  # type: ignore[call-arg]
    path = source.files()[1 if name == "aliexpress" else 0]
    last = path.read_text().splitlines()[-1]
    number = {"census": 0, "aliexpress": 10, "ali_ccp": 1}.get(name, 0)
    words = last.split(",")
    words[number] = "seven"
    path.write_text(path.read_text() + ",".join(words) + "\n")

    with pytest.raises(TableError, match=f"{path.name}.*seven.*expected are"):
        source.convert(tmp_path / "cache")


# KuaiRand -------------------------------------------------------------------------------------------------------------


def test_kuairand_comes_back_row_by_row_split_by_chinas_days(tmp_path: Path) -> None:
    wrote = layouts.write_kuairand(tmp_path)
    found = split_rows(KuaiRand(root=tmp_path, features=True), tmp_path / "cache")

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        names = ("user_id", "video_id", "time_ms", "is_click", "long_view", "is_hate", "tab", "duration_ms")
        return tuple(row[name] for name in names)

    late = wrote["late"]
    wanted = {
        "train": wrote["early"],
        "val": [row for row in late if row["date"] < "20220429"],
        "test": [row for row in late if row["date"] >= "20220429"],
    }
    for split, rows in wanted.items():
        assert Counter(map(key, found[split])) == Counter(map(key, rows)), split
    assert max(row["time_ms"] for row in found["train"]) < min(row["time_ms"] for row in found["val"])
    assert max(row["time_ms"] for row in found["val"]) < min(row["time_ms"] for row in found["test"])
    assert all(row["domain"] == f"tab_{row['tab']}" for rows in found.values() for row in rows)
    there = {int(datetime.fromtimestamp(row["time_ms"] / 1000 + 8 * 3600).hour) for row in found["train"]}
    assert {row["hour"] for row in found["train"]} == there


def test_kuairand_joins_what_is_known_and_leaves_the_rest_missing(tmp_path: Path) -> None:
    wrote = layouts.write_kuairand(tmp_path)
    rows = [row for part in split_rows(KuaiRand(root=tmp_path, features=True), tmp_path / "c").values() for row in part]
    videos = {row["video_id"]: row for row in wrote["videos"]}

    assert any(row["video_id"] == 7 for row in rows)
    assert any(row["video_id"] > 2**53 and row["video_id"] % 2 for row in rows)  # not a float's number
    for row in rows:
        video = videos.get(row["video_id"], {})
        music = video.get("music_id")
        assert row["author_id"] == video.get("author_id")
        assert row["music_id"] == (None if music is None else int(music[:-2]))
        assert row["tag"] == video.get("tag")
        wanted = None if row["user_id"] == 3 else (row["user_id"] + 4) % 5
        assert row["onehot_feat4"] == wanted


def test_kuairand_does_not_show_what_is_known_only_afterwards(tmp_path: Path) -> None:
    layouts.write_kuairand(tmp_path)
    source = KuaiRand(root=tmp_path, features=True)
    labels = {task.label_column for task in source.columns.tasks}
    columns = source.columns
    shown = {spec.column for specs in (columns.ids, columns.bags, columns.dense) for spec in specs}  # type: ignore[attr-defined]

    assert not shown & labels
    assert not shown & {"play_time_ms", "profile_stay_time", "comment_stay_time", "show_cnt", "play_cnt", "like_cnt"}
    assert not shown & {"user_active_degree", "fans_user_num", "follow_user_num", "visible_status"}
    with_future = KuaiRand(root=tmp_path, statistics=True)
    assert {"show_cnt", "like_cnt"} <= {spec.column for spec in with_future.columns.dense}


def test_kuairands_random_exposures_are_a_domain_that_is_only_tested_on(tmp_path: Path) -> None:
    wrote = layouts.write_kuairand(tmp_path)
    found = split_rows(KuaiRand(root=tmp_path, random=True), tmp_path / "cache")
    random = [row for row in wrote["random"] if row["date"] >= "20220429"]

    assert [sum(row["domain"] == "random" for row in found[split]) for split in found] == [0, 0, len(random)]


# KuaiRec --------------------------------------------------------------------------------------------------------------


def test_kuairec_tests_on_the_small_matrix_and_trains_on_no_pair_of_it(tmp_path: Path) -> None:
    wrote = layouts.write_kuairec(tmp_path)
    found = split_rows(KuaiRec(root=tmp_path), tmp_path / "cache")
    small = {(row["user_id"], row["video_id"]) for row in wrote["small"]}
    big = [row for row in wrote["big"] if (row["user_id"], row["video_id"]) not in small and row["timestamp"]]
    wanted = {
        "train": [row for row in big if row["date"] < "20200816"],
        "val": [row for row in big if "20200816" <= row["date"] < "20200823"],
        "test": [row for row in [*big, *(r for r in wrote["small"] if r["timestamp"])] if row["date"] >= "20200823"],
    }

    for split, rows in wanted.items():
        keys = [(r["user_id"], r["video_id"], r["timestamp"], r["watch_ratio"]) for r in rows]
        assert Counter(keys) == Counter(
            (r["user_id"], r["video_id"], r["timestamp"], r["watch_ratio"]) for r in found[split]
        )
    assert not small & {(row["user_id"], row["video_id"]) for row in found["train"] + found["val"]}
    lengths = {5_000: "short", 12_000: "medium", 40_000: "long"}
    assert all(row["domain"] in ("small", lengths[row["video_duration"]]) for rows in found.values() for row in rows)
    feats = {0: [8], 1: [27, 9], 2: None}
    assert all(row["feat"] == feats[row["video_id"] % 3] for rows in found.values() for row in rows)


def test_kuairecs_tasks_are_thresholds_of_the_share_that_was_watched(tmp_path: Path) -> None:
    layouts.write_kuairec(tmp_path)
    source = KuaiRec(root=tmp_path)
    source.bind({"seen": ["short"], "validation": [], "unseen": ["small"]})
    rows = source.dataset("short", "train", tmp_path / "cache")
    batch = rows.__getitems__(range(len(rows)))
    table = pyarrow.parquet.read_table(source.convert(tmp_path / "cache") / "train" / "short.parquet")
    ratio = table["watch_ratio"].to_numpy()

    assert source.schema.tasks == ("half", "whole", "twice")
    assert np.array_equal(batch.label.numpy(), np.stack([ratio > 0.5, ratio > 1, ratio > 2], 1))
    assert "play_duration" not in table.column_names


# AliExpress -----------------------------------------------------------------------------------------------------------


def test_aliexpress_joins_searches_and_items_and_trains_on_no_search_of_the_test(tmp_path: Path) -> None:
    wrote = layouts.write_aliexpress(tmp_path)
    found = split_rows(AliExpress(root=tmp_path), tmp_path / "cache")

    searches = {split: {row["search"] for row in rows} for split, rows in found.items()}
    assert not searches["train"] & searches["val"]
    assert not (searches["train"] | searches["val"]) & searches["test"]
    for country in ("nl", "es", "fr", "us"):
        keys = {f"{country}-{k}" for k in range(55)}  # 55 .. 59 are in the test as well, 999 has no search
        assert {key for split in ("train", "val") for key in searches[split] if key.startswith(country)} == keys
        assert {key for key in searches["test"] if key.startswith(country)} == {f"{country}-{k}" for k in range(55, 85)}
    assert sum(map(len, found.values())) == 4 * (55 + 30) * 4
    users = {row[0]: row for row in wrote["nl_user_train"]}
    items = Counter((row[0], tuple(map(str, row[1:]))) for row in wrote["nl_item_train"])
    for row in (row for split in ("train", "val") for row in found[split] if row["domain"] == "nl"):
        user = users[row["search"]]
        assert [row[f"user_{k}"] for k in range(2, 9)] == [str(value) for value in user[1:8]]
        assert [row[f"user_{k}"] for k in range(9, 32)] == user[8:31]
        label = int(row["label"])
        values = (*(str(int(float(row[f"item_{k}"]))) for k in range(2, 49)), str(label))
        items[row["search"], values] -= 1
    assert not -items  # none came twice
    assert (len(CATEGORICAL), len(NUMERICAL)) == (16, 63)


def test_aliexpress_labels_are_clicks_and_purchases(tmp_path: Path) -> None:
    layouts.write_aliexpress(tmp_path)
    source = AliExpress(root=tmp_path)
    source.bind({"seen": ["nl"], "validation": [], "unseen": []})
    rows = source.dataset("nl", "test", tmp_path / "cache")
    label = pyarrow.parquet.read_table(source.convert(tmp_path / "cache") / "test" / "nl.parquet")["label"].to_numpy()

    batch = rows.__getitems__(range(len(rows)))
    assert set(label) == {0, 1, 2}
    assert np.array_equal(batch.label.numpy(), np.stack([label >= 1, label == 2], 1))


# Ali-CCP --------------------------------------------------------------------------------------------------------------


def test_ali_ccp_joins_common_features_and_drops_purchases_without_a_click(tmp_path: Path) -> None:
    wrote = layouts.write_ali_ccp(tmp_path)
    found = split_rows(AliCCP(root=tmp_path), tmp_path / "cache")
    both = {f"k{key}" for key in range(55, 60)}

    for splits, name in ((("train", "val"), "train"), (("test",), "test")):
        rows = {row["sample"]: row for split in splits for row in found[split]}
        kept = [
            row
            for row in wrote[f"skeleton_{name}"]
            if (row["click"] or not row["purchase"]) and (name == "test" or row["key"] not in both)
        ]
        assert set(rows) == {str(row["sample"]) for row in kept}
        for row in kept:
            got, key = rows[str(row["sample"])], int(row["key"][1:])
            assert (got["click"], got["purchase"], got["205"]) == (row["click"], row["purchase"], row["sample"])
            assert got["101"] == 4_000_000_000_000_000_000 + key
            assert got["109_14"] == [10 + k for k in range(key % 3)]
            assert (got["508"], got["508_value"]) == ((7, 2.5) if row["sample"] % 2 else (None, None))
            assert got["domain"] == f"scenario_{got['301'] - 9351664}"
    keys = {split: {row["key"] for row in rows} for split, rows in found.items()}
    assert not keys["train"] & keys["val"]
    assert not (keys["train"] | keys["val"]) & keys["test"]


def test_ali_ccps_conversion_counts_among_clicks_alone(tmp_path: Path) -> None:
    layouts.write_ali_ccp(tmp_path)
    source = AliCCP(root=tmp_path)
    source.bind({"seen": ["scenario_1"], "validation": [], "unseen": []})
    rows = source.dataset("scenario_1", "train", tmp_path / "cache")
    batch = rows.__getitems__(range(len(rows)))

    click, purchase, conversion = batch.label.T
    assert torch.equal(batch.mask[:, 2], click.bool())
    assert torch.equal(conversion, purchase)  # no purchase is left without a click


@given(
    st.lists(st.lists(st.tuples(st.sampled_from(["101", "205", "9"]), st.integers(0, 2**62)), max_size=5), max_size=6)
)
def test_packed_features_are_found_as_a_loop_finds_them(rows: list[list[tuple[str, int]]]) -> None:
    text = ["\x01".join(layouts.feature(field, code) for field, code in row) for row in rows]
    table = pa.table({"features": pa.array(text, pa.string())})
    got = unpack(table, ["101"], ["205"])

    assert got["101"].to_pylist() == [next((code for field, code in row if field == "101"), None) for row in rows]
    assert got["205"].to_pylist() == [[code for field, code in row if field == "205"] for row in rows]


def test_a_feature_without_its_bytes_is_told() -> None:
    with pytest.raises(TableError, match=r"'205:3' is not field, byte 2, id, byte 3, value"):
        unpack(pa.table({"features": ["205\x023\x031.0\x01205:3"]}), ["205"], [])


# Census-income --------------------------------------------------------------------------------------------------------


def test_census_rows_of_the_test_are_not_trained_on_and_labels_are_counted_by_hand(tmp_path: Path) -> None:
    wrote = layouts.write_census(tmp_path)
    found = split_rows(CensusIncome(root=tmp_path, tasks=("income", "never_married", "college")), tmp_path / "cache")

    def whole(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(
            str(int(row[n]) if isinstance(row[n], float) and n != "instance_weight" else row[n]) for n in NAMES
        )

    train = Counter(map(whole, [*found["train"], *found["val"]]))
    assert train == Counter(map(whole, wrote["data"][10:]))
    assert Counter(map(whole, found["test"])) == Counter(map(whole, wrote["test"]))
    assert 20 < len(found["val"]) < 110
    for row in found["test"]:
        assert row["label_income"] == (row["income"] == "50000+.")
        assert row["label_never_married"] == (row["marital"] == "Never married")
        assert row["label_college"] == row["education"].startswith("Bachelors")
        assert row["domain"] == f"y{row['year']}_{row['sex'].lower()}"
        assert row["migration_msa"] in ("?", "Nonmover")


def test_a_census_task_is_never_read_off_the_column_it_is_made_of(tmp_path: Path) -> None:
    fields = {spec.column for spec in CensusIncome(root=tmp_path, tasks=("income", "never_married")).columns.ids}

    assert {"education", "sex"} <= fields
    assert not fields & {"marital", "income", "instance_weight"}
    assert "education" not in {s.column for s in CensusIncome(root=tmp_path, tasks=("income", "college")).columns.ids}
