# SPDX-License-Identifier: Apache-2.0
"""The command line: what it answers, how fast, and what it says when something is wrong."""

from __future__ import annotations

import importlib
import logging
import os
import resource
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI

from moeapps import cli
from moeapps.cli import COMMANDS, main
from moeapps.commands import doctor
from moeapps.commands.run import Cli, expand_run, run, usage
from moeapps.training.callbacks import TipFilter
from moeapps.training.precedence import differences, insert_config
from tests.toy import Holder

TOY = ["--config", "tests/toy.yaml"]
FAST = [*TOY, "--trainer.fast_dev_run", "true"]


def cpu_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_importing_the_cli_and_asking_for_help_loads_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from moeapps.cli import main; "
        "[main([w]) for w in ('--help', '--version', 'list')]; main([]); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'jsonargparse', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_takes_less_than_half_a_second_of_cpu() -> None:
    assert cpu_seconds("from moeapps.cli import main; main(['--help'])") < 0.5


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0

    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert max(len(line) for line in text.splitlines()) <= 120


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moeapps 0.")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in cli.RUN_COMMANDS])
def test_each_small_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"moeapps {name}" in capsys.readouterr().out


def test_fit_help_builds_only_the_parser_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0

    text = capsys.readouterr().out
    assert "--test_after_fit" in text
    assert "--system" in text


@pytest.mark.parametrize("command", sorted(cli.RUN_COMMANDS))
def test_help_begins_with_what_is_typed_and_its_examples_exist(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0

    text = capsys.readouterr().out
    assert text.index("--model ") < text.index("--trainer ")
    words = usage(command).split()
    assert text.split()[: len(words) + 1] == ["usage:", *words]
    assert all(Path(word).is_file() for word in words if word.startswith("configs/"))
    for module, _, name in (word.rpartition(".") for word in words if word.startswith("tasks.")):
        assert hasattr(importlib.import_module(module), name)


def test_help_of_a_task_class_shows_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model.help", "tests.toy.ToyTask"]) == 0
    assert "raise a ValueError at construction" in capsys.readouterr().out


def test_print_config_shows_defaults_of_nested_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *TOY, "--print_config"]) == 0

    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["net"]["init_args"]["dropout"] == 0.1
    assert "facts" not in config["model"]["init_args"]
    assert config["seed_everything"] == 0


# The alias -----------------------------------------------------------------------------------------------------------


def test_unknown_word_under_the_alias_names_moeapps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/lightning", "login"])
    monkeypatch.setattr(cli, "_lightning_sdk", lambda: None)

    assert main() == 2
    assert "moeapps" in capsys.readouterr().err


def test_unknown_word_under_the_alias_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/lightning", "login", "--here"])
    entry = EntryPoint("lightning", "tests.test_cli:foreign_main", "console_scripts")
    monkeypatch.setattr(cli, "_lightning_sdk", lambda: entry)

    assert main() == 7
    assert sys.argv[1:] == ["login", "--here"]


def foreign_main() -> int:
    return 7


def test_our_commands_under_the_alias_are_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/lightning", "fit", "--help"])
    assert main() == 0
    alias = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["/bin/moeapps", "fit", "--help"])
    assert main() == 0

    assert capsys.readouterr().out.split()[2:] == alias.split()[2:]


def test_misspelt_command_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    assert "did you mean `moeapps fit`" in capsys.readouterr().err


