# SPDX-License-Identifier: Apache-2.0
"""Readers of logs and of tables beside plain loops of pyarrow and of pandas on the same files.

A plain loop is what one writes without a library: it gives the same numbers, but checks nothing. That of pyarrow does
not hash; that of pandas does, with the hash that pandas has.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.json as arrow_json
import pyarrow.parquet as parquet
import torch

from benchmarks import recommendation_tables as logs
from benchmarks.peers.rows import Race
from tasks.adaptation.data.readers.table import TableDomains
from tasks.audio.data.readers.clip_table import read_clip_table
from tasks.recommendation.data.readers.amazon import AmazonReviews
from tasks.recommendation.data.readers.movielens_files import MovieLens25M
from tasks.recommendation.data.readers.rating_reader import RatingLists, RatingReader

RATINGS, FILMS, ROWS = 200_000, 5_000, 20_000
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # until the process ends


def folder() -> Path:
    """A new folder that is there until the process ends."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    return Path(_FOLDERS[-1].name)


# Logs -----------------------------------------------------------------------------------------------------------------


def log(ending: str, use: str, peer: str) -> Race:
    """Twelve columns, one id of text: converted, counted, checked and read, or read once more."""
    pa.set_cpu_count(1)
    root, table = folder(), logs.make_log(words=True)
    path = root / f"log.{ending}"
    if ending == "csv":
        arrow_csv.write_csv(table, path)
    else:
        parquet.write_table(table, path, row_group_size=logs.BLOCK)
    known = logs.opened(path, root / "cache")

    def first() -> None:
        with tempfile.TemporaryDirectory() as cache:
            logs.our_loop(*logs.opened(path, Path(cache)))

    theirs = logs.plain_tensors if peer == "pyarrow" else pandas_tensors
    ours = first if use == "first" else lambda: logs.our_loop(*known)
    hashed = "without a hash" if peer == "pyarrow" else "hashed"
    equal = f"{logs.ROWS:,} rows to tensors; ours hashed, theirs {hashed}"
    ways = {name: partial(otherwise, owner, attribute, options, ours) for name, (owner, attribute, options) in WAYS}
    return Race(ours, lambda: theirs(path), equal, lambda: logs.decoding_alone(path), ways=ways)


WAYS = (
    ("words not as dictionaries", (parquet, "ParquetFile", {"read_dictionary": None})),
    ("blocks read ahead", (parquet, "ParquetFile", {"pre_buffer": True})),
    ("files mapped into memory", (parquet, "ParquetFile", {"memory_map": True})),
    ("a cache without compression", (parquet, "ParquetWriter", {"compression": "none"})),
)
"""Other ways to read and convert a log: options of pyarrow's files."""


def otherwise(owner: Any, attribute: str, options: dict[str, Any], work: Callable[[], object]) -> None:
    """Run a work with other options of a class."""
    real = getattr(owner, attribute)
    with patch.object(owner, attribute, lambda *args, **kwargs: real(*args, **{**kwargs, **options})):
        work()


def pandas_tensors(path: Path) -> None:
    """The same tensors by pandas, block by block where it can; ids hashed."""
    import pandas as pd

    names, first = [*logs.IDS, *logs.DENSE, "click"], 0
    if path.suffix == ".csv":
        frames = iter(pd.read_csv(path, usecols=names, chunksize=logs.BLOCK))
    else:  # pandas has no row groups: one frame, cut afterwards
        whole = pd.read_parquet(path, columns=names)
        frames = (whole[start : start + logs.BLOCK] for start in range(0, len(whole), logs.BLOCK))
    for frame in frames:
        hashed = [pd.util.hash_array(frame[name].to_numpy()) % np.uint64((1 << 20) - 1) + 1 for name in logs.IDS]
        torch.from_numpy(np.stack(hashed, 1).astype(np.int64))
        torch.from_numpy(frame[list(logs.DENSE)].to_numpy(np.float32))
        torch.from_numpy(frame[["click"]].to_numpy(np.float32))
        torch.from_numpy(frame[["click"]].notna().to_numpy())
        torch.from_numpy(frame["user"].to_numpy().copy())
        torch.arange(first, first + len(frame))
        first += len(frame)


# Ratings --------------------------------------------------------------------------------------------------------------


def _lists(reader: RatingReader) -> Callable[[], object]:
    """Convert, check and number the ratings, as a run does that has never seen them."""

    def ours() -> object:
        with tempfile.TemporaryDirectory() as cache:
            source = RatingLists(reader=reader)
            source._cache = Path(cache)
            return source.log

    return ours


