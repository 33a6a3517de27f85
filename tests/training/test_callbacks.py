# SPDX-License-Identifier: Apache-2.0
"""Monitor, balancing, progress, tables and the EMA overlay, on toy runs."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from moeapps.commands.run import run
from moeapps.moe import Dense, LinearScore, MLPExperts, MoELayer, MoERecorder, Router, TopK
from moeapps.moe.experts import GLUExperts
from moeapps.moe.presets import compose, dense, point_moe, top_k_router
from moeapps.moe.routing import Routing
from moeapps.training.callbacks import AveragedWeights, BiasBalancing, ProgressLines, progress_bar
from moeapps.training.callbacks.interrupts import program
from moeapps.training.callbacks.routing import RoutingMonitor, layer_report, rows_by_workers, same_for_all
from moeapps.training.callbacks.summary import MoESummary, summary_table
from moeapps.training.callbacks.table import score_table
from moeapps.training.cost import measure_cost
from moeapps.training.scores import ScoreRow, ScoreTable
from tests.toy import ToyData, ToyNet, ToyTask

TOY = ["fit", "--config", "tests/toy.yaml", "--trainer.max_epochs", "1", "--trainer.num_sanity_val_steps", "1"]
BIASED = ["--model.net.moe", '{"class_path": "tests.toy.biased_moe"}']
QUIET = ["--trainer.enable_model_summary", "false"]


def folder(tmp_path: Path, version: int = 0) -> Path:
    return tmp_path / "runs" / "toy" / "base" / f"version_{version}"


def test_monitor_counts_every_assignment_once_per_domain(tmp_path: Path) -> None:
    done = run([*TOY, *QUIET])

    report = json.loads((folder(tmp_path) / "metrics" / "routing_test.json").read_text())
    assert report["domains"] == ["a", "b", "c", "v", "u"]
    work = torch.tensor(report["layers"]["net.moe"]["work"])
    assert work.shape == (5, 4)
    assert work.sum(1).tolist() == [24 * 2] * 5  # 24 rows per domain, top 2
    assert (report["layers"]["net.moe"]["per_row"], report["layers"]["net.moe"]["given"]) == (2, 0)
    assert (folder(tmp_path) / "figures" / "routing_test.png").stat().st_size > 1000
    assert {f"moe_test/net.moe/{key}" for key in ("load_cv", "entropy", "dead", "mi_domain")} <= set(
        done.trainer.callback_metrics
    )


def test_validation_logs_the_documented_routing_keys() -> None:
    done = run([*TOY, *QUIET, "--test_after_fit", "false"])

    keys = set(done.trainer.callback_metrics)
    assert {f"moe/net.moe/{key}" for key in ("load_cv", "entropy", "dead", "mi_domain")} <= keys


@pytest.mark.parametrize(("chooser", "always"), [(TopK(2), False), (Dense(), True)])
def test_the_file_says_whether_every_expert_always_works(chooser: Any, always: bool) -> None:
    layer = MoELayer(Router(LinearScore(4, 3), chooser), MLPExperts(3, 4, 8))
    with MoERecorder(layer) as recorder:
        layer(torch.randn(10, 4))
    monitor = RoutingMonitor(figures=False)
    monitor._domains = ["a"]

    monitor.on_validation_batch_end(
        cast(Any, None), cast(Any, SimpleNamespace(last_records=recorder.records, last_domain="a"))
    )

    assert (recorder.records[0].name in monitor._always) is always


def test_rows_are_told_by_how_many_experts_work_on_them() -> None:
    row, expert = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 3, 3, 3])  # 3: no work
    counted = rows_by_workers(Routing(row, expert, torch.ones(6), num_rows=3, num_experts=3, top_k=2))

    assert counted.tolist() == [1, 1, 1, 0]
    assert same_for_all(counted) is None
    assert same_for_all(torch.tensor([5.0, 0.0, 7.0, 0.0])) == 2  # rows without work are no exception
    assert same_for_all(torch.zeros(4)) is None


def test_report_of_a_table_with_known_answers() -> None:
    apart = layer_report(torch.tensor([[4.0, 0.0], [0.0, 4.0]], dtype=torch.float64), torch.tensor(0.5))
    mixed = layer_report(torch.tensor([[4.0, 0.0], [4.0, 0.0]], dtype=torch.float64), torch.tensor(0.0))

    assert apart["mi_domain"] == pytest.approx(1.0)
    assert (apart["load_cv"], apart["dead"], apart["entropy"]) == (0.0, 0.0, 0.5)
    assert mixed["mi_domain"] == pytest.approx(0.0)
    assert (mixed["load_cv"], mixed["dead"]) == (1.0, 0.5)


def test_collapse_is_told_once_and_plainly(caplog: pytest.LogCaptureFixture) -> None:
    monitor = RoutingMonitor()
    report = {"net.moe": {"work": [[50.0, 0.0], [50.0, 0.0]]}, "net.b": {"work": [[1.0, 0.0]]}}
    with caplog.at_level(logging.WARNING, logger="moeapps"):
        monitor._warn(report)
        monitor._warn(report)

    assert len(caplog.records) == 1
    assert "expert 1 of net.moe got 0 of the mean load" in caplog.text
    assert "balance the router" in caplog.text


def test_bias_balancing_evens_out_a_lopsided_router() -> None:
    torch.manual_seed(0)
    flags = ["--trainer.callbacks", "tests.toy.FastBalancing", "--trainer.max_epochs", "4", "--test_after_fit", "false"]
    done = run([*TOY, *QUIET, *flags, *BIASED, "--trainer.accumulate_grad_batches", "2"])

    chooser = done.model.net.moe.router.choose
    assert chooser.bias.abs().sum() > 0
    assert float(chooser.bias.sum()) == pytest.approx(0.0, abs=1e-5)
    with_bias = done.trainer.callback_metrics["moe/net.moe/load_cv"]
    without = run([*TOY, *QUIET, *flags[2:], *BIASED])
    assert with_bias < without.trainer.callback_metrics["moe/net.moe/load_cv"]


def test_bias_balancing_without_a_bias_is_an_error() -> None:
    with pytest.raises(ValueError, match="balance_bias: true"):
        run([*TOY, *QUIET, "--trainer.callbacks", "BiasBalancing", "--trainer.num_sanity_val_steps", "0"])
    with pytest.raises(ValueError, match="rate=0"):
        BiasBalancing(rate=0.0)


def test_auxiliary_losses_are_added_and_logged() -> None:
    losses = '[{"class_path": "SwitchBalance", "init_args": {"weight": 0.5}}, {"class_path": "ZLoss"}]'
    done = run([*TOY, *QUIET, "--model.aux_losses", losses, "--test_after_fit", "false"])

    assert done.trainer.callback_metrics["train/aux/switch_balance"] >= 0.9
    assert "train/aux/z" in done.trainer.callback_metrics


def test_two_auxiliary_losses_of_one_name_are_refused() -> None:
    from moeapps.moe.losses import SwitchBalance

    with pytest.raises(ValueError, match="share a name"):
        ToyTask(net=ToyNet(), facts=ToyData().facts, aux_losses=[SwitchBalance(), SwitchBalance()])


def test_ema_overlay_keeps_the_average_and_the_live_weights(tmp_path: Path) -> None:
    run([*TOY, *QUIET, "--config", "configs/trainer/ema.yaml"])

    stored = torch.load(folder(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == set(stored["current_model_state"])
    assert any(not torch.equal(stored["state_dict"][k], stored["current_model_state"][k]) for k in stored["state_dict"])


def test_the_test_after_a_fit_and_a_later_one_both_use_the_average(tmp_path: Path) -> None:
    run([*TOY, *QUIET, "--config", "configs/trainer/ema.yaml", "--trainer.max_epochs", "1"])

    file = folder(tmp_path) / "metrics" / "test.json"
    first = json.loads(file.read_text())["rows"]
    run(["test", "--run", str(folder(tmp_path)), "--trainer.callbacks", "null"])
    assert json.loads(file.read_text())["rows"] == first


def test_average_is_the_closed_form() -> None:
    values = [torch.tensor([float(x)]) for x in range(1, 6)]
    for ema in (AveragedWeights(0.9), AveragedWeights(0.3, warmup=True)):
        mean = values[0].clone()
        expected, weights = float(values[0]), []
        for n, value in enumerate(values[1:], start=1):
            ema.average([mean], [value], torch.tensor(n))
            weights.append(min(ema.decay, (1 + n) / (10 + n)) if ema.warmup else ema.decay)
            expected = weights[-1] * expected + (1 - weights[-1]) * float(value)
        assert mean.item() == pytest.approx(expected)
        assert ema.warmup == (len(set(weights)) > 1)
    flag = torch.tensor([False])
    AveragedWeights(0.9).average([flag], [torch.tensor([True])], 3)
    assert flag.item()
    with pytest.raises(ValueError, match=r"decay=1\.0"):
        AveragedWeights(1.0)


def test_progress_is_lines_where_there_is_no_terminal() -> None:
    assert isinstance(progress_bar(), ProgressLines)


def test_progress_lines_do_not_flood(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moeapps"):
        run(
            [
                *TOY,
                *QUIET,
                "--trainer.enable_progress_bar",
                "true",
                "--trainer.max_epochs",
                "2",
                "--test_after_fit",
                "false",
            ]
        )

    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch")]
    assert len(lines) == 2
    assert all(key in lines[0] for key in ("train/loss", "val/seen/accuracy", "val/validation/accuracy", "9/9"))


def rendered(renderable: object, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_summary_shows_total_and_active_parameters_and_flops() -> None:
    task = ToyTask(net=ToyNet(point_moe(num_experts=4, top_k=2)), facts=ToyData().facts)
    cost = measure_cost(task, ToyData().example_batch())

    text = rendered(summary_table(task, cost, 2))
    for part in (f"{cost.total:,}", f"{cost.active:,}", f"{cost.flops_per_token:,.0f}", "2 of 4 experts", "net.first"):
        assert part in text
    with pytest.raises(ValueError, match="depth=0"):
        MoESummary(depth=0)


def test_summary_of_a_dense_twin_speaks_of_no_choice_and_names_frozen_parameters() -> None:
    task = ToyTask(net=ToyNet(dense()), facts=ToyData().facts)
    next(task.parameters()).requires_grad_(False)
    cost = measure_cost(task, ToyData().example_batch())

    text = rendered(summary_table(task, cost, 2))
    assert "dense: one expert, always on" in text
    assert "chosen" not in text
    assert f"of which {cost.total - cost.trainable:,} frozen" in text
    assert cost.trainable < cost.total


def test_summary_of_a_soft_mixture_says_that_all_experts_work_and_among_which_rows_they_are_weighed() -> None:
    task = ToyTask(net=ToyNet(point_moe(num_experts=4, top_k=4)), facts=ToyData().facts)

    text = rendered(summary_table(task, measure_cost(task, ToyData().example_batch()), 2))
    assert "4 of 4 experts" in text
    assert "chosen for each row by itself" in text
    assert "dense" not in text


@pytest.mark.parametrize(
    ("called", "on_path", "typed"),
    [
        ("/env/bin/lightning", True, "lightning"),
        (".venv/bin/moeapps", False, ".venv/bin/moeapps"),
        ("/env/moeapps/__main__.py", True, "python -m moeapps"),
    ],
)
def test_advice_names_the_program_as_it_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, called: str, on_path: bool, typed: str
) -> None:
    monkeypatch.setattr("sys.argv", [called])
    monkeypatch.setattr("shutil.which", lambda name: f"/env/bin/{name}" if on_path else None)
    assert program() == typed


def test_end_table_shows_domains_roles_means_and_gap() -> None:
    scores = [ScoreRow("a", "seen", "acc", 0.9, 7, "max"), ScoreRow("u", "unseen", "acc", 0.6, 5, "max")]

    text = rendered(score_table(ScoreTable(scores, {})))
    for part in ("a", "seen", "0.9000", "mean unseen", "gap: unseen worse by", "0.3000", "7"):
        assert part in text


@pytest.mark.parametrize("width", [80, 120, 200])
def test_end_table_never_cuts_a_name_or_a_number_and_names_what_it_leaves_out(width: int) -> None:
    metrics = ["loss", "relative_mse_median", "relative_mse_mean", "diverged", "reconstructed", "mse"]
    scores = [
        ScoreRow(domain, role, metric, 1234.5678, 2048, "min")
        for domain, role in (("van_der_pol_slow", "seen"), ("damped", "validation"), ("pendulum", "unseen"))
        for metric in metrics
    ]

    text = rendered(score_table(ScoreTable(scores, {}), main="relative_mse_median", width=width), width)
    assert "…" not in text
    assert all(name in text for name in ("van_der_pol_slow", "relative_mse_median", "mean validation", "1234.5678"))
    first_row = next(line for line in text.splitlines() if "domain" in line)
    assert re.findall(r"[a-z_]+", first_row)[3] == "relative_mse_median"
    squeezed = "".join(text.split())
    assert all(name in squeezed for name in metrics), "every metric is a column or named below the table"
    assert ("not shown" in text) == (width < 200)


def test_biased_preset_has_a_bias() -> None:
    layer = compose(
        router=top_k_router(num_experts=3, top_k=1, balance_bias=True), experts=lambda d: GLUExperts(3, d, 4)
    )(4)

    assert layer.router.choose.bias.shape == (3,)
    assert Router(LinearScore(4, 3), TopK(2)).choose.bias is None


def test_seconds_count_from_the_start_where_an_epoch_was_begun_by_an_earlier_run() -> None:
    lines, now = ProgressLines(), time.monotonic()
    lines.on_train_start(cast(Any, None))

    assert now <= lines._begin <= time.monotonic()