def test_doctor_says_who_owns_the_alias(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0

    text = capsys.readouterr().out
    assert all(word in text for word in ("lightning", "cache", "bf16", "threads"))
    assert doctor.script_owner("pytest") == ["pytest"]


# Wrong options -------------------------------------------------------------------------------------------------------

WRONG_FLAGS = [
    (
        ["--model.net.widht", "3"],
        ["model.net: unknown option 'widht' of ToyNet", "did you mean 'width'", "num_classes"],
    ),
    (["--model.optimizer.lrr", "3"], ["model.optimizer", "'lrr' of OptimizerConfig", "did you mean 'lr'"]),
    (["--trainer.max_epoch", "3"], ["unknown key 'trainer.max_epoch'", "did you mean 'max_epochs'"]),
    (["--foo", "1"], ["unknown key 'foo'", "allowed:", "trainer"]),
    (["--data.batchsize", "4"], ["data: unknown option 'batchsize' of ToyData", "did you mean 'batch_size'"]),
    (["--model.net.width", "abc"], ["model.net.width: given 'abc', allowed: int"]),
    (["--data.mixing", "stirred"], ["data.mixing: given 'stirred'", "'concat', 'balanced', 'one_domain'"]),
    (["--model", "tests.toy.ToyTusk"], ["no class 'tests.toy.ToyTusk'", "did you mean 'tests.toy.ToyTask'"]),
    (["--config", "nofile.yaml"], ["nofile.yaml"]),
    (["--model.fail", "true"], ["fail=True is not allowed; set it to false"]),
    (["--data.batch_size", "0"], ["batch_size=0"]),
    (["--model.net.moe", "moeapps.moe.presets.dense"], ["write it as class_path: moeapps.moe.presets.dense"]),
    (["--data.unseen", "[a]"], ["domain 'a' is given as seen and as unseen"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "texts"), WRONG_FLAGS, ids=[flags[0] for flags, _ in WRONG_FLAGS])
def test_wrong_flags_exit_with_2_and_a_short_text(
    flags: list[str], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *FAST, *flags]) == 2

    message = capsys.readouterr().err.split("error:")[-1]
    assert all(text in message for text in texts), message
    assert len(message.splitlines()) <= 8
    assert "Traceback" not in message


WRONG_YAML = [
    ("model: {init_args: {net: {init_args: {widht: 4}}}}", ["model.net: unknown option 'widht'", "width"]),
    ("model: {init_args: {net: {init_args: {moe: {init_args: {topk: 1}}}}}}",
     ["model.net.moe: unknown option 'topk' of point_moe", "did you mean 'top_k'", "num_experts"]),
    ("model: {init_args: {optimizer: {groups: [{patern: x}]}}}", ["ParamGroup", "did you mean 'pattern'"]),
    ("modle: {init_args: {net: 4}}", ["unknown key 'modle'", "did you mean 'model'"]),
    ("trainer: {max_epoch: 4}", ["unknown key 'trainer.max_epoch'", "max_epochs"]),
    ("trainer: {max_epochs: four}", ["trainer.max_epochs: given 'four', allowed: int"]),
    ("model: {init_args: {aux_losses: [{class_path: moeapps.moe.losses.SwitchBalance, init_args: {weigth: 1}}]}}",
     ["'weigth' of SwitchBalance", "did you mean 'weight'"]),
    ("model: [1", ["parsing"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "texts"), WRONG_YAML)
def test_wrong_yaml_exits_with_2_and_a_short_text(
    text: str, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)

    assert main(["fit", *FAST, "--config", str(file)]) == 2

    message = capsys.readouterr().err.split("error:")[-1]
    assert all(part in message for part in texts), message
    assert len(message.splitlines()) <= 8


def test_a_missing_config_file_is_told_before_anything_slow(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "configs/pointmoe.yaml"]) == 2
    assert "did you mean configs/point_moe.yaml?" in capsys.readouterr().err
    assert main(["fit", "--config=configs/nothing_like_it.yaml"]) == 2
    assert "there is no config file 'configs/nothing_like_it.yaml'" in capsys.readouterr().err


def test_list_of_a_system_says_what_each_baseline_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "mixer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(Path("configs/baselines").glob("mixer_*.yaml")))
    assert all(line.split()[0].startswith("configs/baselines/mixer_") and len(line.split()) > 3 for line in lines)
    assert main(["list", "mixr"]) == 2


def test_no_config_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    assert "moeapps list" in capsys.readouterr().err


def test_debug_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fail=True"):
        main(["fit", *FAST, "--model.fail", "true", "--debug"])
    monkeypatch.setenv("MOEAPPS_DEBUG", "1")
    with pytest.raises(ValueError, match="fail=True"):
        main(["fit", *FAST, "--model.fail", "true"])


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
    assert "no config.yaml there" in capsys.readouterr().err


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
