# SPDX-License-Identifier: Apache-2.0
"""Wrong words of a command line are told with what was given and what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeapps.cli import main
from moeapps.training.optim import OptimizerConfig, ParamGroup
from tests.toy import FAST


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_wrong_rate_is_told_with_its_value(value: float) -> None:
    with pytest.raises(ValueError, match=f"^lr={value}: "):
        OptimizerConfig(lr=value)
    with pytest.raises(ValueError, match=rf"^a\.b: lr_mult={value}: "):
        OptimizerConfig(groups=[ParamGroup("a.b", lr_mult=value)])
    with pytest.raises(ValueError, match=rf"^a\.b: lr={value}: "):
        OptimizerConfig(groups=[ParamGroup("a.b", lr=value)])


@pytest.mark.medium
def test_a_seed_of_no_kind_is_told_in_one_line_and_a_missing_gpu_with_advice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", *FAST, "--seed_everything", "abc"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: seed_everything: given 'abc', allowed: bool or int"
    if not torch.cuda.is_available():
        assert main(["fit", *FAST, "--trainer.accelerator", "gpu"]) == 2
        assert "--trainer.accelerator gpu: no GPU that torch can use is found here; leave it out" in (
            capsys.readouterr().err
        )


def test_a_page_is_written_into_no_file_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "x.pdf")]) == 2
    assert f"-o {tmp_path / 'x.html'}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_grid_that_is_not_there_is_told_with_the_nearest_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evidence", "mixr"]) == 2
    assert "did you mean benchmarks/grids/mixer.yaml? there are: benchmarks/grids/aw_moe" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["evidence", "mixr"]) == 2
    assert "see `moeapps evidence --help`" in capsys.readouterr().err


def test_small_packages_have_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert ", 22.8 kB, " in out
    assert ", 0.0 MB" not in out
