# SPDX-License-Identifier: Apache-2.0
"""The heat maps of expert by domain: axes are named, maps apart, and experts that nobody chose do not pale others."""

from __future__ import annotations

import numpy as np
import pytest

from moeapps.reporting.routing import routing_figure, short_names
from tests.pictured import check_readable

DOMAINS = ["rgbd_room", "tls_office", "drive_front"]
LAYERS = [f"net.{side}.{k}.blocks.{b}.attn.proj" for side in ("encoder", "decoder") for k in (0, 1) for b in (0, 1)]


def work(experts: int, seed: int = 0) -> list[list[float]]:
    return np.random.default_rng(seed).uniform(1, 9, (len(DOMAINS), experts)).tolist()


def test_maps_of_many_deep_layers_name_their_axes_and_keep_their_titles_apart() -> None:
    figure = routing_figure({name: {"work": work(4), "per_row": 2} for name in LAYERS}, DOMAINS)

    assert figure is not None
    check_readable(figure)
    maps = [axis for axis in figure.axes if axis.get_visible()][: len(LAYERS)]
    assert [axis.get_title() for axis in maps[:2]] == ["encoder.0.blocks.0", "encoder.0.blocks.1"]
    assert {axis.get_xlabel() for axis in maps} == {"expert (2 work on each row)"}


def test_long_names_of_layers_are_broken_at_their_dots() -> None:
    names = [f"{part}.a_long_name_of_a_part.{part}.another_long_name.{part}" for part in ("first", "second", "third")]
    figure = routing_figure({name: {"work": work(2)} for name in names}, DOMAINS)

    assert figure is not None
    check_readable(figure)
    assert figure.axes[0].get_title().replace("\n", "") == names[0]


def test_a_given_expert_is_marked_and_leaves_the_colours_to_the_chosen_ones() -> None:
    table = np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.5, 1.5, 3.0]])
    figure = routing_figure({"net.blocks.1.mlp": {"work": table.tolist(), "given": 1, "per_row": 1}}, DOMAINS)

    assert figure is not None
    check_readable(figure)
    axis = figure.axes[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "1", "given"]
    assert axis.get_xlabel() == "expert\n(given: not chosen by the router)"
    shown = axis.images[0]
    assert shown.get_clim() == pytest.approx((0, 1 / 3))
    np.testing.assert_allclose(np.ma.filled(shown.get_array(), np.nan)[:, 2], np.nan)
    assert [text.get_text() for text in axis.texts] == ["0.50"] * 3


def test_layers_of_one_expert_are_left_out_and_a_dense_twin_has_no_figure() -> None:
    assert routing_figure({"a": {"work": work(1)}, "b": {"work": work(1)}}, DOMAINS) is None
    figure = routing_figure({"a": {"work": work(1)}, "b": {"work": work(2)}}, DOMAINS)
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["b"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["net.layer"], ["net.layer"]),
        (["net.a.moe", "net.b.moe"], ["a", "b"]),
        (["net.moe", "net.moe.1.moe"], ["net.moe", "1.moe"]),
        (["a", "b.a"], ["a", "b"]),
    ],
)
def test_layers_are_named_by_what_tells_them_apart(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short
