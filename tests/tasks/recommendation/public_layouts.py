# SPDX-License-Identifier: Apache-2.0
"""Tiny random files in the layouts in which public logs are published; each writer returns the rows it wrote."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from tasks.recommendation.data.readers.census import NAMES
from tasks.recommendation.data.readers.ratings import GENRES as GENRES_100K
from tasks.recommendation.data.readers.ratings import OCCUPATIONS, Ratings

Row = dict[str, Any]
DAY = 86_400


def write_lines(path: Path, lines: Iterable[str], encoding: str = "utf-8") -> None:
    """Write lines; a name that ends in .gz is packed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_rows(path: Path, rows: Sequence[Row], *, header: bool = True, separator: str = ",") -> None:
    """Write rows as text; None is an empty field, a text with the separator is quoted."""

    def word(value: Any) -> str:
        text = "" if value is None else str(value)
        return f'"{text}"' if separator in text and separator == "," else text

    head = [separator.join(rows[0])] if header else []
    write_lines(path, [*head, *(separator.join(word(value) for value in row.values()) for row in rows)])


KUAIRAND_FLAGS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")


def write_kuairand(root: Path, rows: int = 400, users: int = 20, seed: int = 0) -> dict[str, list[Row]]:
    """KuaiRand-Pure: two standard logs, the random log, features and statistics. Video 7 has no features."""
    rng = np.random.default_rng(seed)

    def log(name: str, first: str, days: int, shown: int) -> list[Row]:
        start = datetime.fromisoformat(first).replace(tzinfo=UTC) - timedelta(hours=8)  # days of China
        written = []
        for _ in range(rows):
            seconds = int(rng.integers(0, days * DAY))
            there = start + timedelta(seconds=seconds, hours=8)
            written.append(
                {
                    "user_id": int(rng.integers(users)),
                    "video_id": 2**53 + int(rng.integers(0, 99)) if rng.random() < 0.1 else int(rng.integers(0, 90)),
                    "date": f"{there:%Y%m%d}",
                    "hourmin": int(f"{there:%H}00"),
                    "time_ms": 1000 * int(start.timestamp() + seconds),
                    **{flag: int(rng.random() < 0.4) for flag in KUAIRAND_FLAGS},
                    "play_time_ms": int(rng.integers(0, 99_999)),
                    "duration_ms": int(rng.integers(1, 99_999)),
                    "profile_stay_time": 0,
                    "comment_stay_time": 0,
                    "is_profile_enter": int(rng.random() < 0.3),
                    "is_rand": shown,
                    "tab": int(rng.integers(0, 5)),
                }
            )
        write_rows(root / f"{name}_pure.csv", written)
        return written

    logs = {
        "early": log("log_standard_4_08_to_4_21", "2022-04-08", 14, 0),
        "late": log("log_standard_4_22_to_5_08", "2022-04-22", 17, 0),
        "random": log("log_random_4_22_to_5_08", "2022-04-22", 17, 1),
    }
    videos = sorted({row["video_id"] for log_ in logs.values() for row in log_} - {7})
    basic = [
        {
            "video_id": video,
            "author_id": video % 13,
            "video_type": "AD" if video % 5 == 0 else "NORMAL",
            "upload_dt": "2022-04-01",
            "upload_type": "ShortImport",
            "visible_status": "public",
            "video_duration": 9000.0,
            "server_width": 720,
            "server_height": 1280,
            "music_id": None if video % 4 == 0 else f"{2**60 + video % 9}.0",
            "music_type": "9.0",
            "tag": "12,65" if video % 2 else "8",
        }
        for video in videos
    ]
    write_rows(root / "video_features_basic_pure.csv", basic)
    statistic = [{"video_id": v, "counts": 1, "show_cnt": 100.5 + v % 7, "play_cnt": 50, "like_cnt": 2} for v in videos]
    write_rows(root / "video_features_statistic_pure.csv", statistic)
    people = [
        {
            "user_id": user,
            "user_active_degree": "full_active",
            "fans_user_num": 3,
            "register_days": 100,
            **{f"onehot_feat{k}": None if user == 3 and k == 4 else (user + k) % 5 for k in range(18)},
        }
        for user in range(users)
    ]
    write_rows(root / "user_features_pure.csv", people)
    return {**logs, "videos": basic, "users": people}