def _numbered(table: pa.Table, names: tuple[str, str, str, str]) -> list[Any]:
    """User and item numbered, rating and time as arrays."""
    user, item, rating, time = (table[name].combine_chunks() for name in names)
    codes = [column.dictionary_encode().indices.to_numpy().astype(np.int64) for column in (user, item)]
    return [*codes, rating.to_numpy(), time.to_numpy()]


def films() -> Race:
    """ratings.csv and movies.csv in the layout of MovieLens 25M."""
    root, rng = folder(), np.random.default_rng(0)
    times = np.sort(rng.integers(10**9, 15 * 10**8, RATINGS))
    users, items = rng.integers(1, 5_000, RATINGS), rng.integers(1, FILMS, RATINGS)
    stars = rng.integers(1, 11, RATINGS) / 2
    arrow_csv.write_csv(
        pa.table({"userId": users, "movieId": items, "rating": stars, "timestamp": times}), root / "ratings.csv"
    )
    titles = [f"Film {k} ({1930 + k % 80})" for k in range(1, FILMS)]
    kinds = ["Action|Drama", "Comedy", "Horror|Sci-Fi", "Children|Fantasy"]
    genres = [kinds[k % len(kinds)] for k in range(1, FILMS)]
    arrow_csv.write_csv(
        pa.table({"movieId": np.arange(1, FILMS), "title": titles, "genres": genres}), root / "movies.csv"
    )
    read = arrow_csv.ReadOptions(use_threads=False)

    def decode() -> pa.Table:
        arrow_csv.read_csv(root / "movies.csv", read)
        return arrow_csv.read_csv(root / "ratings.csv", read)

    def theirs() -> object:
        return _numbered(decode(), ("userId", "movieId", "rating", "timestamp"))

    equal = f"{RATINGS:,} ratings; ours joins films, checks, and writes its cache"
    return Race(_lists(MovieLens25M(root=root)), theirs, equal, decode)


def reviews() -> Race:
    """Books.jsonl in the layout of the edition of 2023."""
    root, rng = folder(), np.random.default_rng(0)
    with open(root / "Books.jsonl", "w", encoding="utf-8") as file:
        for k in range(RATINGS // 4):
            row = {"rating": float(rng.integers(1, 6)), "title": "A title", "text": "some words of a review " * 4}
            row |= {"parent_asin": f"B{rng.integers(10**4):09d}", "user_id": f"A{rng.integers(10**4):027d}"}
            file.write(json.dumps(row | {"timestamp": 1_300_000_000_000 + 1000 * k}) + "\n")

    def decode() -> pa.Table:
        return arrow_json.read_json(root / "Books.jsonl", arrow_json.ReadOptions(use_threads=False))

    def theirs() -> object:
        return _numbered(decode(), ("user_id", "parent_asin", "rating", "timestamp"))

    equal = f"{RATINGS // 4:,} reviews; ours reads them twice, checks, and writes its cache"
    return Race(_lists(AmazonReviews(root=root, categories=("Books",))), theirs, equal, decode)


# Tables of files ------------------------------------------------------------------------------------------------------


def clips() -> Race:
    """The table of a user's clips."""
    path = folder() / "clips.csv"
    columns = {
        "file": [f"clips/{k:06d}.wav" for k in range(ROWS)],
        "domain": [f"speaker{k % 20}" for k in range(ROWS)],
        "kind": ["speech"] * ROWS,
        "text": [f"some words that were said, number {k}" for k in range(ROWS)],
        "mood": [("calm", "glad", "")[k % 3] for k in range(ROWS)],
    }
    arrow_csv.write_csv(pa.table(columns), path)
    equal = f"{ROWS:,} rows to a list of rows; ours checks each"
    return Race(lambda: read_clip_table(path), lambda: _plain_rows(path), equal, lambda: _decoded(path))


def images() -> Race:
    """The table of a set of WILDS: labels, places, splits."""
    root = folder()
    columns = {
        "image_id": [f"{k:08d}" for k in range(ROWS)],
        "y": [str(k % 10) for k in range(ROWS)],
        "location": [str(k % 40) for k in range(ROWS)],
        "split": [("train", "val", "test")[k % 3] for k in range(ROWS)],
        "more": ["what nobody asks for"] * ROWS,
    }
    arrow_csv.write_csv(pa.table(columns), root / "metadata.csv")

    def ours() -> object:
        return TableDomains(root=root, image="{image_id}.png", label="y", domain="place{location}")

    equal = f"{ROWS:,} rows; ours grouped by domain with paths and labels, theirs a list of rows"
    path = root / "metadata.csv"
    return Race(ours, lambda: _plain_rows(path), equal, lambda: _decoded(path))


def _decoded(path: Path) -> pa.Table:
    return arrow_csv.read_csv(path, arrow_csv.ReadOptions(use_threads=False))


def _plain_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = _decoded(path).to_pylist()
    return rows
