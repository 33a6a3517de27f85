# SPDX-License-Identifier: Apache-2.0
"""The benchmark of codecs measures what it says, and the committed numbers hold the bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import audio_codec
from tasks.audio.data.generated import GeneratedAudio
from tasks.audio.nets.tokenizers import MelRVQ

RESULTS = Path("benchmarks/results/audio_codec.json")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small tokenizer on a few generated clips, measured as the recordings are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEAPPS_CACHE", str(tmp_path_factory.mktemp("cache")))
        source = GeneratedAudio(train_speech=6, train_music=3, val=1, test=2)
        return audio_codec.measure(source, [MelRVQ(num_codebooks=8, num_codes=16)], most=2)


def test_a_report_has_a_row_per_kind_of_domains_and_number_of_books(report: Any) -> None:
    (found,) = report["tokenizers"]

    assert [(row["domains"], row["kind"], row["books"]) for row in found["rows"]] == [
        (domains, kind, books) for domains in ("seen", "unseen") for kind in ("speech", "music") for books in (2, 4, 8)
    ]
    assert all(row["clips"] == 2 for row in found["rows"])
    assert all(("stoi" in row) == (row["kind"] == "speech") for row in found["rows"])
    assert found["bits_per_second"] == 2000
    assert not found["ok"]


def test_more_books_keep_more_of_the_fit(report: Any) -> None:
    """Means over clips that are not of the fit, so each step alone may go either way; 2 to 8 books may not."""
    (found,) = report["tokenizers"]

    for at in range(0, len(found["rows"]), 3):
        two, _, eight = (row["mel"] for row in found["rows"][at : at + 3])
        assert eight < two


@pytest.mark.parametrize(
    ("stoi", "clips", "hop", "ok"),
    [(0.78, 100, 256, True), (0.779, 100, 256, False), (0.9, 99, 256, False), (0.83, 200, 160, False)],
)
def test_the_bounds_are_those_of_the_hop(stoi: float, clips: int, hop: int, ok: bool) -> None:
    row = {"domains": "seen", "kind": "speech", "books": 8, "clips": 250, "stoi": stoi, "stoi_clips": clips}

    assert audio_codec.meets({"hop": hop, "rows": [row, {**row, "books": 4, "stoi": 0.0}]}) is ok


def test_the_committed_file_holds_the_bounds_on_recorded_speech() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))

    assert report["source"] == "Recordings"
    assert report["gate"] == {"stoi": {"256": 0.78, "160": 0.84}, "clips": 100}
    found = {(one["tokenizer"], one["hop"]): one for one in report["tokenizers"]}
    assert set(found) == {("MelRVQ", 256), ("MelRVQ", 160), ("VocodedRVQ", 256)}
    for hop, least in ((256, 0.78), (160, 0.84)):
        one = found["MelRVQ", hop]
        (row,) = (r for r in one["rows"] if (r["domains"], r["kind"], r["books"]) == ("seen", "speech", 8))
        assert row["stoi"] >= least
        assert row.get("stoi_clips", row["clips"]) >= 100
        assert one["ok"]
        assert one["file_kb"] < 1000
        assert one["fit_cpu_s"] < 60


def test_the_readme_has_the_committed_numbers() -> None:
    lines = Path("tasks/audio/README.md").read_text(encoding="utf-8").splitlines()
    for one in json.loads(RESULTS.read_text(encoding="utf-8"))["tokenizers"]:
        for books in (4, 8):
            speech, music = (
                next(row for row in one["rows"] if (row["domains"], row["kind"], row["books"]) == ("seen", kind, books))
                for kind in ("speech", "music")
            )
            scores = [speech["stoi"], speech["pesq"], speech["mel"], music["mel"]]
            start = f"| `{one['tokenizer']}` | {8000 / one['hop']:g} | {books} |"
            assert f"{start} {' | '.join(f'{score:.2f}' for score in scores)} |" in lines
            assert speech["clips"] == 250
