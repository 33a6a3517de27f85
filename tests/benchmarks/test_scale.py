# SPDX-License-Identifier: Apache-2.0
"""What a network costs each of many processes: counted by hand, and beside what processes exchange."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import scale
from benchmarks.scale_sizes import sizes
from moeapps.bounds import read_json
from moeapps.evaluation.scale import Division, LayerShape, NetworkShape, cost_of, flops_of, shape_of
from moeapps.moe import MLPExperts, MoELayer, Router, TopK
from moeapps.moe.presets import promoe
from moeapps.moe.routers import LinearScore
from moeapps.training.flops import count_flops

# 4 experts of 6 x 8 and 8 x 6 weights, 10 rows with 2 experts each; beside them a matrix of 8 x 3 and a number.
NET = NetworkShape((LayerShape(4, ((4, 6, 8), (4, 8, 6)), 6, 6, 20),), ((8, 3), ()))


def test_a_step_counted_by_hand() -> None:
    alone = cost_of(NET, Division(1, 1, False))
    assert alone.calls == {"all_to_all": 0, "all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    assert alone.held == 16 * (384 + 24 + 1)

    spread = cost_of(NET, Division(2, 2, False), number_bytes=2)
    # 20 rows of 6 numbers of 2 bytes go, come back, and their gradients too; 4 counts of 8 bytes go before.
    assert spread.calls["all_to_all"] == 4 * 20 * 6 * 2 + 4 * 8
    assert spread.sent["all_to_all"] == spread.calls["all_to_all"] / 2
    assert spread.calls["all_reduce"] == 4 * 25 + 1  # the number stays whole, and was used
    assert spread.held == 16 * (192 + 24 + 1)

    cut = cost_of(NET, Division(4, 2, True))
    assert cut.calls["all_reduce"] == 4 + 1
    assert cut.calls["reduce_scatter"] == 4 * (192 + 24)
    assert cut.calls["all_gather"] == 2 * cut.calls["reduce_scatter"]
    assert cut.held == 16 * (96 + 6 + 1)
    assert cut.fetched == 4 * (24 + 192)


def test_few_experts_over_many_processes_are_not_fetched_many_times() -> None:
    """One expert for each of 64 copies: cut along another dimension, not filled up to 64 experts."""
    net = NetworkShape((LayerShape(8, ((8, 128, 256),), 128, 128, 10),), ())
    assert cost_of(net, Division(512, 8, True)).calls["all_gather"] == 2 * 4 * 128 * 256


def test_processes_that_do_not_divide_are_told() -> None:
    with pytest.raises(ValueError, match="6 processes cannot be divided into groups of 4"):
        cost_of(NET, Division(6, 4, True))


def test_shapes_and_arithmetic_of_a_network() -> None:
    layer = MoELayer(Router(LinearScore(6, 4), TopK(2)), MLPExperts(5, 6, 8), num_shared=1)
    net = nn.Sequential(nn.Linear(3, 6), layer, nn.Embedding(9, 4))
    shape = shape_of(net, lambda name, layer: 20)

    assert shape.layers == (LayerShape(4, ((4, 6, 8), (4, 8), (4, 8, 6), (4, 6)), 6, 6, 20, shared=1),)
    assert shape.parameters == sum(p.numel() for p in net.parameters())
    # 10 rows: 18 of the first, 24 of the router, 96 of each of three experts; forward, and twice that backward.
    assert flops_of(net, lambda name: 10, 2) == 3 * 2 * 10 * (18 + 24 + 3 * 96)


@pytest.mark.medium
def test_the_published_sizes_are_those_of_their_papers() -> None:
    found = {size.name: size.shape.parameters for size in sizes()}
    assert found["ProMoE-S"] == 75_445_280
    assert found["Point-MoE-S"] == 58_726_464
    assert found["Point-MoE-L"] == 99_809_088
    assert [round(found[f"ProMoE-{letter}"] / 1e6) for letter in ("B", "L", "XL")] == [300, 1062, 1567]


@pytest.mark.medium
def test_arithmetic_of_a_transformer_is_what_torch_counts() -> None:
    from tasks.image_diffusion.model import dit_paper

    net = dit_paper("S", promoe())
    y = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        counted = count_flops(net, torch.randn(1, 4, 32, 32), torch.zeros(1), y)
    size = next(size for size in sizes() if size.name == "ProMoE-S")
    assert size.shape.flops / 3 / 32 == pytest.approx(counted, rel=0.02)


def test_committed_counts_are_those_of_the_model_and_stand_on_the_page() -> None:
    rows = read_json(scale.RESULTS)["rows"]
    assert [scale.Division(row["processes"], row["experts"], row["sharded"]) for row in rows] == list(scale.DIVISIONS)
    for row, division in zip(rows, scale.DIVISIONS, strict=True):
        assert scale.agrees(row)
        assert row["model"] == {kind: count for kind, count in scale.predicted(division).calls.items() if count}
    page = scale.PAGE.read_text(encoding="utf-8")
    block = scale.BLOCK.search(page)
    assert block is not None
    numbers = [line.split("|")[4:8] for line in block[0].splitlines() if "equal to the byte" in line]
    assert len(numbers) == len(rows)


def test_what_the_page_says_of_its_table() -> None:
    told = "on the 8 devices of a machine the rows of ProMoE's experts are a tenth to a third of what is sent"
    assert told in " ".join(scale.PAGE.read_text(encoding="utf-8").split())
    for size in sizes():
        for devices in (8, 64, 1024):
            sent = cost_of(size.shape, scale.division_of(size, devices), number_bytes=2).sent
            ratio = sent["all_to_all"] / (sum(sent.values()) - sent["all_to_all"])
            if devices > 8:
                assert ratio < 1
            elif size.name.startswith("ProMoE"):
                assert 0.1 < ratio < 1 / 3
            else:
                assert 1.1 < ratio < 1.5


def test_stacks_cut_through_their_short_side_would_be_fetched_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terabyte that the page speaks of."""
    (size,) = (size for size in sizes() if size.name == "ProMoE-XL")

    def others() -> float:
        sent = cost_of(size.shape, scale.division_of(size, 1024), number_bytes=2).sent
        return (sum(sent.values()) - sent["all_to_all"]) / 1e9

    assert others() == pytest.approx(12, abs=0.5)
    monkeypatch.setattr("moeapps.evaluation.scale.cut_dimension", lambda shape, parts, sizes=(): 0)
    monkeypatch.setattr("moeapps.evaluation.scale.stays_whole", lambda shape, parts: not shape)
    assert others() == pytest.approx(1100, abs=50)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_processes_exchange_what_the_model_says(world: int) -> None:
    """And their gradients are those of one process with the rows of all."""
    rows = scale.measure((world,))
    assert len(rows) >= 4
    for row in rows:
        assert scale.agrees(row), row
