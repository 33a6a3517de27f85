# SPDX-License-Identifier: Apache-2.0
"""The shipped configs: twins match in FLOPs or parameters, and a whole run writes what it promises."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moeapps.commands.run import run
from moeapps.moe import presets
from moeapps.training.cost import count_flops
from tasks.point_cloud.data.features import IN_DIM
from tasks.point_cloud.model import PointMoE

CONFIGS = Path(__file__).parents[3] / "configs"
BASELINES = ("dense", "dense_params", "ptv3", "random", "domain", "mlp")


def network(*overlays: str) -> PointMoE:
    options: dict[str, Any] = {}
    for file in ("point_moe.yaml", *overlays):
        config = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))
        options |= config["model"]["init_args"]["net"]["init_args"]
    return PointMoE({"in_dim": IN_DIM}, **{**options, "moe": layer(options["moe"])})


def layer(config: dict[str, Any]) -> Any:
    options = dict(config.get("init_args", {}))
    for key in ("router", "moe"):
        if key in options:
            options[key] = layer(options[key])
    return getattr(presets, config["class_path"].rpartition(".")[2])(**options)


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def flops(net: PointMoE, batch: Any) -> int:
    return count_flops(net.eval(), batch)


def test_dense_twins_match_in_active_flops_and_in_parameters(make_batch) -> None:
    batch = make_batch([900, 700], side=16)
    system, twin, wide = (
        network(),
        network("baselines/point_moe_dense.yaml"),
        network("baselines/point_moe_dense_params.yaml"),
    )

    assert flops(twin, batch) == pytest.approx(flops(system, batch), rel=0.02)
    assert flops(network("baselines/point_moe_mlp.yaml"), batch) == pytest.approx(flops(system, batch), rel=0.02)
    assert parameters(wide) == pytest.approx(parameters(system), rel=0.02)
    assert parameters(twin) < 0.95 * parameters(system)
    base = yaml.safe_load((CONFIGS / "point_moe.yaml").read_text(encoding="utf-8"))
    for name in ("dense", "dense_params"):  # a twin of what the base config has, not of what it had
        overlay = yaml.safe_load((CONFIGS / f"baselines/point_moe_{name}.yaml").read_text(encoding="utf-8"))
        nets = [config["model"]["init_args"]["net"]["init_args"]["moe"] for config in (base, overlay)]
        assert nets[1]["init_args"]["moe"] == nets[0]


def test_active_flops_do_not_grow_with_the_number_of_experts_but_for_the_router(make_batch) -> None:
    batch = make_batch([900])
    few, many = (PointMoE({"in_dim": IN_DIM}, moe=presets.point_moe(num_experts=number)) for number in (4, 8))

    router = sum(2 * 4 * block.norm1.weight.numel() * len_ for block, len_ in blocks_and_rows(few, batch))

    assert flops(many, batch) - flops(few, batch) == router


def blocks_and_rows(net: PointMoE, batch: Any) -> list[tuple[Any, int]]:
    rows = [int(row.max()) + 1 for row in net.rows(batch)]
    stages = [*enumerate(net.encoder), *enumerate(net.decoder)]
    return [(block, rows[i]) for i, stage in stages for block in stage.blocks]


@pytest.mark.parametrize(("size", "count"), [("s", 58_726_464), ("l", 99_809_088)])
def test_paper_configs_build_the_published_networks(size, count) -> None:
    with torch.device("meta"):
        net = network(f"paper/point_moe_{size}.yaml")

    assert parameters(net) == count


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_answers(name, make_batch) -> None:
    y = network(f"baselines/point_moe_{name}.yaml")(make_batch([200, 90]))

    assert y.shape == (290, 32)
    assert y.isfinite().all()


@pytest.mark.medium
def test_a_run_writes_scores_figures_and_a_checkpoint_that_holds_plain_values(tmp_path) -> None:
    small = {
        "model": {"net": {"enc_depths": [1, 1], "enc_dims": [16, 16], "dec_depths": [1], "dec_dims": [16]}},
        "data": {
            **{"seen": ["cad_room"], "validation": ["als"], "unseen": ["rgbd_room"], "max_voxels": 3000},
            **{"train_scenes": 1, "val_scenes": 1, "test_scenes": 1, "crops_per_scene": 2, "batch_size": 4},
            "cache_dir": str(tmp_path / "cache"),
        },
    }
    words = ["fit", "--config", str(CONFIGS / "point_moe.yaml"), "--trainer.max_epochs", "1"]
    words += [
        "--trainer.check_val_every_n_epoch",
        "1",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.logger",
        "false",
    ]
    words += [f"--model.init_args.net.init_args.{key}={value}" for key, value in small["model"]["net"].items()]
    words += [f"--data.init_args.{key}={value}" for key, value in small["data"].items()]

    cli = run(words)

    folder = Path(cli.trainer.log_dir)
    assert {path.stem for path in (folder / "figures").glob("*.png")} >= {"cad_room", "als", "rgbd_room"}
    results = json.loads((folder / "metrics" / "test.json").read_text(encoding="utf-8"))
    scores = {(row["domain"], row["metric"]): row["value"] for row in results["rows"]}
    for domain in ("cad_room", "als", "rgbd_room"):
        assert 0 <= scores[domain, "miou"] <= 1
        assert math.isfinite(scores[domain, "loss"])
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert "net.stem.conv.weight" in checkpoint["state_dict"]
    groups = {group["name"]: group["initial_lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]}
    assert groups.keys() == {"default", "*block*"}
