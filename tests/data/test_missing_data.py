# SPDX-License-Identifier: Apache-2.0
"""Data of one's own that are not there: a missing root, a missing domain and missing files are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeapps.cli import main

# base and data config, the root that it names, and what is told where the root is there and empty
CASES = {
    "own_audio": ("unimoe_audio", "my_audio", "no file data/my_audio/clips.csv; "),
    "own_domains": ("meta_dmoe", "my_domains", "data/my_domains has no domain 'camera_1'; allowed: none"),
    "wilds_fmow": ("meta_dmoe", "fmow_v1.1", "no file data/fmow_v1.1/rgb_metadata.csv; "),
    "own_images": ("promoe", "my_images", "data/my_images has neither a folder photos, nor photos.npz"),
    "latents": ("promoe", "latents", "data/latents has no latents of domain 'train': "),
    "own_scans": ("point_moe", "my_scans", "data/my_scans/yard: no such folder; "),
    "own_series": ("mixer", "my_series", "no folder data/my_series/machine_a, where *.csv is looked for; "),
    "ali_ccp": ("home", "ali_ccp", "no file data/ali_ccp/sample_skeleton_train.csv; "),
    "aliexpress": ("home", "aliexpress", "no folder data/aliexpress/AliExpress_NL, where nl_user_train.csv is "),
    "amazon": ("aw_moe", "amazon", "no file data/amazon/All_Beauty.*; "),
}


@pytest.mark.medium
@pytest.mark.parametrize("config", CASES)
def test_the_part_of_the_path_that_is_missing_is_told(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder, empty = CASES[config]
    words = ["fit", "--config", f"configs/{base}.yaml", "--config", f"configs/data/{config}.yaml"]
    monkeypatch.chdir(tmp_path)  # where there is no data folder

    assert main(words) == 2
    missing = capsys.readouterr().err
    assert any(told in missing for told in ("no folder data", "data: no such folder"))
    assert "no file" not in missing
    assert "it holds" not in missing

    (tmp_path / "data" / folder).mkdir(parents=True)
    assert main(words) == 2
    assert empty in capsys.readouterr().err
