# SPDX-License-Identifier: Apache-2.0
"""Stages: a run begins as an earlier one ended, trains what it names alone, and counts what all have cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from moeapps.commands.run import Cli, main, run
from moeapps.moe.losses import Anneal, ChosenBalance
from moeapps.moe.presets import dense, unimoe_audio
from moeapps.training.callbacks import AveragedWeights
from moeapps.training.stages import FromCheckpoint, Fused, Origin, StageError, parts_of, read_source
from tests.toy import ToyData, ToyNet, ToyTask
from tests.toy_callbacks import WeightTape

pytestmark = pytest.mark.usefixtures("no_routing_figures")

FIT = ["fit", "--config", "tests/toy.yaml", "--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=0"]
QUIET = ["--test_after_fit=false", "--trainer.enable_model_summary=false"]
START = "--model.start=moeapps.training.stages.FromCheckpoint"


def weights(done: Cli) -> WeightTape:
    return next(callback for callback in done.trainer.callbacks if isinstance(callback, WeightTape))


def stage(name: str, *words: str, source: str | None = None) -> Cli:
    start = [] if source is None else [START, f"--model.start.path={source}"]
    return run([*FIT, "--trainer.callbacks+=tests.toy_callbacks.WeightTape", f"--name={name}", *start, *words])


def folder(tmp_path: Path, name: str, version: int = 0) -> Path:
    return tmp_path / "runs" / "toy" / name / f"version_{version}"


def results(tmp_path: Path, name: str, version: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder(tmp_path, name, version) / "metrics" / "test.json").read_text())
    return found["header"]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of what is the same to the bit."""
    assert set(a) == set(b)
    return [key for key in a if torch.equal(a[key], b[key])]


def test_data_may_refuse_weights_that_were_trained_on_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(data: ToyData, state: dict[str, Any]) -> None:
        assert "sampler" in state
        raise ValueError("trained on other codes")

    stage("first", *QUIET)
    monkeypatch.setattr(ToyData, "check_trained_on", refuse)
    with pytest.raises(StageError, match=r"cannot start from .*last\.ckpt: trained on other codes"):
        stage("second", *QUIET, source=str(tmp_path / "runs" / "toy" / "first"))


def test_a_stage_begins_with_the_very_weights_that_the_run_before_ended_with(tmp_path: Path) -> None:
    first = stage("first", *QUIET)
    second = stage("second", *QUIET, "--seed_everything=5", source=str(tmp_path / "runs" / "toy" / "first"))

    assert len(equal(weights(first).last, weights(second).first)) == len(weights(first).last)
    assert len(equal(weights(second).first, weights(second).last)) < len(weights(first).last)


def test_the_best_checkpoint_can_be_asked_for_and_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    words = ["--trainer.max_epochs=3", "--model.optimizer.lr=1e-12", "--model.net.norm=true"]
    stage("first", *QUIET, *words)
    checkpoints = folder(tmp_path, "first") / "checkpoints"
    held = {
        name: torch.load(checkpoints / f"{name}.ckpt", weights_only=True)["state_dict"] for name in ("best", "last")
    }
    assert equal(held["best"], held["last"]) != list(held["best"])  # running statistics moved on
    source = str(folder(tmp_path, "first"))
    best = stage("a", *QUIET, "--model.start.checkpoint=best", source=source)
    file = stage("b", *QUIET, source=str(checkpoints / "best.ckpt"))

    for done in (best, file):
        assert equal(weights(done).first, held["best"]) == list(held["best"])


@pytest.mark.parametrize(
    ("patterns", "moved"),
    [
        (["*.router.*"], ["net.moe.router.score.weight"]),
        (["net.moe.router.*", "net.last.bias"], ["net.moe.router.score.weight", "net.last.bias"]),
    ],
)
def test_only_what_is_named_is_trained_and_all_else_stays_to_the_bit(patterns: list[str], moved: list[str]) -> None:
    done = stage("some", *QUIET, f"--model.trained={json.dumps(patterns)}", "--model.optimizer.weight_decay=0.1")
    first, last = weights(done).first, weights(done).last

    assert "net.norm.running_mean" in first
    assert [key for key in first if key not in equal(first, last)] == [key for key in first if key in moved]