def write_kuairec(root: Path, seed: int = 0) -> dict[str, list[Row]]:
    """KuaiRec: 12 users and 30 videos; the small matrix is complete for users 0..3 and videos 0..7. Both have gaps."""
    rng = np.random.default_rng(seed)
    start = datetime(2020, 7, 4, 16, tzinfo=UTC).timestamp()

    def row(user: int, video: int) -> Row:
        when = None if rng.random() < 0.05 else start + round(float(rng.random()) * 62 * DAY, 3)
        length = (5_000, 12_000, 40_000)[video % 3]
        play = int(rng.integers(0, 3 * length))
        shown = None if when is None else datetime.fromtimestamp(when, UTC) + timedelta(hours=8)
        return {
            "user_id": user,
            "video_id": video,
            "play_duration": play,
            "video_duration": length,
            "time": None if shown is None else f"{shown:%Y-%m-%d %H:%M:%S.%f}",
            "date": None if shown is None else f"{shown:%Y%m%d}.0",
            "timestamp": when,
            "watch_ratio": play / length,
        }

    big = [row(user, video) for user in range(12) for video in range(30) for _ in range(2)]
    small = [row(user, video) for user in range(4) for video in range(8) for _ in range(3)]
    rng.shuffle(big)  # type: ignore[arg-type]
    write_rows(root / "big_matrix.csv", big)
    write_rows(root / "small_matrix.csv", small)
    items = [{"video_id": video, "feat": ("[8]", "[27, 9]", "[]")[video % 3]} for video in range(30)]
    write_rows(root / "item_categories.csv", items)
    return {"big": big, "small": small, "items": items}


def write_aliexpress(root: Path, countries: Sequence[str] = ("nl", "es", "fr", "us"), seed: int = 0) -> dict[str, Any]:
    """AliExpress: per country 60 training and 30 test searches of 4 items, of which 5 searches are in both."""
    rng = np.random.default_rng(seed)
    written: dict[str, Any] = {}
    for country in countries:
        folder = root / f"AliExpress_{country.upper()}"
        for split, searches in (("train", range(60)), ("test", range(55, 85))):
            users = [
                [f"{country}-{key}", *rng.integers(0, 9, 7), *rng.random(23).round(3), "x", "y"] for key in searches
            ]
            items = [
                [f"{country}-{key}", *rng.integers(0, 9, 47), int(rng.integers(0, 3))]
                for key in [*searches, 999]
                for _ in range(4)
            ]
            for who, rows in (("user", users), ("item", items)):
                write_lines(folder / f"{country}_{who}_{split}.csv", (",".join(map(str, row)) for row in rows))
                written[f"{country}_{who}_{split}"] = rows
    return written


def feature(field: str, code: int, value: float = 1.0) -> str:
    """One feature of Ali-CCP."""
    return f"{field}\x02{code}\x03{value}"


def write_ali_ccp(root: Path, rows: int = 600, seed: int = 0) -> dict[str, list[Row]]:
    """Ali-CCP: keys k0..k59 in training and k55..k79 in the test; fields 205, 301 and 508 of rows, 101 and 109_14."""
    rng = np.random.default_rng(seed)
    written: dict[str, list[Row]] = {}
    for split, keys in (("train", range(60)), ("test", range(55, 80))):
        common = []
        for key in keys:
            parts = [
                feature("101", 4_000_000_000_000_000_000 + key),
                *(feature("109_14", 10 + k) for k in range(key % 3)),
            ]
            common.append({"key": f"k{key}", "count": len(parts), "features": "\x01".join(parts)})
        skeleton = []
        for number in range(rows):
            click, purchase = int(rng.random() < 0.5), int(rng.random() < 0.3)
            scenario = (9351665, 9351666, 9351667)[int(rng.integers(3))]
            parts = [feature("205", number), feature("301", scenario)]
            parts += [feature("508", 7, 2.5)] if number % 2 else []
            skeleton.append(
                {
                    "sample": number,
                    "click": click,
                    "purchase": purchase,
                    "key": f"k{rng.choice(list(keys))}",
                    "count": len(parts),
                    "features": "\x01".join(parts),
                }
            )
        write_rows(root / f"sample_skeleton_{split}.csv", skeleton, header=False)
        write_rows(root / f"common_features_{split}.csv", common, header=False)
        written |= {f"skeleton_{split}": skeleton, f"common_{split}": common}
    return written


