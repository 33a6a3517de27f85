# SPDX-License-Identifier: Apache-2.0
"""What a run has made is not lost: damaged checkpoints, models that diverge, reports that fail, interrupts."""

from __future__ import annotations

import csv
import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from moeapps.cli import main
from moeapps.commands.run import run
from moeapps.training.callbacks import DivergedError, StopDiverged
from moeapps.training.checkpoints import CheckpointError, check_whole, read_checkpoint
from tests.systems import BASES, name, tiny
from tests.toy import TOY

pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("no_routing_figures", "restored_signals")]

QUIET = ["--trainer.enable_model_summary", "false", "--test_after_fit", "false"]
FIT = ["fit", *TOY, *QUIET]
ADD = "--trainer.callbacks+="


def folder(tmp_path: Path, version: int = 0, system: str = "toy") -> Path:
    return tmp_path / "runs" / system / "base" / f"version_{version}"


def flip(path: Path, bit: int | None = None) -> None:
    """Flip one bit of a file, in its middle unless said otherwise."""
    content = bytearray(path.read_bytes())
    bit = 4 * len(content) if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = read_checkpoint(path)["state_dict"]
    return found


def all_finite(path: Path) -> bool:
    return all(bool(value.isfinite().all()) for value in state_of(path).values())


# Checkpoints -----------------------------------------------------------------------------------------------------


def test_a_damaged_last_checkpoint_is_passed_over_and_a_damaged_best_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run([*FIT, "--trainer.max_epochs", "2"])
    held = folder(tmp_path) / "checkpoints"
    assert {path.name for path in held.iterdir()} == {
        *("best.ckpt", "best.ckpt.sha256", "last.ckpt", "last.ckpt.sha256")
    }
    flip(held / "last.ckpt")
    resumed = run(["fit", "--run", str(folder(tmp_path)), *QUIET, "--trainer.max_epochs", "3"])

    assert f"last.ckpt in {held} is damaged; going on from best.ckpt" in caplog.messages
    assert resumed.config.fit.ckpt_path == str(held / "best.ckpt")
    assert resumed.trainer.global_step == 27
    flip(held / "best.ckpt")
    for words in (["test"], ["test", "--ckpt_path", "best"], ["fit"]):
        assert main([words[0], "--run", str(folder(tmp_path)), *words[1:]]) == 2
        assert "checkpoints/" in (error := capsys.readouterr().err)
        assert "is damaged: it is not what" in error
    # The best so far that a resumed run would take along is damaged: the rest of the run chooses its own.
    later = folder(tmp_path, 1) / "checkpoints"
    flip(later / "best.ckpt")
    again = run(["fit", "--run", str(later.parent), *QUIET, "--trainer.max_epochs", "4"])
    assert f"{later / 'best.ckpt'} is damaged or gone; the best of the epochs from here on is kept instead" in (
        caplog.messages
    )
    assert again.trainer.checkpoint_callback.best_model_path == str(folder(tmp_path, 2) / "checkpoints" / "best.ckpt")
    assert read_checkpoint(folder(tmp_path, 2) / "checkpoints" / "best.ckpt")["epoch"] == 3


def test_a_fit_that_finds_nothing_left_to_train_leaves_a_folder_to_go_on_from(tmp_path: Path) -> None:
    run([*FIT, "--trainer.max_epochs", "2"])
    run(["fit", "--run", str(folder(tmp_path)), *QUIET])

    first, again = (folder(tmp_path, version) / "checkpoints" for version in (0, 1))
    for file in ("best.ckpt", "last.ckpt"):
        assert (again / file).read_bytes() == (first / file).read_bytes()
    check_whole(again / "last.ckpt")
    longer = run(["fit", "--run", str(again.parent), *QUIET, "--trainer.max_epochs", "3"])
    assert longer.config.fit.ckpt_path == str(again / "last.ckpt")
    assert longer.trainer.global_step == 27


