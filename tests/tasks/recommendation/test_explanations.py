# SPDX-License-Identifier: Apache-2.0
"""Attributions sum to the gate they explain; reports, tables and figures of small lists."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from sklearn.metrics import adjusted_rand_score

from tasks.recommendation.data.lists import truncated
from tasks.recommendation.datamodule import ListData
from tasks.recommendation.model import ListRanker, aw_moe
from tasks.recommendation.module import ListRankingTask
from tasks.recommendation.report import experts as experts_report
from tasks.recommendation.report.attribution import GateSample, clusters, gate_ari, gate_sample, mean_gates, prior_of
from tasks.recommendation.report.diagnosis import LevelSample
from tasks.recommendation.report.explanations import GateReport, chosen_lists, explanation_table, gate_numbers, markdown
from tasks.recommendation.report.gate_figures import attribution_figure, gate_figure
from tasks.recommendation.rivals.list_banks import averaged_experts, category_gate
from tests.pictured import check_readable
from tests.tasks.recommendation.list_common import make_lists, small_tastes

FACTS: dict[str, Any] = {
    "item_fields": {"item": 9, "kind": 5},
    "query_fields": {"category": 4},
    "profile_fields": {},
    "history": 4,
    "candidates": 3,
    "factors": ["a", "b"],
}


def sample(seed: int = 0, rows: int = 30, **options: Any) -> GateSample:
    torch.manual_seed(seed)
    found = gate_sample(ListRanker(FACTS, bank=aw_moe(**options)), make_lists(rows))
    assert found is not None
    return found


@pytest.mark.parametrize("key", ["target", "query", "none"])
@pytest.mark.parametrize("pooling", ["sum", "sqrtn"])
def test_what_past_items_added_and_the_prior_sum_to_the_gate(key: Any, pooling: Any) -> None:
    torch.manual_seed(0)
    net, lists = ListRanker(FACTS, bank=aw_moe(key=key, pooling=pooling)), make_lists(30)
    found = gate_sample(net, lists)
    assert found is not None
    assert found.parts is not None

    torch.testing.assert_close(found.parts.sum(1) + 0.25, found.gate)  # the prior starts at 1/K
    assert (found.parts[~lists.history_mask] == 0).all()
    assert (found.gate[0] == 0.25).all()  # the first list has no history
    real = lists.history_mask.any(1)
    assert (found.parts[real].abs().sum((1, 2)) > 0).all()


def test_parts_of_a_plain_sum_do_not_change_when_other_past_items_are_forgotten() -> None:
    torch.manual_seed(0)
    net, lists = ListRanker(FACTS, bank=aw_moe(pooling="sum")), make_lists(30)
    whole, cut = gate_sample(net, lists), gate_sample(net, truncated(lists, 1))
    assert whole is not None
    assert cut is not None
    assert whole.parts is not None
    assert cut.parts is not None

    torch.testing.assert_close(whole.parts[:, 0], cut.parts[:, 0])
    assert not cut.parts[:, 1:].any()


def test_gates_that_read_no_history_have_no_parts() -> None:
    found = gate_sample(ListRanker(FACTS, bank=category_gate()), make_lists(8))
    assert found is not None
    assert found.parts is None
    assert GateSample.cat([found, found]).parts is None
    same = gate_sample(ListRanker(FACTS, bank=averaged_experts()), make_lists(8))
    assert same is not None
    assert gate_numbers(same)["gate_spread"] == 0


def test_clusters_find_directions_and_not_lengths() -> None:
    g = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 3, (300,), generator=g)
    gate = (torch.eye(4)[kind] + 0.05 * torch.randn(300, 4, generator=g)) * (0.1 + torch.rand(300, 1, generator=g))

    assert gate_ari(gate, kind) == pytest.approx(1)
    assert abs(gate_ari(gate, kind[torch.randperm(300, generator=g)])) < 0.05
    noisy = gate + 0.3 * torch.randn(300, 4, generator=g)
    assert gate_ari(noisy, kind) == pytest.approx(adjusted_rand_score(kind, clusters(noisy, 3)))
    some = kind.where(torch.arange(300) % 2 == 0, -1)
    assert gate_ari(gate, some) == pytest.approx(1)
    assert math.isnan(gate_ari(gate, torch.zeros(300, dtype=torch.int64)))
    assert math.isnan(gate_ari(gate[:0], kind[:0]))
    assert gate_ari(torch.ones(300, 4), kind) == 0  # one gate for all


def test_mean_gates_are_means_and_not_a_number_without_a_list() -> None:
    gate, factor = torch.tensor([[1.0, 2], [3, 4], [9, 9], [5, 0]]), torch.tensor([0, 0, -1, 2])

    means = mean_gates(gate, factor, 4)
    assert means[[0, 2]].tolist() == [[2, 3], [5, 0]]
    assert means[[1, 3]].isnan().all()


def hand(events: list[int], user: list[int], factor: list[int]) -> GateSample:
    n = len(user)
    length = torch.tensor(events)
    item = (torch.arange(8) + 100 * torch.arange(n)[:, None]).where(torch.arange(8) < length[:, None], -1)
    parts = torch.arange(n * 16.0).reshape(n, 8, 2) * (item >= 0).unsqueeze(2)
    ids = torch.arange(n)
    return GateSample(parts.sum(1), parts, torch.tensor(factor), length, item, 50 + ids, torch.tensor(user), 7 * ids)


def test_chosen_lists_take_turns_over_factors_and_end_with_a_user_of_the_tail() -> None:
    given = hand([8, 8, 0, 7, 2, 8, 8, 3], user=[1, 1, 2, 3, 4, 5, 6, 7], factor=[0, 1, 0, 0, 1, 1, 0, 0])

    assert chosen_lists(given, 4).tolist() == [0, 5, 3, 4]
    assert chosen_lists(given, 1).tolist() == [0]
    assert chosen_lists(given.take(torch.tensor([4, 7])), 3).tolist() == [0]
    assert chosen_lists(given.take(torch.tensor([2])), 3).tolist() == []


def test_table_and_report_hold_every_past_item_with_its_name() -> None:
    given = hand([2, 6], user=[1, 2], factor=[0, -1])
    rows = list(csv.DictReader(io.StringIO(explanation_table(given, lambda item: f"film, {item}"))))

    assert [row["past_item"] for row in rows] == [f"film, {item}" for item in (0, 1, *range(100, 106))]
    assert [int(row["place"]) for row in rows] == [1, 2, 1, 2, 3, 4, 5, 6]
    assert [float(row["expert_1"]) for row in rows[:2]] == [1, 3]
    assert rows[-1]["row"] == "7"
    text = markdown(given, ["drama"], lambda item: f"film | {item}")
    assert "User 1 (drama), who took film \\| 50" in text
    assert "## User 2, who took film" in text
    assert text.index("film \\| 1 | +2.00 | +3.00") < text.index("film \\| 0 | +0.00 | +1.00")
    assert "**weights of the experts** | +2.00 | +4.00" in text
    assert "| **all past items** | +2.00 | +4.00 |\n| **a user without a past** | +0.00 | +0.00 |" in text


def test_the_prior_is_found_beside_the_past_and_not_where_weights_are_normed() -> None:
    found = sample()
    prior = prior_of(found)
    assert prior is not None
    torch.testing.assert_close(prior, torch.full((4,), 0.25))
    normed = sample(gate_norm="softmax")
    assert prior_of(normed) is None
    assert "The weights are a norm of the sum." in markdown(normed, ["a", "b"], str)
    assert "a user without a past" not in markdown(normed, ["a", "b"], str)
    assert prior_of(replace(found, parts=None)) is None
    assert prior_of(found.take(torch.tensor([], dtype=torch.int64))) is None


def test_what_hardly_moves_the_gate_is_pale_and_has_enough_digits() -> None:
    given = hand([6, 8], user=[1, 2], factor=[0, 1])
    small = replace(given, parts=given.parts / given.parts.abs().max() / 1000, gate=torch.ones(2, 2))
    loud = replace(small, parts=100 * small.parts)

    def strongest(of: GateSample) -> float:
        image = next(a.images[0] for a in attribution_figure(of, ["a", "b"], str).axes if a.images)
        return float(of.parts.abs().max()) / float(image.norm.vmax)  # type: ignore[union-attr]

    assert strongest(small) == pytest.approx(0.05)  # a thousandth, of the fiftieth of a weight of 1
    assert strongest(loud) >= 1
    assert "| +0.0010 |" in markdown(small, ["a", "b"], str)
    assert "| +0.10 |" in markdown(loud, ["a", "b"], str)


def test_a_test_without_any_past_item_is_told_and_explains_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = ListData(source=small_tastes(tail_share=0.0, cold_share=1.0), batch_size=64, cache_dir=tmp_path / "cache")
    task = ListRankingTask(facts=data.facts)
    with caplog.at_level(logging.WARNING, logger="moeapps"):
        run_on(task, data, GateReport(), tmp_path)

    assert "none of the lists has a past item" in caplog.text
    written = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"gates.json", "gates.png"} <= written
    assert not {name for name in written if name.startswith("explanations")}


@pytest.mark.parametrize("num", [1, 3, 4])
def test_figures_are_drawn_for_any_number_of_users_and_without_factors(num: int, tmp_path: Path) -> None:
    given = hand([8, 2, 6, 7][:num], user=list(range(num)), factor=[0, 1, -1, 0][:num])

    explained, figure = attribution_figure(given, ["a", "b"], str), gate_figure(given, ["a", "b", "never"])
    check_readable(explained)
    check_readable(figure)
    explained.savefig(tmp_path / "a.png")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b", "never"]
    gate_figure(given, []).savefig(tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("a.png", "b.png"))


def test_the_picture_of_all_gates_names_its_axes_and_what_grey_is(monkeypatch: pytest.MonkeyPatch) -> None:
    share = torch.full((6, 5, 9), 1 / 9)
    allowed = torch.arange(9) % 2 == torch.arange(6).unsqueeze(1) % 2
    experts = [f"interaction.{k}" for k in range(9)]
    gates = ["click", "eview", "lview", "like", "comment", "follow"]
    level = LevelSample(torch.zeros(5, 9, 1), share, share, allowed, allowed, experts, gates)
    drawn: list[Figure] = []
    monkeypatch.setattr(experts_report, "save_figure", lambda figure, *_, **__: drawn.append(figure))
    experts_report.draw_gates([level, level], Path("gates.png"))

    check_readable(drawn[0])
    assert drawn[0].axes[1].get_xlabel() == "expert (grey: the gate may not see it)"
    assert drawn[0].axes[1].get_ylabel() == "gate"


def run_on(task: ListRankingTask, data: ListData, report: GateReport, folder: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(folder, name="run"),
        callbacks=[report],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.test(task, datamodule=data, verbose=False)


def test_a_test_run_leaves_its_explanations(tmp_path: Path) -> None:
    data = ListData(source=small_tastes(), batch_size=64, cache_dir=tmp_path / "cache")
    torch.manual_seed(0)
    task = ListRankingTask(facts=data.facts)
    report = GateReport(lists_per_domain=100, explained=20, shown=3)
    run_on(task, data, report, tmp_path)

    folder = next((tmp_path / "run").iterdir())
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    names = {"metrics/explanations.csv", "metrics/explanations.md", "metrics/gates.json"}
    assert names | {"figures/gates.png", "figures/explanations.png"} <= written
    with open(folder / "metrics" / "explanations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["row"] for row in rows}) == len({row["user"] for row in rows}) == 20
    summary = json.loads((folder / "metrics" / "test.json").read_text())["summary"]
    assert summary["gates"] == pytest.approx(report.result["gates"], nan_ok=True)
    assert -0.5 <= summary["gates"]["gate_ari"] <= 1
    gates = json.loads((folder / "metrics" / "gates.json").read_text())
    assert gates["factors"] == [f"taste {k}" for k in range(4)]
    table = data.get_dataset("mostly_0", "test").table  # type: ignore[attr-defined]
    first = [row for row in rows if row["row"] == rows[0]["row"]]
    wanted = table.history_item[int(rows[0]["row"])]
    assert [int(row["past_item"].split(":")[0]) for row in first] == wanted[wanted >= 0].tolist()


def test_wrong_numbers_are_told() -> None:
    with pytest.raises(ValueError, match="shown=5"):
        GateReport(explained=4, shown=5)
