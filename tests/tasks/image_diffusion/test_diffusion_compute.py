# SPDX-License-Identifier: Apache-2.0
"""ProMoE's compute by hand, from the equations of DiT with experts in every other block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from moeapps.moe.presets import promoe
from moeapps.training.cost import count_flops
from tasks.image_diffusion.datamodule import ImageData
from tasks.image_diffusion.model import DiT

IMAGES, TOKENS, DIM, EXPERTS = 4, 49, 128, 6


def by_hand() -> int:
    rows = IMAGES * TOKENS
    attention = 2 * rows * 4 * DIM * DIM + 4 * IMAGES * TOKENS * TOKENS * DIM
    modulation = 2 * IMAGES * DIM * 6 * DIM
    dense = 2 * rows * 2 * DIM * 4 * DIM
    experts = 2 * rows * DIM * EXPERTS + 2 * (2 * rows * 2 * DIM * 2 * DIM)  # prototypes; one routed, one shared
    blocks = 4 * (attention + modulation) + 2 * dense + 2 * experts
    time = 2 * IMAGES * (256 * DIM + DIM * DIM)
    last = 2 * IMAGES * DIM * 2 * DIM + 2 * rows * DIM * 16
    return 2 * rows * 16 * DIM + time + blocks + last


@pytest.mark.parametrize("train", [False, True])
def test_promoe_costs_what_its_equations_say(train: bool) -> None:
    config = yaml.safe_load(Path("configs/promoe.yaml").read_text(encoding="utf-8"))
    options = config["model"]["init_args"]["net"]["init_args"]
    net = DiT(ImageData().facts, **{**options, "moe": promoe(**options["moe"]["init_args"])}).train(train)
    labels = torch.tensor([0, 30, 12, 29])  # 30: without a class

    counted = count_flops(net, torch.randn(IMAGES, 1, 28, 28), torch.rand(IMAGES) * 999, labels)
    assert counted == pytest.approx(by_hand(), rel=0.01)