def test_without_a_pattern_everything_is_trained() -> None:
    done = stage("all", *QUIET)

    assert not set(equal(weights(done).first, weights(done).last)) & {name for name, _ in done.model.named_parameters()}


def test_running_statistics_of_a_norm_that_is_trained_do_move() -> None:
    done = stage("norm", *QUIET, '--model.trained=["net.norm.*"]')

    kept = equal(weights(done).first, weights(done).last)
    assert {key for key in weights(done).first if key.startswith("net.norm.")}.isdisjoint(kept)


def test_results_of_the_last_stage_count_the_whole_curriculum(tmp_path: Path) -> None:
    """9 steps of each of three stages; the frozen one is cheaper backward, so every stage is counted by itself."""
    runs = tmp_path / "runs" / "toy"
    own = {}
    for name, words in (("one", ()), ("two", ('--model.trained=["*.router.*"]',)), ("three", ())):
        stage(f"{name}_alone", *words)
        own[name] = results(tmp_path, f"{name}_alone")["train_flops"]
    stage("one")
    stage("two", '--model.trained=["*.router.*"]', source=str(runs / "one"))
    stage("three", source=str(runs / "two"))

    assert own["one"] == own["three"] > own["two"] > 0
    assert results(tmp_path, "one")["train_flops"] == own["one"]
    assert results(tmp_path, "two")["train_flops"] == own["one"] + own["two"]
    header = results(tmp_path, "three")
    assert header["train_flops"] == own["one"] + own["two"] + own["three"]
    assert header["train_steps"] == 9
    assert header["started_from"]["train_flops"] == own["one"] + own["two"]
    assert header["started_from"]["path"] == [str(folder(tmp_path, "two") / "checkpoints" / "last.ckpt")]
    assert "started_from" not in results(tmp_path, "one")


def test_the_cost_of_a_best_checkpoint_is_that_of_its_whole_run(tmp_path: Path) -> None:
    words = ["--trainer.max_epochs=3", "--model.optimizer.lr=1e-12", "--model.net.norm=false"]
    stage("long", *words, "--test_after_fit=false")
    checkpoints = folder(tmp_path, "long") / "checkpoints"
    state = torch.load(checkpoints / "best.ckpt", weights_only=True)

    assert state["epoch"] == 0
    whole = 3 * state["callbacks"]["MoESummary"]["train_flops"]
    assert read_source(checkpoints / "best.ckpt").train_flops == whole
    assert read_source(folder(tmp_path, "long"), "best").train_flops == whole


def test_a_cost_that_is_not_known_at_the_end_of_a_run_is_not_that_of_its_best(tmp_path: Path) -> None:
    for name, step, flops in (("best", 1, 7), ("last", 2, None)):
        callbacks = {"MoESummary": {"train_flops": flops}}
        torch.save({"state_dict": {}, "global_step": step, "callbacks": callbacks}, tmp_path / f"{name}.ckpt")

    assert read_source(tmp_path / "best.ckpt").train_flops is None
    assert read_source(tmp_path / "last.ckpt").train_flops is None


def test_a_cost_that_was_not_counted_is_not_made_up(tmp_path: Path) -> None:
    stage("first", *QUIET)
    stage("second", source=str(tmp_path / "runs" / "toy" / "first"))

    assert "train_flops" not in results(tmp_path, "second")
    assert results(tmp_path, "second")["started_from"]["train_flops"] is None


def test_a_resumed_stage_goes_on_from_itself_though_the_earlier_run_is_gone(tmp_path: Path) -> None:
    source = str(tmp_path / "runs" / "toy" / "first")
    stage("first", "--test_after_fit=false")
    whole = stage("second", "--trainer.max_epochs=2", source=source)
    keep = ["--trainer.callbacks+=tests.toy_callbacks.KeepEpochs", "--trainer.max_epochs=2"]
    stage("cut", *keep, "--test_after_fit=false", source=source)
    half = folder(tmp_path, "cut") / "checkpoints" / "epoch=0.ckpt"
    shutil.rmtree(source)
    resumed = stage("cut", "--trainer.max_epochs=2", f"--ckpt_path={half}", source=source)

    assert equal(weights(whole).last, weights(resumed).last) == list(weights(whole).last)
    a, b = results(tmp_path, "second"), results(tmp_path, "cut", 1)
    assert a["started_from"] == b["started_from"]
    assert (a["train_flops"], a["train_steps"]) == (b["train_flops"], b["train_steps"])


