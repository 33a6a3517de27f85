# SPDX-License-Identifier: Apache-2.0
"""What the command line says when something is wrong: a short text that names it, and code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeapps.cli import main
from moeapps.commands.tasks import moved_paths
from tests.toy import FAST

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
    (["--data.num_workers", "-1"], ["num_workers=-1; use 0"]),
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


COMPLAINTS = [  # a leaf of the parser's tree of errors, as it gives it; what is told
    (
        """Parser key "model":
  Errors:
    - Problem with given class_path 'mine.module.Task':
        Parser key "net":
          Type collections.abc.Callable[[dict[str, typing.Any]], mine.model.Net] expects a function or a callable """
        """class: Parser key "width":
            Expected a <class 'int'>. Got value: abc. Got value: Namespace(class_path='mine.model.Net')
    - Expected a <class 'NoneType'>""",
        "model.net.width: given 'abc', allowed: int",
    ),
    (
        """Parser key "data":
  Errors:
    - Problem with given class_path 'mine.datamodule.Data':
        Parser key "source":
          Problem with given class_path 'mine.datamodule.Recorded':
            the following arguments are required: folder
    - Expected a <class 'NoneType'>""",
        "data.source: missing: folder\ngive --data.source.folder VALUE, or the same in a config, below init_args",
    ),
]


@pytest.mark.parametrize(("raw", "told"), COMPLAINTS)
def test_a_complaint_names_the_option_and_what_to_give(raw: str, told: str) -> None:
    from moeapps.commands.messages import ShortErrorParser, explain

    assert explain(raw, ShortErrorParser(), {}) == told


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


def test_options_passed_on_to_another_function_are_suggested_and_what_it_fixes_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overlays = ["--config", "configs/home.yaml", "--config", "configs/baselines/home_cgc.yaml"]
    assert main(["fit", *overlays, "--model.net.init_args.bank.init_args.shard_experts", "3"]) == 2

    message = capsys.readouterr().err.split("error:")[-1]
    assert "unknown option 'shard_experts' of cgc" in message
    assert "did you mean 'shared_experts'" in message
    assert "levels" not in message


def test_a_missing_config_file_is_told_before_anything_slow(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "configs/pointmoe.yaml"]) == 2
    assert "did you mean configs/point_moe.yaml?" in capsys.readouterr().err
    assert main(["fit", "--config=configs/nothing_like_it.yaml"]) == 2
    assert "there is no config file 'configs/nothing_like_it.yaml'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tasks.py", "tasks/__init__.py"])
@pytest.mark.parametrize(
    "words", [["fit", "--config", "configs/home.yaml"], ["data", "list"], ["sample", "--run", "x"]]
)
def test_something_else_called_tasks_is_told_in_one_line(name: str, words: list[str], tmp_path: Path) -> None:
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_text("raise RuntimeError('imported')\n")
    code = f"import sys; sys.path.append({str(Path.cwd())!r}); from moeapps.cli import main; sys.exit(main({words!r}))"

    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)

    shown = str(tmp_path / name.partition("/")[0])
    assert (found.returncode, found.stderr.splitlines()) == (
        2,
        [f"error: {shown} hides the package `tasks` of moeapps; rename it, or run moeapps in another folder"],
    )


def test_a_class_path_of_before_is_told_with_its_new_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = "tasks.point_cloud.attention.Attention", "tasks.point_cloud.nets.attention.Attention"
    file = tmp_path / "old.yaml"
    file.write_text(f"model: {{init_args: {{net: {{class_path: {old}}}}}}}")

    assert main(["fit", *FAST, "--config", str(file)]) == 2

    message = capsys.readouterr().err
    assert f"{file}: {old} is now {new}. Write the new path; checkpoints from before the move" in message
    assert len(message.splitlines()) == 1


def test_a_checkpoint_of_before_is_told_with_the_new_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = {"class_path": "tasks.point_cloud.attention.Attention"}
    file = tmp_path / "old.ckpt"
    torch.save({"hyper_parameters": {"_class_path": "tests.toy.ToyTask", "net": net}}, file)

    assert main(["fit", *FAST, "--ckpt_path", str(file)]) == 2

    message = capsys.readouterr().err
    assert f"error: {file}: {net['class_path']} is now tasks.point_cloud.nets.attention.Attention" in message
    assert "checkpoints from before the move are not supported" in message


def test_no_config_of_ours_has_a_class_path_of_before() -> None:
    texts = [path.read_text(encoding="utf-8") for path in Path("configs").rglob("*.yaml")]

    assert not moved_paths("\n".join(texts))


def test_a_task_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *FAST, "--model.net", "tasks.nobody.model.Net"]) == 2
    assert "there is no task package tasks.nobody; there are: adaptation, audio, " in capsys.readouterr().err


def test_no_config_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    assert "moeapps list" in capsys.readouterr().err


def test_debug_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fail=True"):
        main(["fit", *FAST, "--model.fail", "true", "--debug"])
    monkeypatch.setenv("MOEAPPS_DEBUG", "1")
    with pytest.raises(ValueError, match="fail=True"):
        main(["fit", *FAST, "--model.fail", "true"])
