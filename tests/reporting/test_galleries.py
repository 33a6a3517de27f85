# SPDX-License-Identifier: Apache-2.0
"""What tests of tasks keep for a page comes back from the gallery as it was; what is no picture or sound is refused."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from moeapps.reporting.curves import MOST, read_curves
from moeapps.reporting.exhibits import arrays_of, picture_of, sound_of
from moeapps.reporting.page import cloud_data
from tasks.adaptation.report import gallery as adaptation
from tasks.adaptation.report.domains import write_changed
from tasks.dynamics.report import gallery as dynamics
from tasks.dynamics.report.figures import write_trajectories
from tasks.point_cloud.report import gallery as point_cloud
from tasks.point_cloud.report.figures import ScanPicture, write_scan
from tasks.recommendation.report import gallery as recommendation
from tests.reporting.made_runs import tone, write


def test_a_scan_keeps_labelled_points_evenly_and_no_more_than_allowed(tmp_path):
    count = 9000
    position = np.stack([np.arange(count), np.zeros(count), np.ones(count)], axis=1).astype(np.float64)
    truth = np.where(np.arange(count) % 3 == 0, -1, np.arange(count) % 2)
    scan = ScanPicture("north (seen)", position, truth, np.zeros(count, np.int64), ("wall", "floor"), None, "scan_7")
    write_scan(tmp_path / "gallery" / "north.npz", scan, most=500)
    kept, label = arrays_of(tmp_path / "gallery" / "north.npz", "position", "truth")
    assert len(kept) == 500
    assert (label >= 0).all()
    assert kept[0, 0] == 1
    assert kept[-1, 0] == 8999
    assert np.diff(kept[:, 0]).max() < 30  # of 12 on average
    (room,) = point_cloud.gallery(tmp_path)
    (cloud,) = room.exhibits
    assert [one.name for one in cloud.colourings] == ["truth", "prediction"]  # no expert worked
    assert cloud.caption == f"scan_7; {np.mean(label == 0):.0%} of these 500 points are right."


def test_points_come_back_from_their_sixteen_bits(tmp_path):
    rng = np.random.default_rng(1)
    position = rng.normal(size=(200, 3)) * (30, 20, 3) + (1000, -50, 2)
    zeros = np.zeros(200, np.int64)
    write_scan(tmp_path / "gallery" / "a.npz", ScanPicture("a", position, zeros, zeros, ("x",)))
    (room,) = point_cloud.gallery(tmp_path)
    packed = cloud_data(room.exhibits[0])
    import base64

    numbers = np.frombuffer(base64.b64decode(packed["position"]), "<u2").reshape(-1, 3)
    back = np.asarray(packed["low"]) + numbers * packed["step"]
    assert np.abs(back - position).max() < 0.002  # metres, of an extent over 100


def test_trajectories_come_back_up_to_where_they_explode(tmp_path):
    truth = np.arange(2 * 1 * 5 * 2, dtype=np.float64).reshape(2, 1, 5, 2)
    said = truth + 0.5
    said[0, 0, 3:] = np.nan
    write_trajectories(
        tmp_path / "gallery" / "swing.npz", "swing (seen)", truth, said, np.array([0.1, 0.2]), ["one", "two"], given=1
    )
    (room,) = dynamics.gallery(tmp_path)
    (plot,) = room.exhibits
    shown = {(trace["name"], trace["xaxis"]): trace for trace in plot.traces}
    assert shown["state 0, truth", "x"]["y"] == truth[0, 0, :, 0].tolist()
    assert shown["state 1, model", "x"]["y"] == said[0, 0, :3, 1].tolist()
    assert shown["state 1, model", "x2"]["x"] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])


def test_images_that_adaptation_changed_come_back_with_their_words(tmp_path):
    image = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    write_changed(
        tmp_path / "gallery" / "changed.npz",
        {"mended": [("clouds", image, 2, 0, 2)], "spoilt": [("noise", -image, 1, 1, 0)]},
        ["zero", "one", "two"],
    )
    mended, spoilt = adaptation.gallery(tmp_path)
    assert [room.title for room in (mended, spoilt)] == ["Mended images", "Spoilt images"]
    assert mended.exhibits[0].caption == "a two: zero, then two"
    assert spoilt.exhibits[0].title == "noise"
    pixels = np.asarray(Image.open(io.BytesIO(mended.exhibits[0].png)))
    assert pixels[..., 0].flatten().tolist() == [round(255 * k / 15) for k in range(16)]


def test_the_story_of_an_adaptation_is_attention_and_accuracy_of_unseen_domains():
    domains = {
        "a": {"role": "seen", "attention": [0.4, 0.6], "accuracy_before": 1.0, "accuracy": 1.0},
        "b": {"role": "unseen", "attention": [0.7, 0.3], "accuracy_before": 0.2, "accuracy": 0.6},
        "c": {"role": "unseen", "attention": [0.5, 0.5], "accuracy_before": 0.4, "accuracy": 0.9},
    }
    assert adaptation.adaptation_story(domains) == (
        "each gets 30 % to 70 % of the attention in any domain; adapting to what they say takes accuracy in unseen "
        "domains from 30 % to 75 %"
    )
    assert adaptation.adaptation_story({"a": {"role": "seen"}}) == ""


def test_lists_show_what_was_taken_and_what_called_for_an_expert(tmp_path):
    one = {
        "user": 7,
        "factor": "jazz",
        "experts": [0.75, -0.25],
        "ranked": [{"item": "x", "score": 2.0, "taken": False}, {"item": "y", "score": 1.0, "taken": True}],
        "past": [{"item": "z", "added": [0.5, -0.5]}],
    }
    write(tmp_path / "gallery" / "lists.json", {"lists": [one]})
    (room,) = recommendation.gallery(tmp_path)
    ranked, past = room.exhibits
    assert ranked.rows == [["1. x", 2.0], ["2. y", 1.0]]
    assert ranked.marked == {1}
    assert past.rows == [["z", 0.5, -0.5]]
    assert past.caption == "Weights of the experts: expert 0 +0.75, expert 1 -0.25."


def test_a_picture_is_its_pixels_and_nothing_else(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    note = PngInfo()
    note.add_text("comment", "<script>")
    Image.new("RGB", (1800, 20), (10, 200, 30)).save(tmp_path / "a.png", pnginfo=note)
    content = picture_of(tmp_path / "a.png", widest=900)
    assert b"<script>" not in content
    shown = Image.open(io.BytesIO(content))
    assert shown.size == (900, 10)
    assert shown.getpixel((5, 5)) == (10, 200, 30)


@pytest.mark.parametrize("content", [b"", b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n broken"])
def test_what_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="is not a picture"):
        picture_of(tmp_path / "a.png")


def test_what_is_no_sound_or_a_long_one_is_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="is not a WAV file"):
        sound_of(tmp_path / "a.wav")
    tone(tmp_path / "b.wav", 1.0)
    assert sound_of(tmp_path / "b.wav") == (tmp_path / "b.wav").read_bytes()
    with pytest.raises(ValueError, match=r"more than 1,000 bytes"):
        sound_of(tmp_path / "b.wav", most=1000)


def test_a_long_curve_keeps_its_ends(tmp_path):
    rows = [f"{step},{math.exp(-step / 500)}" for step in range(5000)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,train/loss", *rows]) + "\n")
    steps, values = read_curves(tmp_path, "accuracy").loss["loss"]
    assert len(steps) <= MOST + 1
    assert (steps[0], steps[-1]) == (0, 4999)
    assert values == [math.exp(-step / 500) for step in steps]