def test_a_finished_stage_is_tested_again_without_the_run_it_came_from(tmp_path: Path) -> None:
    stage("first", "--test_after_fit=false")
    stage("second", source=str(tmp_path / "runs" / "toy" / "first"))
    before = results(tmp_path, "second")
    shutil.rmtree(tmp_path / "runs" / "toy" / "first")
    run(["test", "--run", str(folder(tmp_path, "second"))])

    after = results(tmp_path, "second")
    assert {key: after[key] for key in ("train_flops", "started_from")} == {
        key: before[key] for key in ("train_flops", "started_from")
    }


def test_a_second_fit_of_the_same_task_goes_on_and_does_not_begin_again(tmp_path: Path) -> None:
    stage("first", *QUIET)
    data, tape = ToyData(), WeightTape()
    start = FromCheckpoint(str(folder(tmp_path, "first")))
    task = ToyTask(net=ToyNet(), facts=data.facts, start=start)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "max_epochs": 1, "accelerator": "cpu", "limit_val_batches": 0}
    L.Trainer(callbacks=[tape], default_root_dir=tmp_path, **options).fit(task, datamodule=data)
    ended = tape.last
    L.Trainer(callbacks=[tape], default_root_dir=tmp_path, **options).fit(task, datamodule=data)

    assert equal(tape.first, ended) == list(ended)


def test_averaged_weights_average_from_the_start(tmp_path: Path) -> None:
    first = stage("first", *QUIET)
    words = ["--trainer.callbacks+=moeapps.training.callbacks.AveragedWeights", "--model.optimizer.lr=1e-12"]
    second = stage("second", *QUIET, *words, "--model.net.norm=true", source=str(tmp_path / "runs" / "toy" / "first"))

    assert any(isinstance(callback, AveragedWeights) for callback in second.trainer.callbacks)
    for name, value in second.model.named_parameters():
        torch.testing.assert_close(value, weights(first).last[name], rtol=0, atol=1e-6)


# --- which part goes where ---


