# SPDX-License-Identifier: Apache-2.0
"""A run is of one system: configs of another one, and words that name none, are told before anything is built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moeapps.commands.boundary import UsageError
from moeapps.commands.names import KEYS, check
from moeapps.commands.trained import build
from tests.systems import BASELINES, BASES, base_of, flags


def test_a_second_base_config_is_told(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("system: own\nmodel: {class_path: own.Task}\ndata: {class_path: own.Data}\n")
    for first, second in zip(BASES, [*BASES[1:], own], strict=True):
        told = f"{second} is the config of {second.stem}, {first} that of {first.stem}, and"
        with pytest.raises(UsageError, match=re.escape(told)):
            check(["fit", *flags(first, second), "--ckpt_path", "last"])
        with pytest.raises(UsageError, match=re.escape(told)):
            build(None, [first, second])
    check(["fit", *flags(BASES[0], BASES[0])])


def test_a_config_of_another_system_than_the_run_is_told(tmp_path: Path) -> None:
    for base, other in zip(BASES, [*BASES[1:], BASES[0]], strict=True):
        run = tmp_path / base.stem
        run.mkdir()
        (run / "config.yaml").write_text(base.read_text())
        overlay = next(file for file in BASELINES if base_of(file) == other)
        for file in (other, overlay):
            told = f"{file} is of {other.stem}, the run is of {base.stem}; "
            for command in ("fit", "test"):
                with pytest.raises(UsageError, match=re.escape(told)):
                    check([command, "--run", str(run), *flags(file)])
            with pytest.raises(UsageError, match=re.escape(told)):
                build(run, [file])
        check(["test", "--run", str(run), *flags(base)])


@pytest.mark.parametrize("command", [word for word in KEYS if word != "fit"])
def test_what_needs_weights_asks_for_a_run(command: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "home" / "base" / "version_0"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    told = f"nothing to {command}; give a run such as {run.parent}: moeapps {command} --run runs/SYSTEM/NAME"
    with pytest.raises(UsageError, match=re.escape(told)):
        check([command])