def test_last_and_best_are_those_of_the_named_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--ckpt_path", "last"]) == 2
    assert "--ckpt_path last: no run in" in capsys.readouterr().err
    run([*FIT, "--trainer.max_epochs", "1"])
    run([*FIT, "--trainer.max_epochs", "1", "--name", "other", "--seed_everything", "9"])
    (folder(tmp_path).parent / "version_1").mkdir()  # claimed by a run that was killed at once

    for which in ("last", "best"):
        built = run(["validate", *TOY, "--ckpt_path", which])
        path = folder(tmp_path) / "checkpoints" / f"{which}.ckpt"
        assert built.config.validate.ckpt_path == str(path)
        assert all(torch.equal(value, built.model.state_dict()[key]) for key, value in state_of(path).items())
    named = run(["validate", "--run", str(folder(tmp_path)), "--ckpt_path", "last"])
    assert named.config.validate.ckpt_path == str(folder(tmp_path) / "checkpoints" / "last.ckpt")


def test_nothing_is_tested_or_predicted_with_weights_as_they_are_drawn_unless_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("test", "predict", "validate"):
        assert main([command, *TOY]) == 2
        assert f"{command} needs trained weights: give --run DIR" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["test", *TOY, "--untrained"]) == 0
    assert (folder(tmp_path) / "metrics" / "test.json").is_file()