class Many(nn.Module):
    """Networks side by side.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(ToyNet(dense(expansion=2.0, activation="silu"), norm=False) for _ in range(count))


def tasked(net: nn.Module) -> ToyTask:
    return ToyTask(net=net, facts=ToyData().facts)  # type: ignore[arg-type]


def saved(tmp_path: Path, net: nn.Module, name: str = "x", flops: int | None = 7) -> str:
    """A checkpoint file of a task with this network."""
    file = tmp_path / f"{name}.ckpt"
    callbacks = {} if flops is None else {"MoESummary": {"train_flops": flops}}
    torch.save({"state_dict": tasked(net).state_dict(), "callbacks": callbacks}, file)
    return str(file)


def test_one_network_can_begin_many(tmp_path: Path) -> None:
    one, many = ToyNet(dense(expansion=2.0, activation="silu"), norm=False), tasked(Many(3))
    path = saved(tmp_path, one)
    FromCheckpoint(path, source="net", into=["net.nets.*"]).begin(many)

    for i in range(3):
        state = many.get_submodule(f"net.nets.{i}").state_dict()
        assert equal(state, one.state_dict()) == list(state)


def test_specialists_of_one_run_or_of_several_are_fused_alike(tmp_path: Path) -> None:
    many = Many(2)
    together = saved(tmp_path, many, flops=10)
    apart = [saved(tmp_path, net, f"net{i}", flops=4 + i) for i, net in enumerate(many.nets)]
    mixtures = []
    for start in (Fused(together, source="net.nets.*"), Fused(apart)):
        torch.manual_seed(1)
        task = tasked(ToyNet(unimoe_audio(num_experts=4), norm=False))
        origin = start.begin(task)
        mixtures.append((task.state_dict(), origin.train_flops))
    (a, cost_a), (b, cost_b) = mixtures

    assert equal(a, b) == list(a)
    assert (cost_a, cost_b) == (10, 4 + 5)
    expected = 2 * many.nets[1].moe.experts.w_out[0, :8]
    assert torch.equal(a["net.moe.experts.banks.0.w_out"][2], expected)


def test_parts_come_in_the_order_of_their_numbers() -> None:
    state = {f"net.nets.{i}.w": torch.tensor(float(i)) for i in (10, 2, 0)}

    assert [float(part["w"]) for part in parts_of(state, "net.nets.*").values()] == [0.0, 2.0, 10.0]
    assert list(parts_of({"net.a.w": torch.zeros(1), "net.b.w": torch.zeros(1)}, "net.a")) == ["net.a"]


def test_losses_of_the_earlier_stage_are_not_taken_along(tmp_path: Path) -> None:
    net = ToyNet()
    file = Path(saved(tmp_path, net))
    held = torch.load(file, weights_only=True)
    held["state_dict"]["aux_losses.0.steps_taken"] = torch.tensor(900)
    torch.save(held, file)
    task = tasked(ToyNet())
    task.aux_losses = nn.ModuleList([ChosenBalance(0.1, anneal=Anneal(0.01, 10))])
    FromCheckpoint(str(file)).begin(task)

    assert equal(task.net.state_dict(), net.state_dict()) == list(net.state_dict())
    assert int(task.aux_losses[0].steps_taken) == 0


def test_an_origin_survives_a_checkpoint() -> None:
    origin = Origin(("a", "b"), ("1", "2"), 5)

    assert Origin.of(json.loads(json.dumps(origin.as_dict()))) == origin


# --- what goes wrong is told in a sentence ---


def test_a_missing_run_is_told_by_the_command_before_data_are_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyData, "prepare_data", lambda self: pytest.fail("data were prepared"))
    code = main([*FIT, START, f"--model.start.path={tmp_path / 'nowhere'}"])

    assert code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: no checkpoint ")
    assert "train the earlier stage first" in error


def test_a_pattern_without_a_parameter_is_told_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, *QUIET, '--model.trained=["*.gate.*"]']) == 2
    assert "trained: '*.gate.*' matches no parameter; there are net.first.weight" in capsys.readouterr().err
    assert main([*FIT, *QUIET, "--model.trained=[]"]) == 2
    assert "trains nothing" in capsys.readouterr().err


def test_other_networks_and_damaged_files_are_told_with_their_names(tmp_path: Path) -> None:
    path = saved(tmp_path, ToyNet(width=6))
    with pytest.raises(StageError, match=r"x\.ckpt: net\.first\.weight is \(6, 2\) there and \(8, 2\) here"):
        FromCheckpoint(path).begin(tasked(ToyNet()))
    with pytest.raises(StageError, match=r"lacks net\.moe\.experts\.b_in.*same layers"):
        FromCheckpoint(path).begin(tasked(ToyNet(dense(gated=False), width=6)))
    with pytest.raises(StageError, match=r"it has no part 'net\.nets\.\*'; it has net\.first\.bias"):
        Fused(path, source="net.nets.*").begin(tasked(ToyNet()))
    with pytest.raises(StageError, match=r"this task has no part 'net\.nets\.\*'"):
        FromCheckpoint(path, source="net", into=["net.nets.*"]).begin(tasked(ToyNet()))
    with pytest.raises(StageError, match="hidden width of 8"):
        Fused([saved(tmp_path, ToyNet(dense(expansion=2.0)))]).begin(tasked(ToyNet(dense(expansion=1.0))))
    (tmp_path / "y.ckpt").write_bytes(b"no zip")
    with pytest.raises(StageError, match=r"y\.ckpt is no readable checkpoint"):
        FromCheckpoint(str(tmp_path / "y.ckpt")).begin(tasked(ToyNet()))
    with pytest.raises(ValueError, match=r"path=\[\]"):
        Fused([])


def test_nothing_is_taken_over_where_something_does_not_fit(tmp_path: Path) -> None:
    path, task = saved(tmp_path, ToyNet(num_classes=3)), tasked(ToyNet())
    before = {key: value.clone() for key, value in task.state_dict().items()}
    with pytest.raises(StageError, match=r"net\.last\.weight"):
        FromCheckpoint(path).begin(task)

    assert equal(task.state_dict(), before) == list(before)
