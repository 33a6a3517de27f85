# SPDX-License-Identifier: Apache-2.0
"""The command line: what it answers and how fast, also under its alias and wherever it is installed."""

from __future__ import annotations

import importlib
import inspect
import resource
import signal
import subprocess
import sys
import typing
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from moeapps import cli
from moeapps.cli import COMMANDS, main
from moeapps.commands import doctor
from moeapps.commands.listing import all_configs, find_config, located
from moeapps.commands.run import Cli, run, usage
from moeapps.commands.tasks import task_commands
from tests.toy import TOY

ALL_COMMANDS = [*COMMANDS, *task_commands()]


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
    assert all(name in text for name in ALL_COMMANDS)
    assert max(len(line) for line in text.splitlines()) <= 120


def test_output_that_nobody_reads_any_more_ends_silently() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "moeapps", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # `| head -0`

    told = process.stderr.read()
    code = process.wait()
    process.stderr.close()

    assert told == b""
    assert code == 128 + signal.SIGPIPE  # what a shell says of a program that the signal has ended


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moeapps 0.")


@pytest.mark.parametrize("name", [name for name in ALL_COMMANDS if name not in cli.RUN_COMMANDS])
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


# Installed anywhere --------------------------------------------------------------------------------------------------


def test_what_list_shows_can_be_typed_anywhere_and_a_file_of_the_user_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Path("configs/home.yaml").resolve()
    shown = all_configs()
    monkeypatch.chdir(tmp_path)

    assert all_configs() == shown
    assert find_config("configs/home.yaml") == here
    assert located(
        ["fit", "--config", "configs/home.yaml", "--config=configs/home.yaml", "--name", "configs/home.yaml"]
    )[2:] == [str(here), f"--config={here}", "--name", "configs/home.yaml"]
    Path("configs").mkdir()
    Path("configs/home.yaml").write_text("# mine\n")
    assert find_config("configs/home.yaml") == Path("configs/home.yaml")
    assert main(["list"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()[:3]
    assert first.startswith("configs/aw_moe.yaml  ")
    assert second.split() == ["configs/home.yaml", "mine"]
    assert third.startswith("configs/meta_dmoe.yaml  ")


def test_list_of_a_system_says_what_each_baseline_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "mixer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(Path("configs/baselines").glob("mixer_*.yaml")))
    assert all(line.split()[0].startswith("configs/baselines/mixer_") and len(line.split()) > 3 for line in lines)
    assert main(["list", "mixr"]) == 2


@pytest.mark.parametrize("kinds", [int | float | None, float | int | None], ids=str)
def test_one_batch_is_not_all_batches_whichever_type_is_tried_first(
    kinds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for clear in typing._cleanups:  # else the order is that of whoever asked for this union first
        clear()
    plain = inspect.unwrap(L.Trainer.__init__)
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"):
        monkeypatch.setitem(plain.__annotations__, name, kinds)
    overlay = tmp_path / "one.yaml"
    overlay.write_text("trainer:\n  limit_test_batches: 1\n  limit_val_batches: 0.5\n")
    words = ["fit", "--config", "configs/mixer.yaml", "--config", str(overlay), "--trainer.limit_train_batches=1"]

    with pytest.raises(SystemExit):
        run([*words, "--trainer.limit_predict_batches", "1.0", "--print_config"])

    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    found = [trainer[f"limit_{stage}_batches"] for stage in ("train", "test", "val", "predict")]
    wanted = [(int, 1), (int, 1), (float, 0.5), (float, 1.0)]
    assert [(type(value), value) for value in found] == wanted
    trainer = Cli([*words[1:], "--trainer.limit_predict_batches", "1.0"], run=False).trainer
    found = [getattr(trainer, f"limit_{stage}_batches") for stage in ("train", "test", "val", "predict")]
    assert [(type(value), value) for value in found] == wanted
