# SPDX-License-Identifier: Apache-2.0
"""The curriculum of the base config, in miniature: what each stage starts from and what it moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moeapps.commands.curriculum import main
from tests.systems import CONFIGS, tiny

pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("no_routing_figures")]

STAGES = sorted(CONFIGS.glob("stages/unimoe_audio_*.yaml"))
DEPTH = 4


def state(folder: Path) -> dict[str, Any]:
    file = next(folder.glob("version_*")) / "checkpoints" / "last.ckpt"
    found: dict[str, Any] = torch.load(file, weights_only=True)["state_dict"]
    return {key: value for key, value in found.items() if key.startswith("net.")}


def test_the_four_stages_of_the_base_config(tmp_path: Path) -> None:
    words = [*tiny(CONFIGS / "unimoe_audio.yaml"), "--trainer.max_epochs=1", "--trainer.callbacks=null"]
    assert len(STAGES) == 4
    assert main([*words, *(word for file in STAGES for word in ("--stage", str(file)))]) == 0

    runs = tmp_path / "runs" / "unimoe_audio"
    common, several, warm, joint = (
        state(runs / name) for name in ("curriculum_stage0", "curriculum_stage1", "curriculum_stage2", "curriculum")
    )
    # A step of the second stage moves a specialist by the rate at most: they are still near the common network.
    names = {key.split(".")[2] for key in several if key.startswith("net.nets.")}
    assert names == {"0", "1", "2", "3"}
    for name in names:
        for key, value in common.items():
            torch.testing.assert_close(several[f"net.nets.{name}{key.removeprefix('net')}"], value, rtol=0, atol=0.02)
    # Fused and warmed up: means outside the mixtures, halves of the specialists inside, to the bit.
    for key in common:
        if ".ffn." not in key:
            mean = torch.stack([several[f"net.nets.{n}{key.removeprefix('net')}"] for n in range(4)]).mean(0)
            assert torch.equal(warm[key], mean), key
    for block in range(DEPTH):
        place = f"blocks.{block}.ffn.experts"
        for n in range(4):
            down = several[f"net.nets.{n}.{place}.w_out"][0]
            for half in range(2):
                expected = 2 * down.chunk(2)[half]
                assert torch.equal(warm[f"net.{place}.banks.0.w_out"][2 * n + half], expected)
    # Then everything moves.
    still = [key for key in warm if torch.equal(warm[key], joint[key])]
    assert [key for key in still if "threshold" not in key and "symbols" not in key] == []
    (results,) = runs.glob("*/version_*/metrics/test.json")
    header = json.loads(results.read_text())["header"]
    assert header["name"] == "curriculum"
    assert header["started_from"]["train_flops"] > 0
    assert header["train_flops"] > header["started_from"]["train_flops"]
