# SPDX-License-Identifier: Apache-2.0
"""A process of 8 or 64 holds no more than its share of the largest network of a paper (slow: a process of its own).

Networks are on the meta device, see tests/training/places.py; shares are counted by hand here.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from moeapps.training.parallel import _cut
from tests.training.places import KINDS, SHARE, WORLDS

Held = dict[str, tuple[list[int], list[int]]]
NUMBERS = {"promoe_xl": 1_567_438_880, "point_moe_l": 99_809_088}  # published, see configs/paper
ROOM = 1.01  # what does not divide, such as the widths of norms


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Held]]:
    """What processes hold, by network, overlay and number of processes."""
    file = tmp_path_factory.mktemp("places") / "held.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.places", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert file.is_file(), done.stderr[-3000:]
    return json.loads(file.read_text())


def is_routed(name: str) -> bool:
    return ".experts." in name and ".banks.1." not in name


def whole(held: Held) -> int:
    return sum(math.prod(shape) for shape, _ in held.values())


def here(held: Held) -> int:
    return sum(math.prod(part) for _, part in held.values())


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", [kind for kind, *_ in KINDS])
@pytest.mark.parametrize("name", SHARE)
def test_no_process_holds_more_than_its_share(places: dict[str, list[Held]], name: str, kind: str, world: int) -> None:
    for held in places[f"{name} {kind} {world}"]:
        assert whole(held) == NUMBERS.get(name, whole(held))
        share = whole(held) / world
        if kind != "fsdp2":
            experts, rest, spread = 0.0, 0, SHARE[name]
            for key, (shape, _) in held.items():
                if is_routed(key):  # at most so many of a layer's experts, in as many copies as there are groups
                    experts += math.prod(shape) * math.ceil(shape[0] / spread) / shape[0] * spread / world
                else:
                    rest += math.prod(shape)
            assert experts > 0
            share = experts + (rest if kind == "ep" else rest / world)
        assert 0 < here(held) <= share * ROOM


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARE)
def test_together_they_hold_each_weight_once(places: dict[str, list[Held]], name: str) -> None:
    held = places[f"{name} ep_fsdp2 {WORLDS[0]}"]

    assert len(held) == WORLDS[0]
    for key, (shape, _) in held[0].items():
        assert sum(math.prod(found[key][1]) for found in held) == math.prod(shape), key


@pytest.mark.parametrize(
    ("shape", "parts", "sizes", "dim"),
    [
        ((8, 6, 12), 4, (), 0),  # two experts each
        ((8, 6, 12), 3, (), 2),  # between experts it would be 3, 3 and 2
        ((8, 9, 12), 64, (), 0),  # nothing divides
        ((8, 128, 192), 64, (), 2),
        ((8, 128, 96), 64, (), 1),
        ((8, 128, 96), 2, (1, 1, 1, 1, 1, 1, 1, 1), 1),
        ((8, 128, 96), 2, (2, 2, 2, 2), 0),
        ((5, 128, 96), 2, (3, 2), 1),
        ((5,), 2, (), 0),
    ],
)
def test_weights_are_cut_where_each_part_gets_as_much(
    shape: tuple[int, ...], parts: int, sizes: tuple[int, ...], dim: int
) -> None:
    parameter = nn.Parameter(torch.empty(shape, device="meta"))

    assert _cut(parameter, parts=parts, sizes=sizes).dim == dim