@pytest.mark.parametrize(
    "flag", ["--trainer.max_epochs=0", "--trainer.max_steps=0", "--trainer.limit_train_batches=0.0"]
)
def test_a_fit_that_takes_no_step_is_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would test weights as they are drawn, and its results would look like those of a training."""
    assert main(["fit", *TOY, flag]) == 2
    told = capsys.readouterr().err
    assert flag.removeprefix("--") in told
    assert "moeapps test --untrained" in told
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_callback_of_the_users_stands_beside_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "lightning.pytorch.callbacks.ModelCheckpoint"
    for option, told in (("save_last=true", "save_last is not allowed"), ("filename=best", "choose another name")):
        assert main([*FIT, f"{ADD}{kind}", f"--trainer.callbacks.{option}"]) == 2
        assert told in capsys.readouterr().err
    done = run([*FIT, "--trainer.max_epochs", "2", f"{ADD}{kind}", "--trainer.callbacks.save_top_k=-1"])

    names = {path.name for path in (folder(tmp_path) / "checkpoints").glob("*.ckpt")}
    assert names == {"best.ckpt", "last.ckpt", "epoch=0-step=9.ckpt", "epoch=1-step=18.ckpt"}
    assert done.trainer.checkpoint_callback.best_model_path.endswith("best.ckpt")


def test_a_run_whose_folder_is_deleted_ends_with_whole_checkpoints(tmp_path: Path) -> None:
    run([*FIT, f"{ADD}tests.toy_callbacks.DeleteRun", "--trainer.max_epochs", "3"])

    path = folder(tmp_path) / "checkpoints" / "last.ckpt"
    assert read_checkpoint(path)["global_step"] == 27


# Models that diverge ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_advice_before_it_reaches_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison = [f"{ADD}tests.toy_callbacks.Poison", "--trainer.callbacks.batches=[12]"]
    assert main([*FIT, *poison]) == 2

    error = capsys.readouterr().err
    assert "the loss of step 12 is not finite (nan); lower model.init_args.optimizer.lr, clip gradients" in error
    assert "configs/debug/anomaly.yaml" in error
    held = folder(tmp_path) / "checkpoints"
    assert {path.name for path in held.glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}
    assert [read_checkpoint(held / name)["epoch"] for name in ("best.ckpt", "last.ckpt")] == [0, 0]


@pytest.mark.parametrize("step", [8, 17], ids=["first epoch's end", "second epoch's end"])
def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path: Path, step: int) -> None:
    # The last step of an epoch: its loss was finite, and accuracy is defined also for logits that are not.
    with pytest.raises(DivergedError, match=rf"net\.first\.weight is not finite after step {step + 1}; lower"):
        run([*FIT, f"{ADD}tests.toy_callbacks.Poison", f"--trainer.callbacks.weight={step}"])

    found = list((folder(tmp_path) / "checkpoints").glob("*.ckpt"))
    assert len(found) == (0 if step == 8 else 2)
    assert all(all_finite(path) for path in found)


def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def words(skip: int) -> list[str]:
        poison = [f"{ADD}tests.toy_callbacks.Poison", "--trainer.callbacks.batches=[3, 4, 11]"]
        tape = [f"{ADD}tests.toy_callbacks.StepTape"]
        return [
            *FIT,
            *poison,
            *tape,
            f"{ADD}moeapps.training.callbacks.StopDiverged",
            f"--trainer.callbacks.skip={skip}",
        ]

    with pytest.raises(DivergedError, match=r"3 steps had a loss or gradient that is not finite, and skip=2"):
        run(words(2))
    done = run([*words(3), "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"])

    watch = next(callback for callback in done.trainer.callbacks if isinstance(callback, StopDiverged))
    assert watch.skipped == 3
    assert "3 steps were left out: their loss or gradient was not finite" in caplog.messages
    states = next(callback for callback in done.trainer.callbacks if hasattr(callback, "states")).states
    same = [all(torch.equal(a[key], b[key]) for key in a) for a, b in pairwise(states)]
    assert [step + 1 for step, equal in enumerate(same) if equal] == [3, 4, 11]  # weights and running statistics
    assert all_finite(folder(tmp_path, 1) / "checkpoints" / "last.ckpt")
    with (folder(tmp_path, 1) / "metrics.csv").open() as file:
        counted = [float(row["train/skipped"]) for row in csv.DictReader(file) if row.get("train/skipped")]
    assert [counted[step] for step in (2, 3, 4, 10, 11, 17)] == [0, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match=r"skip=-1"):
        StopDiverged(-1)


# Reports that fail -----------------------------------------------------------------------------------------------


def test_a_report_that_fails_costs_nothing_but_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ["fit", *TOY, "--trainer.max_epochs", "1"]
    run([*one, "--name", "whole"])
    with pytest.warns(RuntimeWarning, match=r"FailingReport failed in on_test_epoch_end .*images that are not numbers"):
        run([*one, f"{ADD}tests.toy_callbacks.FailingReport"])

    def results(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((path / "metrics" / "test.json").read_text())
        return found

    failed, whole = results(folder(tmp_path)), results(tmp_path / "runs" / "toy" / "whole" / "version_0")
    assert failed["rows"] == whole["rows"]
    assert "half" not in failed["summary"]
    told = "ArithmeticError: the distance of images that are not numbers"
    assert failed["header"]["failed_reports"] == {"FailingReport": told}
    assert "failed_reports" not in whole["header"]
    monkeypatch.setenv("MOEAPPS_DEBUG", "1")
    with pytest.raises(ArithmeticError):
        run([*one, f"{ADD}tests.toy_callbacks.FailingReport"])


# Interrupts ------------------------------------------------------------------------------------------------------


def test_ctrl_c_inside_a_step_waits_for_its_end_and_fit_goes_on_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run([*FIT, f"{ADD}tests.toy_callbacks.RowTape", "--trainer.max_epochs", "2"])
    press = [f"{ADD}tests.toy_callbacks.PressKeyInside", "--trainer.callbacks.step=12"]
    with pytest.raises(SystemExit):
        run([*FIT, *press, f"{ADD}tests.toy_callbacks.RowTape", "--trainer.max_epochs", "2"])
    interrupted = folder(tmp_path, 1) / "checkpoints" / "interrupted.ckpt"
    assert read_checkpoint(interrupted)["global_step"] == 13
    signal.signal(signal.SIGINT, signal.default_int_handler)
    told = next(line for line in caplog.messages if line.startswith("interrupted; go on with: "))
    words = told[told.index(" fit ") :].split()
    assert words == ["fit", "--run", str(folder(tmp_path, 1))]
    resumed = run([*words, *QUIET, "--trainer.max_epochs", "2", "--trainer.callbacks", "tests.toy_callbacks.RowTape"])

    assert resumed.config.fit.ckpt_path == str(interrupted)
    rows = [next(c.rows for c in done.trainer.callbacks if hasattr(c, "rows")) for done in (whole, resumed)]
    assert rows[1] == rows[0][13:]
    assert all(torch.equal(value, resumed.model.state_dict()[key]) for key, value in whole.model.state_dict().items())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def scores(path: Path) -> list[str]:
    with (path / "metrics.csv").open() as file:
        return [row["val/seen/accuracy"] for row in csv.DictReader(file) if row["val/seen/accuracy"]]


class SaveInValidation(L.Callback):
    """Write a checkpoint within the validation of the second epoch, as SLURM's signal does, and go on."""

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int, loader: int = 0
    ) -> None:
        if trainer.current_epoch == 1 and (i, loader) == (1, 1) and not trainer.sanity_checking:
            trainer.save_checkpoint(Path(str(trainer.log_dir)) / "hpc_ckpt_1.ckpt")