def write_census(root: Path, rows: int = 600, seed: int = 0) -> dict[str, list[Row]]:
    """Census-income: the first ten test rows are training rows, too."""
    rng = np.random.default_rng(seed)
    numbers = ("age", "wage_per_hour", "capital_gains", "capital_losses", "dividends", "persons_worked", "weeks_worked")
    values: dict[str, Sequence[str]] = {
        "education": ("High school graduate", "Bachelors degree(BA AB BS)", "Children"),
        "marital": ("Never married", "Divorced"),
        "sex": ("Female", "Male"),
        "year": ("94", "95"),
        "income": ("- 50000.", "50000+."),
        "migration_msa": ("?", "Nonmover"),
    }

    def row() -> Row:
        found: Row = {}
        for name in NAMES:
            if name in numbers:
                found[name] = int(rng.integers(0, 60))
            elif name == "instance_weight":
                found[name] = round(float(rng.random() * 3000), 2)
            else:
                found[name] = str(rng.choice(values.get(name, ("Not in universe", "Other"))))
        return found

    data = [row() for _ in range(rows)]
    test = [*data[:10], *(row() for _ in range(rows // 2))]
    write_rows(root / "census-income.data", data, header=False, separator=", ")
    write_rows(root / "census-income.test", test, header=False, separator=", ")
    return {"data": data, "test": test}


GENRES = ("Action", "Comedy|Romance", "Drama", "Animation|Children's", "Horror", "Documentary", "Action|Drama")


def make_ratings(rows: int, users: int, items: int, seed: int, half: bool = False) -> list[Row]:
    """Each user rates each item at most once, on pages of a few ratings of one second."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(users * items)[:rows]
    pages = 10**9 + 60 * np.sort(rng.integers(0, rows // 3, rows))
    stars = rng.integers(2, 11, rows) / 2 if half else rng.integers(1, 6, rows)
    return [
        {"user": int(p // items) + 1, "item": int(p % items) + 1, "rating": s.item(), "time": int(t)}
        for p, s, t in zip(pairs, stars, pages, strict=True)
    ]


def write_ratings(folder: Path, log: Ratings, name: str = "ml-100k") -> None:
    """MovieLens 100K as RecBole packs it: three tables of tabs; a film without a year has the published misspelling."""
    ratings = zip(log.user, log.item, log.rating, log.time, strict=True)
    films = (
        (item, f"Film {item}", log.year[item] or "unkonwn", " ".join(np.array(GENRES_100K)[log.genres[item]]))
        for item in np.unique(log.item)
    )
    users = (
        (user, log.age[user], "FM"[log.gender[user] - 1], OCCUPATIONS[log.occupation[user] - 1], "0")
        for user in np.flatnonzero(log.age)
    )
    heads = {
        "inter": ("user_id:token", "item_id:token", "rating:float", "timestamp:float"),
        "item": ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq"),
        "user": ("user_id:token", "age:token", "gender:token", "occupation:token", "zip_code:token"),
    }
    for (ending, head), rows in zip(heads.items(), (ratings, films, users), strict=True):
        write_lines(folder / f"{name}.{ending}", ("\t".join(map(str, row)) for row in (head, *rows)))


def write_movielens_1m(root: Path, rows: int = 900, seed: int = 0) -> list[Row]:
    """MovieLens 1M: 40 users, 42 films, titles with colons and an accent."""
    log = make_ratings(rows, 40, 42, seed)
    write_lines(root / "ratings.dat", (f"{r['user']}::{r['item']}::{r['rating']}::{r['time']}" for r in log))
    films = (f"{k}::Film: Épisode {k} ({1950 + k})::{GENRES[k % len(GENRES)]}" for k in range(1, 43))
    write_lines(root / "movies.dat", films, encoding="latin-1")
    users = (f"{k}::{'FM'[k % 2]}::{(1, 18, 25, 35, 45, 50, 56)[k % 7]}::{k % 21}::0{k}-1" for k in range(1, 41))
    write_lines(root / "users.dat", users)
    return log


def write_movielens_25m(root: Path, rows: int = 900, seed: int = 0) -> list[Row]:
    """MovieLens 25M: film 5 has no genre, a title is quoted."""
    log = make_ratings(rows, 40, 42, seed, half=True)
    names = ("userId", "movieId", "rating", "timestamp")
    write_rows(root / "ratings.csv", [dict(zip(names, row.values(), strict=True)) for row in log])
    films = [
        {
            "movieId": k,
            "title": f"Film, The ({1950 + k})",
            "genres": "(no genres listed)" if k == 5 else GENRES[k % len(GENRES)].replace("Children's", "Children"),
        }
        for k in range(1, 43)
    ]
    write_rows(root / "movies.csv", films)
    return log


def write_amazon(root: Path, edition: str, categories: Sequence[str] = ("Books", "Toys"), seed: int = 0) -> list[Row]:
    """Amazon reviews of some categories, packed in 2014; items are theirs alone."""
    log: list[Row] = []
    for number, category in enumerate(categories):
        rows = make_ratings(500, 30, 30, seed + number)
        rows = [
            {
                **r,
                "user": f"A{r['user']}",
                "item": f"B{number}{r['item']:03}",
                "category": category,
                "rating": float(r["rating"]),
            }
            for r in rows
        ]
        log += rows
        old = [
            {
                "reviewerID": r["user"],
                "asin": r["item"],
                "reviewerName": "N. N.",
                "helpful": [1, 2],
                "reviewText": 'It says "ten",\nand more',
                "overall": r["rating"],
                "summary": "ok",
                "unixReviewTime": r["time"],
                "reviewTime": "07 3, 2013",
            }
            for r in rows
        ]
        new = [
            {
                "rating": r["rating"],
                "title": "ok",
                "text": "x",
                "images": [],
                "asin": f"C{r['item']}",
                "parent_asin": r["item"],
                "user_id": r["user"],
                "timestamp": 1000 * r["time"] + 123,
                "helpful_vote": 0,
                "verified_purchase": True,
            }
            for r in rows
        ]
        items = sorted({r["item"] for r in rows})
        kinds = [f"Women's {item[-1]}" for item in items]
        if edition == "2014":
            write_lines(root / f"reviews_{category}_5.json.gz", map(json.dumps, old))
            literals = (
                {"asin": i, "title": "It's", "categories": [[category, k]]} for i, k in zip(items, kinds, strict=True)
            )
            write_lines(root / f"meta_{category}.json.gz", map(repr, literals))
        elif edition == "2018":
            write_lines(
                root / f"{category}_5.json", (json.dumps({**r, "vote": "2", "style": {"S:": "1"}}) for r in old)
            )
            lines = ({"asin": i, "category": [category, k, "x"]} for i, k in zip(items, kinds, strict=True))
            write_lines(root / f"meta_{category}.json", map(json.dumps, lines))
        else:
            write_lines(root / f"{category}.jsonl", map(json.dumps, new))
            lines = ({"parent_asin": i, "categories": [category, k]} for i, k in zip(items, kinds, strict=True))
            write_lines(root / f"meta_{category}.jsonl", map(json.dumps, lines))
    return log
