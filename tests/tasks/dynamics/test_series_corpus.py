# SPDX-License-Identifier: Apache-2.0
"""Every sample file of series in the aeon wheel is read with its published shape, or told with its line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeapps.data.archives import ArchiveError, fetch_package
from moeapps.data.cache import cache_dir
from tasks.dynamics.data.readers.arff_format import read_arff
from tasks.dynamics.data.readers.csv_format import read_csv
from tasks.dynamics.data.readers.ts_format import SeriesFormatError, read_ts
from tasks.dynamics.packages import AEON

DATA = "aeon/datasets/data"
SAMPLES = replace(AEON, members=tuple(f"{DATA}/*.{ending}" for ending in ("ts", "arff", "tsv", "csv")))
"""Every table of series in the wheel, in a folder of their own."""

# Sizes of the sets as the UCR, UEA and TSER archives list them: training and test series, channels, least and most
# samples, classes (0: regression).
PUBLISHED = {
    "ACSF1": (100, 100, 1, 1460, 1460, 10),
    "ArrowHead": (36, 175, 1, 251, 251, 3),
    "BasicMotions": (40, 40, 6, 100, 100, 4),
    "CardanoSentiment": (74, 33, 2, 24, 24, 0),
    "Covid3Month": (140, 61, 1, 84, 84, 0),
    "GunPoint": (50, 150, 1, 150, 150, 2),
    "ItalyPowerDemand": (67, 1029, 1, 24, 24, 2),
    "JapaneseVowels": (270, 370, 12, 7, 29, 9),
    "OSULeaf": (200, 242, 1, 427, 427, 6),
    "PickupGestureWiimoteZ": (50, 50, 1, 29, 361, 10),
}


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return fetch_package(SAMPLES, root=cache_dir("samples")) / DATA
    except ArchiveError as error:
        pytest.skip(f"the aeon wheel cannot be fetched here: {error}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_ts_files_have_the_published_sizes(folder: Path, name: str) -> None:
    train, test, channels, least, most, classes = PUBLISHED[name]
    found = [read_ts(folder / name / f"{name}_{part}.ts") for part in ("TRAIN", "TEST")]
    series = [x for part in found for x in part.series]
    lengths = [int(np.isfinite(x).all(axis=1).sum()) for x in series]

    assert [len(part.series) for part in found] == [train, test]
    assert {x.shape[1] for x in series} == {channels}
    assert (min(lengths), max(lengths)) == (least, most)
    assert len({label for part in found for label in part.labels or []}) == classes
    assert all((part.targets is None) == (classes > 0) for part in found)


def test_every_ts_file_is_read_but_that_with_time_stamps(folder: Path) -> None:
    told = []
    for path in sorted(folder.rglob("*.ts")):
        try:
            assert read_ts(path).series, path.name
        except SeriesFormatError as error:
            told.append(str(error))

    assert told == ["UnitTest/UnitTestTimeStamps_TRAIN.ts has time stamps, which are not read; resample it to a grid"]


@pytest.mark.parametrize("name", ["ArrowHead", "BasicMotions", "GunPoint"])
def test_arff_and_ts_files_hold_the_same_series(folder: Path, name: str) -> None:
    stem = folder / name / f"{name}_TRAIN"
    one, other = read_arff(stem.with_suffix(".arff")), read_ts(stem.with_suffix(".ts"))

    assert one.labels is not None
    assert other.labels is not None
    assert [label.lower() for label in one.labels] == [label.lower() for label in other.labels]
    for a, b in zip(one.series, other.series, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ArrowHead", "GunPoint"])
def test_ts_and_tab_separated_files_hold_the_same_series(folder: Path, name: str) -> None:
    """numpy reads the latter: the label, then the samples."""
    table = np.loadtxt(folder / name / f"{name}_TRAIN.tsv")
    found = read_ts(folder / name / f"{name}_TRAIN.ts")

    np.testing.assert_allclose(np.stack([x[:, 0] for x in found.series]), table[:, 1:], rtol=1e-5, atol=1e-6)
    assert [float(label) for label in found.labels or []] == table[:, 0].tolist()


CSV = {  # rows, channels and step in seconds
    "135_UCR_Anomaly_InternalBleeding16_TEST": (7501, 2, 1.0),
    "135_UCR_Anomaly_InternalBleeding16_TRAIN": (1200, 2, 1.0),
    "Longley": (16, 8, 1.0),
    "Lynx": (114, 1, 1.0),  # an index of years without a name
    "ecg-diff-count-3_TEST": (10000, 2, 1.0),
    "ecg-diff-count-3_TRAIN_A": (10000, 2, 1.0),
    "ecg-diff-count-3_TRAIN_NA": (10000, 2, 1.0),
    "solar": (289, 1, 1800.0),  # dates with a zone, every half hour
}
TOLD = {
    "Airline": "line 2: '1949-01' is neither seconds nor a date",
    "ShampooSales": "line 2: '1991-01' is neither seconds nor a date",
    "PBS_dataset": "line 2: '1991 Jul' is not a number",
    "Uschange": "line 2: '1970 Q1' is not a number",
    "S06R02E0": "line 3: column 'timestamp' is taken for the time and is not evenly spaced",
    "ElectricDevices": "line 1: 1, -0.187086 holds numbers where names",
    "GunPoint": "line 1: 1, -0.780473 holds numbers where names",
}


def test_every_csv_file_is_read_or_told_with_its_line(folder: Path) -> None:
    found: dict[str, Any] = {}
    for path in folder.rglob("*.csv"):
        try:
            file = read_csv(path)
        except SeriesFormatError as error:
            found[path.stem] = str(error)
        else:
            (series,) = file.series
            found[path.stem] = (*series.shape, file.dt)
            wanted = np.genfromtxt(path, delimiter=",", skip_header=1)[:, -series.shape[1] :]
            np.testing.assert_array_equal(series, wanted)

    told = {stem: found.pop(stem) for stem in TOLD}
    assert found == CSV
    assert [stem for stem in TOLD if TOLD[stem] not in told[stem]] == []
