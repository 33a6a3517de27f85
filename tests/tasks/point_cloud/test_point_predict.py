# SPDX-License-Identifier: Apache-2.0
"""``predict`` from an empty start: a user's own files come back whole, in their own frame, with class and expert."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from readers_common import OWN_NAMES, random_scan

from moeapps.cli import main
from moeapps.commands.run import run
from tasks.point_cloud.data.public import to_arrays
from tasks.point_cloud.data.readers import OwnLabels, RawScan, read_ply, write_own_labels, write_own_scan
from tasks.point_cloud.data.readers.las import read_las
from tasks.point_cloud.data.sources import LasFiles
from tasks.point_cloud.report.predictions import PointPrediction, class_colors, name_color
from tasks.point_cloud.report.scan_writer import ScanWriter, class_list, joined, write_whole

pytestmark = pytest.mark.medium

CONFIGS = Path(__file__).parents[3] / "configs"
MAP = (691_000.0, 5_336_000.0, 500.0)
UNIT = 0.5
TINY = [
    *("--config", str(CONFIGS / "point_moe.yaml"), "--config", str(CONFIGS / "debug" / "tiny.yaml")),
    *("--config", str(CONFIGS / "debug" / "point_moe.yaml"), "--trainer.callbacks", "null"),
    *("--data.init_args.seen=[cad_room]", "--data.init_args.validation=[als]", "--data.init_args.unseen=[]"),
    *("--model.init_args.net.init_args.enc_depths=[1,1]", "--model.init_args.net.init_args.enc_dims=[16,16]"),
    *("--model.init_args.net.init_args.dec_depths=[1]", "--model.init_args.net.init_args.dec_dims=[16]"),
    *("--test_after_fit", "false", "--trainer.limit_train_batches", "1", "--trainer.enable_checkpointing", "true"),
]


def own_scan(rows: int, seed: int, *, far: bool = False, labelled: bool = False) -> RawScan:
    rng = np.random.default_rng(seed)
    scan = random_scan(OWN_NAMES, rows, seed=seed, labelled=labelled)
    xyz = (rng.integers(0, 6000, (rows, 3)) / (250, 300, 1500)).astype(np.float32)
    return replace(scan, xyz=xyz, origin=MAP if far else (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run folder of a network that has made one step; nothing may be written there, see ``copied``."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEAPPS_RUNS", str(root / "runs"))
        assert main(["fit", *TINY, "--data.init_args.cache_dir", str(root / "cache")]) == 0
        yield root / "runs" / "point_moe" / "base" / "version_0"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "point_moe" / "base" / "version_0"))


SCANS = {
    "a.ply": own_scan(700, 1, far=True),
    "b.las": own_scan(650, 2, far=True),
    "c.npy": own_scan(500, 3),
    "d.npz": own_scan(400, 4, labelled=True),
    "one.ply": own_scan(1, 5),
}


def own_folder(root: Path, scans: dict[str, RawScan], limit: str = "1.0") -> list[str]:
    """Write scans as test/ of the domain ``yard`` and return the flags that find them."""
    write_own_labels(root / "yard" / "labels.yaml", OwnLabels(OWN_NAMES, unit=UNIT))
    for name, scan in scans.items():
        write_own_scan(root / "yard" / "test" / name, scan)
    return [
        *("--config", str(CONFIGS / "data" / "own_scans.yaml"), "--trainer.limit_predict_batches", limit),
        *("--data.init_args.own.yard.init_args.reader.init_args.root", str(root)),
        *("--data.init_args.cache_dir", str(root / "cache")),
    ]


def test_own_scans_come_back_whole_in_their_own_frame(copied: Path, tmp_path: Path) -> None:
    assert main(["predict", "--run", str(copied), *own_folder(tmp_path / "own", SCANS)]) == 0

    place = copied / "predictions"
    assert [path.name for path in place.iterdir()] == ["yard"]  # no other domain was answered,
    assert not list((tmp_path / "own" / "cache").rglob("*.npz"))  # nor were its scans made
    assert sorted(path.name for path in (place / "yard").iterdir()) == sorted(
        ["classes.csv", *(f"{Path(name).stem}.{end}" for name in SCANS for end in ("ply", "las", "classes.txt"))]
    )
    with (place / "yard" / "classes.csv").open() as lines:
        listed = {int(row["id"]): row for row in csv.DictReader(lines)}
    palette = {i: tuple(int(row[key]) for key in ("red", "green", "blue")) for i, row in listed.items()}
    assert {i: row["name"] for i, row in listed.items()} == {**dict(enumerate(OWN_NAMES)), 255: "none"}
    assert [palette[i] for i in range(3)] == [name_color(name) for name in OWN_NAMES]
    for name, scan in SCANS.items():
        ply, las = (place / "yard" / f"{Path(name).stem}.{end}" for end in ("ply", "las"))
        vertex, cloud = read_ply(ply).vertex, read_las(las)
        expected = scan.world_xyz() * UNIT  # metres, in the order of the file
        written = np.stack([vertex[axis] for axis in "xyz"], axis=1)
        assert len(written) == len(cloud) == len(scan)
        np.testing.assert_allclose(written, expected, rtol=0, atol=1e-3)
        np.testing.assert_allclose(cloud.pos, expected, rtol=0, atol=1e-3)
        label, expert = vertex["class"].astype(int), vertex["expert"].astype(int)
        assert set(label) <= set(range(3))
        assert set(expert) <= set(range(4))
        color = np.stack([vertex[key] for key in ("red", "green", "blue")], axis=1)
        assert [tuple(row) for row in color.tolist()] == [palette[i] for i in label.tolist()]
        assert cloud.rgb is not None
        np.testing.assert_array_equal(cloud.rgb // 257, color)
        np.testing.assert_array_equal(cloud.column("class"), label)
        np.testing.assert_array_equal(cloud.classification, label)
        np.testing.assert_array_equal(cloud.column("expert"), expert)


def test_answers_are_those_of_the_network_at_the_rows_of_the_file(copied: Path, tmp_path: Path) -> None:
    words = ["predict", "--run", str(copied), *own_folder(tmp_path / "own", {"a.ply": SCANS["a.ply"]})]
    cli = run(words)

    vertex = read_ply(copied / "predictions" / "yard" / "a.ply").vertex
    dataset = cli.datamodule.get_dataset("yard", "test")
    assert len(dataset) > 1  # tiles
    for tile in dataset:
        (answer,) = cli.model.eval().predict_step(cli.datamodule.collate([tile]))
        rows = tile.raw_row.numpy()
        np.testing.assert_array_equal(vertex["class"][rows], answer["label"])
        np.testing.assert_array_equal(vertex["expert"][rows], answer["expert"])
        assert answer["scan_points"] == 700
    assert not cli.trainer.predict_loop.predictions  # an answer is dropped once it is written


def test_simulated_scans_are_written_in_their_own_frame(copied: Path) -> None:
    words = [
        "predict",
        "--run",
        str(copied),
        "--trainer.limit_predict_batches",
        "1.0",
        "--data.init_args.test_scenes=2",
    ]
    cli = run([*words, "--data.init_args.max_voxels=2000"])

    scans = cli.datamodule.scans("cad_room", "test")
    folder = copied / "predictions" / "cad_room"
    assert {path.stem for path in folder.glob("*.ply")} == {path.stem for path in folder.glob("*.las")}
    for scan in scans:
        vertex = read_ply(folder / f"{scan.name}.ply").vertex
        np.testing.assert_array_equal(np.stack([vertex[axis] for axis in "xyz"], axis=1), scan.pos)


def test_a_scan_that_is_cut_short_by_a_limit_says_so(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = own_folder(tmp_path / "own", {"a.ply": SCANS["a.ply"]}, limit="1")
    tiles = [
        "--data.init_args.eval_batch_size=1",
        "--data.init_args.max_voxels=200",
    ]
    with caplog.at_level(logging.WARNING, "moeapps"):
        assert main(["predict", "--run", str(copied), *flags, *tiles]) == 0

    vertex = read_ply(copied / "predictions" / "yard" / "a.ply").vertex
    assert 0 < len(vertex["x"]) < 700
    assert f"scan a of yard: {len(vertex['x'])} of its 700 points" in caplog.text


def test_formats_are_chosen_by_a_callback_of_the_configuration(copied: Path, tmp_path: Path) -> None:
    flags = own_folder(tmp_path / "own", {"c.npy": SCANS["c.npy"]})
    chosen = [
        "--trainer.callbacks",
        "tasks.point_cloud.report.scan_writer.ScanWriter",
        "--trainer.callbacks.formats",
        "[las]",
    ]
    assert main(["predict", "--run", str(copied), *flags, *chosen]) == 0

    assert {path.name for path in (copied / "predictions" / "yard").iterdir()} == {
        *("c.las", "c.classes.txt", "classes.csv")
    }


def test_scans_of_an_earlier_predict_do_not_stay_and_what_a_user_saved_there_does(copied: Path, tmp_path: Path) -> None:
    both = own_folder(tmp_path / "both", {name: SCANS[name] for name in ("c.npy", "d.npz")})
    assert main(["predict", "--run", str(copied), *both]) == 0
    place = copied / "predictions" / "yard"
    edited = {"edited.ply": b"ply\nformat ascii 1.0\nend_header\n", "edited.las": b"LASF", "notes.txt": b"seen"}
    for name, content in edited.items():
        (place / name).write_bytes(content)
    assert main(["predict", "--run", str(copied), *own_folder(tmp_path / "one", {"c.npy": SCANS["c.npy"]})]) == 0

    assert {path.name for path in place.iterdir()} == {
        *("classes.csv", "c.ply", "c.las", "c.classes.txt"),
        *edited,
    }


def test_predictions_are_independent_of_the_batch_size(copied: Path, tmp_path: Path) -> None:
    flags = own_folder(tmp_path / "own", {"a.ply": SCANS["a.ply"], "d.npz": SCANS["d.npz"]})
    files = []
    for size in ("1", "4"):
        assert main(["predict", "--run", str(copied), *flags, "--data.init_args.eval_batch_size", size]) == 0
        files.append([(copied / "predictions" / "yard" / name).read_bytes() for name in ("a.ply", "d.ply")])

    assert files[0] == files[1]


def test_domains_to_predict_must_be_configured(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--run", str(trained), "--data.init_args.predict=[garden]"]) == 2

    assert "cad_room" in capsys.readouterr().err


def tile(rows: list[int], name: str = "s", **changes: Any) -> dict[str, Any]:
    row = torch.tensor(rows)
    answer = {"domain": "yard", "name": name, "names": list(OWN_NAMES), "scan_points": 6, "raw_row": row}
    answer |= {"xyz": row.double()[:, None].repeat(1, 3), "label": row % 3, "expert": row % 4}
    return {**answer, **changes}


def test_joined_tiles_are_in_the_order_of_the_scan() -> None:
    prediction, points = joined([tile([4, 1, 5]), tile([0, 3, 2])])

    assert points == 6
    np.testing.assert_array_equal(prediction.xyz[:, 0], range(6))
    np.testing.assert_array_equal(prediction.label, np.arange(6) % 3)
    np.testing.assert_array_equal(prediction.expert, np.arange(6) % 4)
    assert joined([tile([0], expert=None)])[0].expert is None


def test_two_scans_of_one_name_are_not_joined() -> None:
    with pytest.raises(ValueError, match="two scans called 's'"):
        joined([tile([0, 1]), tile([1, 2])])


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction = PointPrediction(np.zeros((2, 3)), np.array([0, 1]), OWN_NAMES)
    write_whole(tmp_path / "a.las", prediction)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = Path.write_bytes

    def interrupted(self: Path, data: bytes) -> int:
        written(self, data[: len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    for name in ("a.las", "b.ply"):
        with pytest.raises(OSError, match="disk full"):
            write_whole(tmp_path / name, prediction)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert before.keys() == {"a.las", "a.classes.txt"}


def test_scans_in_folders_keep_them(tmp_path: Path) -> None:
    write_whole(tmp_path / "Area_5" / "office_1.ply", PointPrediction(np.zeros((1, 3)), np.array([0]), OWN_NAMES))

    assert (tmp_path / "Area_5" / "office_1.ply").is_file()


def test_the_class_list_quotes_names() -> None:
    rows = list(csv.reader(class_list(('a "b", c', "d")).splitlines()))

    assert rows[1][:2] == ["0", 'a "b", c']
    assert rows[-1] == ["255", "none", *map(str, class_colors(())[-1])]


@pytest.mark.parametrize("formats", [[], ["laz"], ["ply", "obj"]])
def test_formats_that_cannot_be_written_are_refused(formats: list[Any]) -> None:
    with pytest.raises(ValueError, match="ply and las"):
        ScanWriter(formats)


def test_several_processes_are_refused(trained: Path) -> None:
    trainer = Mock(world_size=2)

    with pytest.raises(ValueError, match="devices 1"):
        ScanWriter().setup(trainer, Mock(), "predict")
    ScanWriter().setup(trainer, Mock(), "fit")


@pytest.mark.parametrize("far", [False, True])
def test_the_origin_of_a_scan_leads_back_to_its_file(far: bool, tmp_path: Path) -> None:
    scan = own_scan(50, 0, far=far)
    arrays = to_arrays(scan, "a", 0.25)
    np.testing.assert_allclose(arrays.pos + np.array(arrays.origin), scan.world_xyz(), rtol=0, atol=1e-6)

    write_own_scan(tmp_path / "a.las", scan)
    source = LasFiles(classes={0: "ground"}, test=["a.las"], root=tmp_path, unit=UNIT, max_points=20)
    parts = source.scans("test", None)
    assert len(parts) == 3
    back = np.concatenate([part.pos + np.array(part.origin) for part in parts])
    expected = scan.world_xyz() * UNIT
    np.testing.assert_allclose(back[np.lexsort(back.T)], expected[np.lexsort(expected.T)], rtol=0, atol=1e-3)
