# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from moeapps.reporting.figures import save_figure
from tasks.point_cloud.data.labels import LABEL_SETS
from tasks.point_cloud.nets.text import taxonomy
from tasks.point_cloud.report.figures import (
    CATEGORY_COLOURS,
    ScanPicture,
    class_colour,
    expert_colour,
    fitting_height,
    project,
    render,
    scan_figure,
)
from tests.pictured import check_readable


def picture(**changes) -> ScanPicture:
    rng = np.random.default_rng(0)
    values = {
        "title": "room (seen)",
        "pos_R3": rng.uniform(0, 3, (200, 3)),
        "truth_R": rng.integers(-1, 3, 200),
        "pred_R": rng.integers(0, 3, 200),
        "names": ["wall", "floor", "chair"],
        "expert_R": rng.integers(0, 4, 200),
    }
    return ScanPicture(**{**values, **changes})


def test_every_category_of_the_taxonomy_has_a_colour_and_a_name_of_its_own() -> None:
    paths = {path[:-1] for path in taxonomy().values()}
    categories = [path[-1] for path in paths]

    assert sorted(categories) == sorted(CATEGORY_COLOURS)


@pytest.mark.parametrize("domain", LABEL_SETS)
def test_classes_of_one_label_set_have_different_colours(domain) -> None:
    colours = [class_colour(name) for name in LABEL_SETS[domain]]

    assert len(set(colours)) == len(colours)
    assert all(0 <= part <= 1 for colour in colours for part in colour)


def test_colours_belong_to_names_not_to_label_sets() -> None:
    assert class_colour("Traffic-Sign") == class_colour("traffic sign")
    assert class_colour("something the tree lacks") == class_colour("something the tree lacks")
    assert expert_colour(0) == expert_colour(8) != expert_colour(1)


@pytest.mark.parametrize("above_first", [True, False])
def test_the_nearer_point_hides_the_farther_one(above_first) -> None:
    frame = [[x, y, 0.0] for x in (-1, 1) for y in (-1, 1)]
    centre, red, blue = [[0.0, 0.0, 0.01], [0.0, 0.0, -0.01]], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]
    points = np.array(frame + (centre if above_first else centre[::-1]))
    colours = np.array([[0.5, 0.5, 0.5]] * 4 + ([red, blue] if above_first else [blue, red]))

    image = render(points, colours, 40, 40)

    _, _, near = project(points, 40, 40)
    assert near[4:].argmax() == (0 if above_first else 1)
    assert image[20, 20, 0] > 5 * image[20, 20, 2]


def test_background_is_transparent_and_colours_stay_in_range() -> None:
    image = render(np.random.default_rng(0).normal(size=(50, 3)), np.full((50, 3), 0.5), 60, 40)

    assert image.shape == (40, 60, 4)
    assert image.min() >= 0
    assert image.max() <= 1
    assert image[0, 0, 3] == 0


@pytest.mark.parametrize(("expert", "panels"), [(None, 2), (np.zeros(200, dtype=np.int64), 3)])
def test_a_figure_has_one_panel_per_question_and_is_written(expert, panels, tmp_path) -> None:
    figure = scan_figure(picture(expert_R=expert))

    save_figure(figure, tmp_path / "figures" / "room.png")

    assert len(figure.axes) == panels
    assert (tmp_path / "figures" / "room.png").stat().st_size > 10_000


SHAPES = {"road": (60.0, 2.0, 1.0), "room": (6.0, 4.0, 2.5), "tower": (2.0, 2.0, 30.0)}


@pytest.mark.parametrize("count", [1, 30, 3000])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_point_is_cut_at_the_edge_of_its_picture(shape, count) -> None:
    pos = np.random.default_rng(0).uniform(0, SHAPES[shape], (count, 3))
    height = fitting_height(pos, 320)
    drawn = render(pos, np.full((count, 3), 0.5), 320, height)[..., 3] > 0

    assert drawn.any()
    assert not drawn[[0, -1]].any()
    assert not drawn[:, [0, -1]].any()
    wide, high = (int(np.ptp(np.flatnonzero(drawn.any(axis=axis)))) for axis in (0, 1))
    if count > 1:
        assert max(wide / 320, high / height) > 0.9  # it fills its panel one way,
    if shape == "road" and count == 3000:
        assert high > 0.8 * height  # and a long flat one has no empty half the other way


def test_one_stray_point_does_not_shrink_the_rest() -> None:
    room = np.random.default_rng(0).uniform(0, SHAPES["room"], (3000, 3))
    grey = np.full((3001, 3), 0.5)
    alone = render(room, grey[1:], 200, 150)[..., 3] > 0
    beside = render(np.concatenate([room, [[500.0, 500.0, 0.0]]]), grey, 200, 150)[..., 3] > 0

    assert beside.sum() == pytest.approx(alone.sum(), rel=0.02)


@pytest.mark.parametrize("domain", LABEL_SETS)
@pytest.mark.parametrize("experts", [None, 8])
def test_names_of_all_classes_and_experts_stand_below_and_apart(domain, experts) -> None:
    names, count = LABEL_SETS[domain], 400
    label = np.arange(count) % len(names)
    expert = None if experts is None else np.arange(count) % experts
    pos = np.random.default_rng(0).uniform(0, SHAPES["road"], (count, 3))
    scan = ScanPicture("drive_front (unseen)", pos, label, label, names, expert, "drive_front-0-4282835600-2-0")

    check_readable(scan_figure(scan, dpi=50))


def test_ceilings_and_unlabelled_points_are_left_out() -> None:
    with pytest.raises(ValueError, match="no labelled point"):
        scan_figure(picture(truth_R=np.where(np.arange(200) % 2, -1, 0), names=["ceiling", "floor", "chair"]))
