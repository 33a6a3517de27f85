# SPDX-License-Identifier: Apache-2.0
"""Raw inputs of a trained run are taken for the numbers that they are, or told: no fraction is cut, nothing is cast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeapps.data.numbers import real_numbers, whole_numbers
from tasks.adaptation.data.inputs import images_of
from tasks.audio.data.readers.audio_files import wave_of
from tasks.dynamics.data.inputs import environment_of
from tasks.recommendation.data.batch import Schema
from tasks.recommendation.data.inputs import interactions_of

SCHEMA = Schema(fields={"item": 9}, bags={"past": 9}, dense_dim=0, tasks=("click",), categories=("all",))
GOOD: dict[str, Any] = {"item": [1, 2], "past": [[1], [2, 3]]}
SERIES = np.random.default_rng(0).normal(size=(2, 5, 2))


def test_whole_numbers_stay_themselves_whatever_holds_them() -> None:
    for values in ([1, 2], [1.0, 2.0], np.array([1, 2], np.uint8), torch.tensor([1, 2]), np.array([1, 2], np.float16)):
        found = whole_numbers(values, "ids")
        assert found.dtype == np.int64
        assert found.tolist() == [1, 2]
    assert whole_numbers([], "ids").shape == (0,)


@pytest.mark.parametrize(
    "values",
    [[1, 2.5], [1, np.nan], [1, np.inf], [1, 2.0**60], np.array([2**63 + 1], np.uint64), [[1, 0.5]]],
)
def test_what_is_not_whole_is_told_with_its_place(values: Any) -> None:
    with pytest.raises(ValueError, match=r"^ids holds .* at .*; give whole numbers"):
        whole_numbers(values, "ids")


@pytest.mark.parametrize(
    "values", [["1"], [True, False], [1 + 2j], [None], [[1], [1, 2]], np.array(["2020-01-01"], "datetime64[s]"), None]
)
def test_what_is_no_real_number_is_told(values: Any) -> None:
    for read in (real_numbers, whole_numbers):
        with pytest.raises(ValueError, match=r"^ids is .*; give"):
            read(values, "ids")


def test_rows_of_the_right_kind_are_read() -> None:
    batch = interactions_of({**GOOD, "item": [1.0, 2.0], "past_weight": [[0.5], [1, 2]]}, SCHEMA)
    assert batch.ids.flatten().tolist() == [1, 2]
    assert batch.bags["past"][0].tolist() == [[1, 0], [2, 3]]
    assert batch.bags["past"][1].tolist() == [[0.5, 0], [1, 2]]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"item": [0.7, 1]}, "column 'item' holds 0.7 at 0"),
        ({"item": [np.nan, 1]}, "column 'item' holds nan at 0"),
        ({"item": [True, False]}, "column 'item' is of type bool"),
        ({"item": [[1], [2]]}, "item: no column of one number a row"),
        ({"item": 3}, "item: no column of one number a row"),
        ({"past": 3}, "no column of one number a row"),
        ({"past": [[1.5], [2]]}, r"column 'past' holds 1.5 at \(0, 0\)"),
        ({"past": [[[1]], [[2]]]}, "column 'past' holds rows of 2 dimensions"),
        ({"past_weight": [[1], [1]]}, "give each id a finite weight"),
        ({"past_weight": [[1], [np.nan, 1]]}, "give each id a finite weight"),
    ],
)
def test_rows_of_another_kind_are_told(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        interactions_of(GOOD | changed, SCHEMA)


def test_a_table_with_a_column_twice_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("item,past,item\n1,1,2\n")
    with pytest.raises(ValueError, match=r"a\.csv has two columns 'item'"):
        interactions_of(tmp_path / "a.csv", SCHEMA)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "infinite state": (lambda: observed(np.full((2, 5, 2), np.inf)), "hold infinity"),
    "state beyond float32": (lambda: observed(SERIES * 1e39), "hold infinity, or numbers that float32 cannot"),
    "complex state": (lambda: observed(SERIES + 1j), "is of type complex128"),
    "words for states": (lambda: observed([["a", "b"]]), "give real numbers"),
    "complex start": (lambda: observed(SERIES, start=SERIES[:, 0] + 1j), "start is of type complex128"),
    "pictures of 0 and 1": (lambda: images_of(np.ones((2, 1, 4, 4), np.int64), 4, 1), "images of torch.int64"),
    "masks": (lambda: images_of(np.ones((2, 1, 4, 4), bool), 4, 1), "images is of type bool"),
    "sound of 16 bits": (lambda: wave_of(np.array([0, 20000], np.int16)), r"int16 up to 2e\+04; give floats"),
    "sound of 8 bits": (lambda: wave_of(torch.tensor([128, 200], dtype=torch.uint8)), "uint8 up to 200; give floats"),
    "sound of another scale": (lambda: wave_of([0.0, 20000.0]), r"float64 up to 2e\+04; give floats"),
    "complex sound": (lambda: wave_of(np.ones(4) + 1j), "is of type complex128"),
}


def observed(values: Any, **options: Any) -> Any:
    return environment_of(values, 2, **{"dt": None, "start": None, "steps": None, **options})


@pytest.mark.parametrize("name", WRONG)
def test_inputs_of_another_kind_are_told(name: str) -> None:
    read, told = WRONG[name]
    with pytest.raises(ValueError, match=told):
        read()


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    """A folder that another system has copied holds a note beside each picture, of the same ending."""
    from PIL import Image

    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"a note")
    assert len(images_of(tmp_path, 4, 1)) == 1