def test_a_checkpoint_written_within_a_validation_goes_on_with_all_of_it(tmp_path: Path) -> None:
    whole = run([*FIT, f"{ADD}test_nothing_lost.SaveInValidation", "--trainer.max_epochs", "3"])
    path = folder(tmp_path) / "hpc_ckpt_1.ckpt"
    resumed = run([*FIT, "--ckpt_path", str(path), "--trainer.max_epochs", "3"])

    assert len(scores(folder(tmp_path))) == 3
    assert scores(folder(tmp_path, 1)) == scores(folder(tmp_path))[1:]
    assert all(torch.equal(value, resumed.model.state_dict()[key]) for key, value in whole.model.state_dict().items())


def test_ctrl_c_in_a_validation_stops_at_once_and_its_scores_are_made_anew(tmp_path: Path) -> None:
    run([*FIT, "--trainer.max_epochs", "3"])
    with pytest.raises(SystemExit):
        run([*FIT, f"{ADD}tests.toy_callbacks.PressKeyInValidation", "--trainer.max_epochs", "3"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(["fit", "--run", str(folder(tmp_path, 1)), *QUIET, "--trainer.callbacks", "null"])

    assert scores(folder(tmp_path, 2)) == scores(folder(tmp_path))[1:]
    best = [read_checkpoint(folder(tmp_path, k) / "checkpoints" / "best.ckpt")["epoch"] for k in (0, 2)]
    assert best[0] == best[1]


# Every system ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES, ids=name)
def test_a_system_loses_nothing(tmp_path: Path, base: Path) -> None:
    flags = [*tiny(base), "--test_after_fit", "false", "--trainer.max_epochs", "3"]
    whole = run(["fit", *flags])
    with pytest.raises(SystemExit):
        run(["fit", *flags, f"{ADD}tests.toy_callbacks.PressKeyInside", "--trainer.callbacks.step=2"])
    held = folder(tmp_path, 1, base.stem) / "checkpoints"
    interrupted = read_checkpoint(held / "interrupted.ckpt")
    for state in interrupted["callbacks"].values():  # whatever counts steps counts alike
        assert state.get("steps", 3) == 3
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resumed = run(["fit", "--run", str(held.parent), "--test_after_fit", "false"])
    state = resumed.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.model.state_dict().items())

    generator = torch.Generator().manual_seed(0)
    for file in ("interrupted.ckpt", "last.ckpt", "best.ckpt"):
        size = 8 * (held / file).stat().st_size
        for bit in torch.randint(size, (20,), generator=generator).tolist():
            flip(held / file, bit)
            with pytest.raises(CheckpointError):
                check_whole(held / file)
            flip(held / file, bit)
        check_whole(held / file)

    with pytest.raises(DivergedError, match="is not finite"):
        run(["fit", *flags, f"{ADD}tests.toy_callbacks.Poison", "--trainer.callbacks.weight=2"])
    spoilt = list((folder(tmp_path, 3, base.stem) / "checkpoints").glob("*.ckpt"))
    assert all(all_finite(path) for path in spoilt)
    assert not any(path.name == "interrupted.ckpt" for path in spoilt)
