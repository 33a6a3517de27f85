# SPDX-License-Identifier: Apache-2.0
"""Runs from the command line: configs merge, flags beat checkpoints beat YAML, and factories come out of YAML."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI

from moeapps.cli import main
from moeapps.commands.run import Cli, expand_run, run
from moeapps.training.callbacks import TipFilter
from moeapps.training.precedence import differences, insert_config
from tests.toy import FAST, TOY, Holder

pytestmark = pytest.mark.medium

# Configs and runs ----------------------------------------------------------------------------------------------------


def test_later_config_wins_and_merges_deeply(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("name: wide\nmodel: {init_args: {net: {init_args: {width: 12}}}}")

    built = Cli([*TOY, "--config", str(overlay)], run=False)

    assert built.model.net.first.out_features == 12
    assert built.config.model.init_args.net.init_args.dropout == 0.1
    assert built.config.name == "wide"


def test_facts_of_the_data_reach_the_model() -> None:
    built = Cli([*TOY, "--data.unseen", "[x, y]"], run=False)

    assert built.model.facts == built.datamodule.facts
    assert built.model.facts["domains"]["unseen"] == ["x", "y"]


def test_short_class_names_resolve_once_their_module_is_known() -> None:
    built = Cli([*TOY, "--model.schedule", "OneCycle", "--trainer.callbacks+=BiasBalancing"], run=False)

    assert type(built.model.schedule).__name__ == "OneCycle"
    assert any(type(callback).__name__ == "BiasBalancing" for callback in built.trainer.callbacks)


def test_default_seed_is_0_and_default_loggers_are_csv_and_tensorboard() -> None:
    built = Cli([*TOY], run=False)

    assert built.config.seed_everything == 0
    assert [type(logger).__name__ for logger in built.trainer.loggers] == ["CSVLogger", "TensorBoardLogger"]
    assert len({logger.log_dir for logger in built.trainer.loggers}) == 1


def test_csv_logger_is_never_off() -> None:
    built = Cli([*TOY, "--trainer.logger", "false"], run=False)

    assert [type(logger).__name__ for logger in built.trainer.loggers] == ["CSVLogger"]


def test_a_callback_from_yaml_replaces_the_default_of_its_kind() -> None:
    built = Cli([*TOY, "--trainer.callbacks+=moeapps.training.callbacks.RoutingMonitor"], run=False)

    kinds = [type(callback).__name__ for callback in built.trainer.callbacks]
    assert kinds.count("RoutingMonitor") == 1
    assert {"RandomState", "MoESummary", "EndTable", "BestCheckpoint", "SaveRun"} <= set(kinds) | {"SaveRun"}


def test_fast_dev_run_tests_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *FAST]) == 0

    assert "mean unseen" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_barebones_runs() -> None:
    assert main(["fit", *TOY, "--trainer.barebones", "true", "--trainer.enable_progress_bar", "null",
                 "--test_after_fit", "false", "--trainer.log_every_n_steps", "null"]) == 0  # fmt: skip


@pytest.mark.parametrize("words", [["test", "--run", "nowhere"], ["test", "--run=nowhere"], ["fit", "--run"]])
def test_a_folder_that_is_no_run_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert ("it holds no config.yaml" if words[0] == "fit" else "there is no such folder") in told
    assert f"such as {os.environ['MOEAPPS_RUNS']}/promoe" in told  # where runs are kept


def test_the_newest_runs_are_named_where_one_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOEAPPS_RUNS", str(tmp_path))
    for age, name in enumerate(["a", "b", "c", "d"]):
        for version in range(2):
            config = tmp_path / "toy" / name / f"version_{version}" / "config.yaml"
            config.parent.mkdir(parents=True)
            config.touch()
            os.utime(config, (1000 - age, 1000 - age))

    assert main(["test", "--run", "nowhere"]) == 2
    told = ", ".join(str(tmp_path / "toy" / name) for name in "abc")
    assert f"--run nowhere: there is no such folder; give a run such as {told} (4 in all)" in capsys.readouterr().err


def test_run_adds_config_and_best_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        (tmp_path / name).touch()

    words, folder = expand_run(["test", "--run", str(tmp_path), "--name", "x"])
    best = str(tmp_path / "checkpoints" / "best.ckpt")
    assert words == ["test", "--config", str(tmp_path / "config.yaml"), "--ckpt_path", best, "--name", "x"]
    assert folder == tmp_path
    words, folder = expand_run(["fit", f"--run={tmp_path}"])
    assert words[-1].endswith("last.ckpt")
    assert folder is None
    words, _ = expand_run(["test", "--run", str(tmp_path), "--ckpt_path", "mine.ckpt"])
    assert words.count("--ckpt_path") == 1


# Explicit flag > checkpoint > YAML -----------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    run(["fit", *TOY, "--model.net.width", "6", "--model.optimizer.lr", "0.002", "--trainer.max_epochs", "1",
         "--test_after_fit", "false"])  # fmt: skip
    return str(tmp_path / "runs" / "toy" / "base" / "version_0" / "checkpoints" / "last.ckpt")


def test_checkpoint_beats_yaml_and_flag_beats_checkpoint(checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moeapps"):
        flags = ["--model.optimizer.eps", "1e-6", "--trainer.max_epochs", "2"]
        resumed = run(["fit", *TOY, "--ckpt_path", checkpoint, *flags])

    assert resumed.model.net.first.out_features == 6
    assert resumed.model.optimizer_config.lr == 0.002
    assert resumed.model.optimizer_config.eps == 1e-6
    said = [record.getMessage() for record in caplog.records]
    assert "model.init_args.net.init_args.width: checkpoint 6 wins over config 8" in said
    assert "model.init_args.optimizer.lr: checkpoint 0.002 wins over config 0.01" in said
    assert "model.init_args.optimizer.eps: flag 1e-06 wins over checkpoint 1e-08" in said


def test_lightning_still_has_the_hook_that_the_precedence_hangs_on() -> None:
    assert callable(LightningCLI._parse_ckpt_path)
    assert "_parse_ckpt_path" in vars(Cli)


def test_checkpoint_options_go_after_the_files_and_before_the_flags() -> None:
    words = ["fit", "--config", "a.yaml", "--model.x", "2", "--config=b.yaml", "-c", "c.yaml", "--name=n"]
    files = ["--config", "a.yaml", "--config=b.yaml", "-c", "c.yaml"]
    assert insert_config(words, "p.yaml") == ["fit", *files, "--config", "p.yaml", "--model.x", "2", "--name=n"]


def test_differences_name_the_winner() -> None:
    assert differences({"a": 1, "b": {"c": 1}}, {"a": 2, "b": {"c": 1}}, {"a": 2, "b": {"c": 3}}) == [
        "model.a: checkpoint 2 wins over config 1",
        "model.b.c: flag 3 wins over checkpoint 1",
    ]


def test_checkpoints_load_with_weights_only(checkpoint: str) -> None:
    stored = torch.load(checkpoint, weights_only=True)

    assert stored["hyper_parameters"]["_class_path"] == "tests.toy.ToyTask"


# Factories out of YAML -----------------------------------------------------------------------------------------------


def test_a_preset_that_returns_a_factory_is_built_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Holder, "net")
    text = """
    net:
      class_path: tests.toy.Holder
      init_args:
        moe:
          class_path: tests.toy.outputs
          init_args:
            num_experts: 5
            router: {class_path: tests.toy.outputs, init_args: {num_experts: 7}}
    """
    net = parser.instantiate(parser.parse_string(text)).net

    assert [(layer.in_features, layer.out_features) for layer in net.layers] == [(4, 5), (6, 5)]
    assert net.layers[0] is not net.layers[1]


# What is shown, and where it is kept ---------------------------------------------------------------------------------


def test_the_tips_are_dropped_and_other_lines_kept() -> None:
    def shown(text: str) -> bool:
        return TipFilter().filter(logging.LogRecord("x", logging.INFO, "", 0, text, None, None))

    assert not shown("💡 Tip: For seamless cloud logging and experiment tracking, try installing litlogger")
    assert not shown("💡 Tip: For seamless cloud uploads and versioning, try installing [litmodels]")
    assert shown("`Trainer.fit` stopped: `max_epochs=3` reached.")


def test_no_tip_reaches_the_screen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(["fit", *FAST])

    assert not any("Tip:" in record.getMessage() for record in caplog.records)


def test_a_directory_named_in_the_environment_takes_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEAPPS_RUNS", str(tmp_path / "elsewhere"))
    built = Cli([*TOY], run=False)

    assert Path(built.trainer.log_dir) == tmp_path / "elsewhere" / "toy" / "base" / "version_0"
    assert os.environ["MOEAPPS_RUNS"].endswith("elsewhere")
