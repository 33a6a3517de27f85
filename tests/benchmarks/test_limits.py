# SPDX-License-Identifier: Apache-2.0
"""Products are counted as one counts them by hand, and parts that hold each other are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.limits import check_parts, peak_gflops, product_flops
from benchmarks.steps import alone, shares
from moeapps.moe import LinearScore, MLPExperts, MoELayer, Router, TopK


def test_products_of_a_layer_and_its_backward_are_those_of_three_products() -> None:
    layer, x = nn.Linear(5, 7, bias=False), torch.randn(3, 5, requires_grad=True)
    once = 2 * 3 * 5 * 7

    assert product_flops(lambda: layer(x)) == once
    assert product_flops(alone(layer, x, layer)) == 3 * once  # forward, gradient of the rows, gradient of the weights
    assert product_flops(alone(layer, x.detach(), layer)) == 2 * once  # rows that are data have no gradient
    assert product_flops(lambda: x + x) == 0


def test_products_of_sorted_rows_count_each_row_once_by_every_way() -> None:
    layer = MoELayer(Router(LinearScore(8, 4), TopK(2)), MLPExperts(4, 8, 16, bias=False))
    x = torch.randn(32, 8, requires_grad=True)
    gate, experts = 2 * 32 * 8 * 4, 2 * 64 * 2 * 8 * 16  # 32 rows, two experts each, two matrices

    for backend in ("segments", "grouped_mm", "loop"):
        layer.backend = backend  # type: ignore[assignment]
        assert product_flops(alone(layer, x, layer)) == 3 * (gate + experts), backend


def test_a_part_that_holds_another_is_refused_with_the_counts_of_all() -> None:
    first, second, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4)

    def step() -> None:
        second(first(x)).sum().backward()

    apart = {"first": [lambda: first(x)], "second": [lambda: second(x)]}
    check_parts(step, apart)
    nested = {**apart, "both": [step]}
    with pytest.raises(ValueError, match=r"more than the step, which has 320 .*: first 64, second 64, both 320"):
        check_parts(step, nested)
    with pytest.raises(ValueError, match="more than the step"):
        shares(step, lambda: nested, samples=1)


def test_what_the_parts_leave_is_the_rest_even_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = {"step": 10.0, "a": 7.0, "b": 4.0}
    works = {name: (lambda: None) for name in ms}
    named = {id(work): name for name, work in works.items()}
    monkeypatch.setattr("benchmarks.steps.median_ms", lambda work, samples: ms[named[id(work)]])

    found = shares(works["step"], lambda: {"a": [works["a"]], "b": [works["b"]]}, samples=1)

    assert {name: row["ms"] for name, row in found.items()} == {"a": 7.0, "b": 4.0, "rest": -1.0}


def test_the_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1000.0, 4.0, 1.0])  # ms of the three products
    monkeypatch.setattr("benchmarks.limits.median_ms", lambda work, samples: next(times))

    assert peak_gflops() == pytest.approx(2 * 4096 * 256 * 1024 / 4e-3 / 1e9)
