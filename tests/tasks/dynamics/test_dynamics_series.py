# SPDX-License-Identifier: Apache-2.0
"""Series in .ts and CSV files as environments: files round-trip, ends are held out, bad input is named."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from series_files import write_csv, write_ts

from moeapps.cli import main
from tasks.dynamics.data.readers.arff_format import read_arff
from tasks.dynamics.data.readers.csv_format import read_csv
from tasks.dynamics.data.readers.ts_format import SeriesFormatError, read_ts
from tasks.dynamics.data.series import CsvSeries, TsFiles
from tasks.dynamics.datamodule import DynamicsData
from tasks.dynamics.packages import PACKAGES

RNG = np.random.default_rng(0)


def waves(count: int, num_samples: int = 40, channels: int = 2) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    return [RNG.normal(size=(num_samples, channels)).cumsum(0) for _ in range(count)]


# --- .ts --------------------------------------------------------------------------------------------------------------


def test_ts_round_trip_with_gaps_and_unequal_lengths(tmp_path: Path) -> None:
    series = [*waves(2, 12), *waves(1, 7)]
    series[1][3, 1] = np.nan
    write_ts(tmp_path / "a.ts", series, ["run", "sit", "run"])
    found = read_ts(tmp_path / "a.ts")

    assert found.labels == ["run", "sit", "run"]
    for got, wanted in zip(found.series, series, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_ts_of_the_archives_has_comments_and_a_label_at_the_end(tmp_path: Path) -> None:
    text = "#told by hand\n@problemName X\n@timeStamps false\n@univariate false\n@classLabel true A B\n@data\n"
    (tmp_path / "a.ts").write_text(text + "1,2,3:4,?,6:B\n% a remark\n7,8,9:1e1,11,NaN:A\n")
    found = read_ts(tmp_path / "a.ts")

    np.testing.assert_array_equal(found.series[0], [[1, 4], [2, np.nan], [3, 6]])
    np.testing.assert_array_equal(found.series[1], [[7, 10], [8, 11], [9, np.nan]])
    assert found.labels == ["B", "A"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("@classLabel true A\n@data\n1,2:3:A\n", r"line 3: channels have \[1, 2\] values"),
        ("@classLabel true A\n@data\n1,2:B\n", "line 3: label 'B' is none of A"),
        ("@classLabel true A\n@data\n1,zwei:A\n", "line 3: could not convert"),
        ("@timeStamps true\n@data\n(0,1),(1,2)\n", "time stamps"),
        ("@classLabel false\n@data\n1,2\n1,2:3,4\n", r"\[1, 2\] channels"),
        ("@classLabel true A\n", "no series"),
    ],
)
def test_damaged_ts_is_named(tmp_path: Path, data: str, text: str) -> None:
    (tmp_path / "a.ts").write_text(data)

    with pytest.raises(SeriesFormatError, match=text):
        read_ts(tmp_path / "a.ts")


def ts_source(tmp_path: Path, **change: Any) -> TsFiles:
    labels = ["Run", "Sit"] * 3
    for name, offset in (("TRAIN", 0.0), ("TEST", 100.0)):
        write_ts(tmp_path / f"{name}.ts", [w + offset for w in waves(6)], labels)
    options: dict[str, Any] = {"val_steps": 5, "test_steps": 10, "dt": 0.1} | change
    return TsFiles(root=tmp_path, train_file="TRAIN.ts", test_file="TEST.ts", **options)


def test_classes_are_domains_and_new_recordings_are_two_halves(tmp_path: Path) -> None:
    data = DynamicsData(source=ts_source(tmp_path))
    batch = next(iter(data.train_dataloader()))

    assert data.roles == {"seen": ["run", "sit"], "validation": ["new_for_choices"], "unseen": ["new"]}
    assert batch.x.shape == (6, 1, 25, 2)
    assert batch.dt.tolist() == pytest.approx([0.1] * 6)
    assert sorted(batch.family.tolist()) == [0, 0, 0, 1, 1, 1]
    names = [data.source.environments(d, data.roles["seen"]) for d in ("new_for_choices", "new")]
    assert sorted(names[0] + names[1]) == [f"TEST-{i}" for i in range(6)]
    assert data.facts["kind"] == "sequence"
    assert data.facts["num_steps"] == 25


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text("aA-+. 1_\u732b\u72ac", min_size=1, max_size=4), min_size=2, max_size=5))
def test_each_class_is_a_domain_of_its_own_or_two_are_told(words: list[str]) -> None:
    classes = [word.replace(" ", "") or "x" for word in words]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("TRAIN.ts", "TEST.ts"):
            write_ts(Path(folder) / name, [np.arange(12.0)[:, None]] * len(classes), classes)
        source = TsFiles(root=Path(folder), train_file="TRAIN.ts", test_file="TEST.ts", val_steps=2, test_steps=2)
        told, sizes = "", sorted(classes.count(word) for word in set(classes))
        try:
            sizes = sorted(len(source.read(domain).names) for domain in source.default_seen)
        except SeriesFormatError as error:
            told = str(error)

    assert sizes == sorted(classes.count(word) for word in set(classes))
    assert not told or sum(repr(word) in told for word in set(classes)) >= 2


@pytest.mark.parametrize("label", ["new", "new_for_choices", "-1", "1"])
def test_classes_that_people_number_or_call_new_are_domains(label: str, tmp_path: Path) -> None:
    for name, count in (("TRAIN.ts", 3), ("TEST.ts", 4)):
        write_ts(tmp_path / name, [np.arange(12.0)[:, None]] * count, [label, *["+1"] * (count - 2), label])
    source = TsFiles(root=tmp_path, train_file="TRAIN.ts", test_file="TEST.ts", val_steps=2, test_steps=2)
    if label == "1":
        with pytest.raises(SeriesFormatError, match=r"classes '1' and '\+1' would both be the domain 'class_1'"):
            source.read("class_1")
        return

    assert [len(source.read(domain).names) for domain in source.default_seen] == [2, 1]
    assert len(source.read("new").names) == len(source.read("new_for_choices").names) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_archives_in_any_encoding_are_read(encoding: str, tmp_path: Path) -> None:
    text = "@classLabel true \u00e4 b\n@data\n1,2:\u00e4\n3,4:b\n"
    (tmp_path / "a.ts").write_bytes(text.encode(encoding))
    (tmp_path / "a.arff").write_bytes("% \u00e4\n@relation x\n@attribute a numeric\n@data\n1\n".encode(encoding))

    assert read_ts(tmp_path / "a.ts").labels == ["\u00e4", "b"]
    assert len(read_arff(tmp_path / "a.arff").series) == 1


def test_the_end_of_a_recording_is_held_out_and_only_the_past_is_given(tmp_path: Path) -> None:
    data = DynamicsData(source=ts_source(tmp_path))
    train, val, test = (data.trajectories("run", split) for split in ("train", "val", "test"))  # type: ignore[arg-type]

    assert [part.x.shape[2] for part in (train, val, test)] == [25, 30, 40]
    assert (val.num_given, test.num_given) == (25, 30)
    torch.testing.assert_close(test.x[:, :, :25], train.x)
    torch.testing.assert_close(test.x[:, :, :30], val.x)
    torch.testing.assert_close(test.scale, train.scale)

    new = data.trajectories("new", "test")
    assert (new.num_support, new.num_given) == (1, 30)
    assert new.support.mask is not None
    assert new.support.mask[0, 0].tolist() == [True] * 30 + [False] * 10
    assert (new.support.x[:, :, 30:] == 0).all()
    torch.testing.assert_close(new.support.x[:, :, :30], new.query.x[:, :, :30])
    assert new.query.mask is not None
    assert new.query.mask.all()


def test_standardisation_uses_the_training_part_of_seen_domains_alone(tmp_path: Path) -> None:
    data = DynamicsData(source=ts_source(tmp_path))
    x = torch.cat([data.trajectories(name, "train").x for name in ("run", "sit")]).flatten(0, 2)

    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)
    assert float(data.trajectories("new", "test").query.x.mean()) > 10  # the shift of new recordings stays


def test_one_class_can_be_the_unseen_family(tmp_path: Path) -> None:
    data = DynamicsData(source=ts_source(tmp_path), seen=["run"], validation=["new_for_choices"], unseen=["sit"])

    assert data.facts["num_environments"] == 3
    assert data.facts["families"] == ["run", "sit"]
    assert data.trajectories("sit", "test").env.tolist() == [-1] * 3


@pytest.mark.parametrize(("unequal", "lengths"), [("cut", 30), ("mask", 40)])
def test_unequal_lengths_are_cut_or_masked_or_an_error(tmp_path: Path, unequal: str, lengths: int) -> None:
    source = ts_source(tmp_path)
    series = [*waves(5), *waves(1, 30)]
    write_ts(tmp_path / "TRAIN.ts", series, ["Run", "Sit"] * 3)
    with pytest.raises(SeriesFormatError, match=r"TRAIN-5 has 30 samples, TRAIN-0 40; set unequal: cut"):
        DynamicsData(source=source)

    data = DynamicsData(source=ts_source_again(tmp_path, unequal=unequal))
    whole = data.trajectories("sit", "test")
    assert whole.x.shape[2] == lengths
    short = next(i for i, e in enumerate(whole.env.tolist()) if data.facts["environments"][e] == "TRAIN-5")
    if unequal == "mask":
        assert whole.mask is not None
        assert whole.mask[short, 0].tolist() == [True] * 30 + [False] * 10


def ts_source_again(tmp_path: Path, **change: Any) -> TsFiles:
    return TsFiles(root=tmp_path, train_file="TRAIN.ts", test_file="TEST.ts", val_steps=5, test_steps=10, **change)


def test_a_missing_value_is_an_error_or_a_masked_sample(tmp_path: Path) -> None:
    ts_source(tmp_path)
    series = waves(6)
    series[2][4, 1] = np.nan
    write_ts(tmp_path / "TRAIN.ts", series, ["Run", "Sit"] * 3)
    with pytest.raises(SeriesFormatError, match=r"TRAIN-2 misses a value at sample 4 \(1 samples in all\)"):
        DynamicsData(source=ts_source_again(tmp_path))

    batch = next(iter(DynamicsData(source=ts_source_again(tmp_path, missing="mask")).train_dataloader()))
    assert batch.mask is not None
    assert int((~batch.mask).sum()) == 1
    assert batch.x.isfinite().all()
    assert batch.scale.isfinite().all()


def test_series_shorter_than_what_is_held_out_are_named(tmp_path: Path) -> None:
    with pytest.raises(SeriesFormatError, match="series of 40 samples; val_steps=5 and test_steps=34"):
        DynamicsData(source=ts_source(tmp_path, test_steps=34))


def test_a_missing_file_says_what_to_correct(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="correct root or the file name"):
        DynamicsData(source=TsFiles(root=tmp_path, train_file="no.ts", test_file="no.ts"))
    with pytest.raises(ValueError, match="unknown package 'neon'; listed: aeon"):
        TsFiles(package="neon", train_file="no.ts", test_file="no.ts")


def test_package_is_listed_with_its_terms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out

    assert "aeon 1.6.0" in shown
    assert "state no licence" in shown
    overlay = Path(PACKAGES[0].used_by[0])
    source = yaml.safe_load(overlay.read_text())["data"]["init_args"]["source"]["init_args"]
    assert {source["train_file"], source["test_file"]} <= set(PACKAGES[0].members)


# --- CSV --------------------------------------------------------------------------------------------------------------


def own_series(root: Path, environments: int = 2, num_samples: int = 40) -> None:
    for domain in ("a", "b", "c"):
        for e in range(environments):
            write_csv(root / domain / f"run{e}.csv", np.stack(waves(3, num_samples)), ["u", "v"], dt=0.25)


def test_csv_round_trip(tmp_path: Path) -> None:
    x = np.stack(waves(3))
    x[1, 5, 0] = np.nan
    write_csv(tmp_path / "a.csv", x, ["u", "v"], dt=0.25)
    found = read_csv(tmp_path / "a.csv")

    np.testing.assert_array_equal(np.stack(found.series), x)
    assert found.channels == ("u", "v")
    assert found.dt == pytest.approx(0.25)


def test_own_series_as_initial_value_problems(tmp_path: Path) -> None:
    own_series(tmp_path)
    source = CsvSeries(root=tmp_path, seen=["a", "b"], unseen=["c"], val_steps=5, test_steps=10, kind="field")
    data = DynamicsData(source=source)
    train, test = data.trajectories("a", "train"), data.trajectories("a", "test")

    assert train.x.shape == (2, 3, 25, 2)
    assert test.x.shape == (2, 3, 11, 2)  # the last known sample, then the ten that are held out
    assert test.num_given == 1
    assert train.dt.tolist() == [0.25] * 2
    assert data.facts["families"] == ["a", "b"]
    new = data.trajectories("c", "test")
    assert (new.num_support, new.family.tolist()) == (3, [-1, -1])
    torch.testing.assert_close(new.query.x[:, :, 0], new.support.x[:, :, 29])
    assert new.mask is not None
    assert new.query.mask is not None
    assert new.query.mask[0, 0].tolist() == [True] * 11 + [False] * 19


def test_a_gap_at_an_initial_condition_is_an_error_for_vector_fields(tmp_path: Path) -> None:
    x = np.stack(waves(2))
    x[0, 29, 1] = np.nan  # the last sample before the test
    write_csv(tmp_path / "a" / "run.csv", x, ["u", "v"], dt=1.0)
    options: dict[str, Any] = {"root": tmp_path, "seen": ["a"], "val_steps": 5, "test_steps": 10, "missing": "mask"}
    data = DynamicsData(source=CsvSeries(kind="field", **options))

    with pytest.raises(ValueError, match="trajectory 0 of environment 'run' has no first sample"):
        data.trajectories("a", "test")
    assert DynamicsData(source=CsvSeries(kind="sequence", **options)).trajectories("a", "test").mask is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("u,v\n1,2\n3\n", "line 3: 1 cells, but 2 columns"),
        ("u,v\n1,2\n3,x\n", "line 3: 'x' is not a number"),
        ("u,v\n1,2\n3,inf\n", "line 3: infinite"),
        ("time,u\n0,1\n1,2\n3,3\n", "not evenly spaced"),
        ("time,u\n1,1\n0,2\n", "not evenly spaced and rising"),
        ("time,u\n0,1\n", "at least two samples"),
        ("time,u\n,1\n1,2\n", "not evenly spaced"),
        ("time,trajectory\n0,1\n", "no channel"),
        ("u,u\n0,1\n", "two columns share a name"),
        ("u,v\n", "at least one row"),
    ],
)
def test_damaged_csv_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)

    with pytest.raises(SeriesFormatError, match=message):
        read_csv(tmp_path / "a.csv")


def test_files_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    own_series(tmp_path)
    with pytest.raises(ValueError, match="lay one file per environment"):
        DynamicsData(source=CsvSeries(root=tmp_path, seen=["z"]))
    write_csv(tmp_path / "a" / "run1.csv", np.stack(waves(2)), ["u", "v"], dt=0.25)
    with pytest.raises(SeriesFormatError, match="2 trajectories"):
        DynamicsData(source=CsvSeries(root=tmp_path, seen=["a"], val_steps=5, test_steps=10))
    write_csv(tmp_path / "b" / "run1.csv", np.stack(waves(3)), ["u", "w"], dt=0.25)
    with pytest.raises(SeriesFormatError, match="channels"):
        DynamicsData(source=CsvSeries(root=tmp_path, seen=["b"], val_steps=5, test_steps=10))
    write_csv(tmp_path / "c" / "run1.csv", np.stack(waves(3)), ["u", "v"], dt=0.5)
    with pytest.raises(SeriesFormatError, match="a domain needs one"):
        DynamicsData(source=CsvSeries(root=tmp_path, seen=["c"], val_steps=5, test_steps=10))
