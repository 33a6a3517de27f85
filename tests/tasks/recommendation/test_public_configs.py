# SPDX-License-Identifier: Apache-2.0
"""Overlays of public logs: each reads tiny files of its layout; HoME and AW-MoE train on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from moeapps.cli import main
from tasks.recommendation.datamodule import RecommendationData
from tests.systems import CONFIGS, flags
from tests.tasks.recommendation import public_layouts as layouts

BEAUTY = ("All_Beauty", "Digital_Music", "Magazine_Subscriptions")
OVERLAYS: dict[str, Callable[[Path], Any]] = {
    "kuairand": layouts.write_kuairand,
    "kuairec": layouts.write_kuairec,
    "aliexpress": layouts.write_aliexpress,
    "ali_ccp": layouts.write_ali_ccp,
    "census_income": layouts.write_census,
    "kuairand_lists": layouts.write_kuairand,
    "movielens_1m": layouts.write_movielens_1m,
    "movielens_25m": layouts.write_movielens_25m,
    "amazon": lambda root: layouts.write_amazon(root, "2023", BEAUTY),
}
TINY = ["--data.init_args.batch_size", "16", "--trainer.callbacks", "null"]


def test_every_overlay_whose_data_must_be_fetched_by_hand_is_tried_here() -> None:
    readers = {path.stem for path in CONFIGS.glob("data/*.yaml") if "root: data/" in path.read_text()}
    ours = {stem for stem in readers if "tasks.recommendation" in (CONFIGS / "data" / f"{stem}.yaml").read_text()}

    assert ours == set(OVERLAYS)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_reads_files_of_its_layout(tmp_path: Path, name: str) -> None:
    OVERLAYS[name](tmp_path)
    config = yaml.safe_load((CONFIGS / "data" / f"{name}.yaml").read_text())["data"]
    for part in roots(config):
        part["root"] = str(tmp_path)
    config["init_args"] |= {"cache_dir": str(tmp_path / "cache"), "batch_size": 16}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(RecommendationData, "data")
    data = parser.instantiate(parser.parse_object({"data": config})).data

    data.prepare_data()
    for loader in [data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]:
        for batch in loader:
            data.source.schema.check(batch, name)
    assert all(data.roles.values())


def roots(config: Any) -> list[dict[str, Any]]:
    """Return the parts of a configuration that have a root."""
    if not isinstance(config, dict):
        return []
    return [*([config] if "root" in config else []), *(part for value in config.values() for part in roots(value))]


@pytest.mark.medium
@pytest.mark.parametrize("name", ["kuairand", "kuairec", "aliexpress", "ali_ccp", "census_income"])
def test_home_trains_on_an_overlay(tmp_path: Path, name: str) -> None:
    OVERLAYS[name](tmp_path / "data")
    overlay, tiny = CONFIGS / "data" / f"{name}.yaml", CONFIGS / "debug" / "tiny.yaml"
    root = ["--data.init_args.source.init_args.root", str(tmp_path / "data")]

    assert main(["fit", *flags(CONFIGS / "home.yaml", overlay, tiny), *root, *TINY]) == 0


@pytest.mark.medium
@pytest.mark.parametrize("name", ["movielens_1m", "amazon"])
def test_aw_moe_trains_on_an_overlay(tmp_path: Path, name: str) -> None:
    OVERLAYS[name](tmp_path / "data")
    overlay, tiny = CONFIGS / "data" / f"{name}.yaml", CONFIGS / "debug" / "tiny.yaml"
    root = ["--data.init_args.source.init_args.reader.init_args.root", str(tmp_path / "data")]

    assert main(["fit", *flags(CONFIGS / "aw_moe.yaml", overlay, tiny), *root, *TINY]) == 0
