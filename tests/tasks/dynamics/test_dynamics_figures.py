# SPDX-License-Identifier: Apache-2.0
"""Pictures show what they are given; predicted trajectories are whole files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.artist import Artist
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from moeapps.files import write_arrays
from moeapps.reporting.figures import COLOURS, save_figure
from tasks.dynamics.report.figures import (
    context_figure,
    gate_figure,
    phase_figure,
    principal_plane,
    trajectory_figure,
)
from tests.pictured import check_readable

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=(8, 3, 10, 2))
NAMES = [f"environment {i}" for i in range(8)]


def test_trajectories_show_truth_as_dots_and_prediction_as_lines(tmp_path: Path) -> None:
    pred = TRUTH + 1
    figure = trajectory_figure("t", TRUTH, pred, np.full(8, 0.5), NAMES, most=3)
    panels = [axis for axis in figure.axes if axis.get_title(loc="left")]

    assert [axis.get_title(loc="left") for axis in panels] == [NAMES[0], NAMES[4], NAMES[7]]
    dots, line = panels[1].lines[:2]
    np.testing.assert_array_equal(dots.get_ydata(), TRUTH[4, 0, :, 0])
    np.testing.assert_array_equal(line.get_ydata(), pred[4, 0, :, 0])
    assert dots.get_xdata()[-1] == 4.5
    continued = trajectory_figure("t", TRUTH, pred, np.full(8, 0.5), NAMES, given=4).axes[0].lines[1]
    assert continued.get_xdata().tolist() == [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
    save_figure(figure, tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").stat().st_size > 1000


def test_an_exploding_prediction_neither_flattens_the_truth_nor_fails() -> None:
    pred = TRUTH.copy()
    pred[:, :, 5:] = np.inf
    pred[:, :, 4] = 1e30
    figure = phase_figure("t", TRUTH, pred, NAMES)
    low, high = figure.axes[0].get_ylim()

    assert high - low == pytest.approx(1.5 * (TRUTH[0, ..., 1].max() - TRUTH[0, ..., 1].min()))
    assert np.isnan(figure.axes[0].lines[1].get_ydata()[5:]).all()


def test_phase_portrait_of_one_state_is_refused() -> None:
    with pytest.raises(ValueError, match="two states"):
        phase_figure("t", TRUTH[..., :1], TRUTH[..., :1], NAMES)


def test_principal_plane_keeps_the_distances_of_plane_points() -> None:
    plane = RNG.normal(size=(30, 2)) * [3, 1]
    turn, _ = np.linalg.qr(RNG.normal(size=(7, 7)))
    points = np.concatenate([plane, np.zeros((30, 5))], 1) @ turn + 4.0
    found, share = principal_plane(points)

    def distances(x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.linalg.norm(x[:, None] - x[None], axis=-1)

    np.testing.assert_allclose(distances(found), distances(plane), atol=1e-9)
    assert share.sum() == pytest.approx(1)
    assert share[0] > share[1]
    assert principal_plane(points[:, :1])[1][1] == 0


def test_context_map_colours_families_and_experts() -> None:
    family, expert = np.array([0, 0, 1, -1]), np.array([2, 2, 0, 0])
    figure = context_figure("c", RNG.normal(size=(4, 3)), family, expert, ["harmonic", "pendulum"])
    left, right = ([t.get_text() for t in axis.get_legend().get_texts()] for axis in figure.axes)

    assert left == ["unknown", "harmonic", "pendulum"]
    assert right == ["expert 0", "expert 2"]
    assert tuple(figure.axes[1].collections[1].get_facecolor()[0][:3]) == pytest.approx(to_rgb(COLOURS[2]))


def test_no_look_means_a_family_on_one_side_and_an_expert_on_the_other() -> None:
    numbers = np.arange(9)
    figure = context_figure("c", RNG.normal(size=(9, 3)), numbers, numbers, [f"family {k}" for k in numbers])
    families, experts = ({tuple(c.get_facecolor()[0]) for c in axis.collections} for axis in figure.axes)
    shapes, signs = ({c.get_paths()[0].vertices.round(2).tobytes() for c in axis.collections} for axis in figure.axes)

    assert len(families) == len(experts) == len(shapes) == len(signs) == 9
    assert not families & experts
    assert not shapes & signs


def test_legends_say_what_colours_and_marks_mean() -> None:
    def key(figure: Figure) -> dict[str, Artist]:
        legend = figure.legends[0]
        return dict(zip([text.get_text() for text in legend.get_texts()], legend.legend_handles, strict=True))

    over_time = trajectory_figure("t", TRUTH, TRUTH, np.ones(8), NAMES)
    assert list(key(over_time)) == ["truth", "prediction", "state 0", "state 1"]
    for d in range(2):
        assert to_rgb(key(over_time)[f"state {d}"].get_facecolor()) == to_rgb(
            over_time.axes[0].lines[2 * d].get_color()
        )
    plane = phase_figure("t", TRUTH, TRUTH, NAMES)
    dots, line = plane.axes[0].lines[:2]
    assert to_rgb(key(plane)["truth"].get_color()) == to_rgb(dots.get_color())
    assert to_rgb(key(plane)["prediction"].get_color()) == to_rgb(line.get_color())
    assert {(axis.get_xlabel(), axis.get_ylabel()) for axis in plane.axes} == {("state 0", "state 1")}


@pytest.mark.parametrize("panels", [1, 6])
@pytest.mark.parametrize("states", [2, 12])
def test_texts_stay_apart_and_legends_outside(panels: int, states: int) -> None:
    truth = RNG.normal(size=(panels, 3, 10, states))
    family = np.arange(12) % (2 * panels)
    names = [f"family_{k}_name" for k in range(12)]

    check_readable(trajectory_figure("double_well (seen)", truth, truth, np.ones(panels), NAMES))
    check_readable(phase_figure("double_well (seen)", truth, truth, NAMES))
    check_readable(context_figure("contexts", RNG.normal(size=(12, 3)), family, np.arange(12) % states, names))
    check_readable(gate_figure("gate", np.arange(3), np.tile(family, (3, 1)), family, names))


def test_gate_map_groups_environments_by_family() -> None:
    steps, family = np.array([0, 5, 10]), np.array([1, 0, 1, 0])
    expert = np.array([[0, 1, 0, 1], [0, 1, 1, 1], [2, 1, 2, 1]])
    figure = gate_figure("g", steps, expert, family, ["a", "b"])
    shown = figure.axes[0].collections[0].get_array().reshape(4, 3)

    np.testing.assert_array_equal(shown, [[1, 1, 1], [1, 1, 1], [0, 0, 2], [0, 1, 2]])
    with pytest.raises(ValueError, match=r"\[H, S\]"):
        gate_figure("g", steps, expert.T, family, ["a", "b"])


def test_trajectories_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "predictions" / "harmonic.npz"
    write_arrays(path, X=TRUTH, names=NAMES)
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["X"], TRUTH)
        assert arrays["names"].tolist() == NAMES

    class Broken:
        def __array__(self, *args: object, **kwargs: object) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_arrays(path, X=Broken())
    with np.load(path) as arrays:
        assert set(arrays.files) == {"X", "names"}
    assert [p.name for p in path.parent.iterdir()] == ["harmonic.npz"]
