# SPDX-License-Identifier: Apache-2.0
"""Illnesses of experts: exact on hand-made gates, found under the stress recipe, absent under the sane one."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from tasks.recommendation.data.multitask_log import MultitaskLog
from tasks.recommendation.datamodule import RecommendationData
from tasks.recommendation.model import Ranker, home
from tasks.recommendation.module import RankingTask
from tasks.recommendation.nets.embeddings import FeatureEncoder
from tasks.recommendation.report.diagnosis import LevelSample, Thresholds, diagnose, divergence, rate_correlation
from tasks.recommendation.report.experts import ExpertDiagnostics, expert_levels, markdown, own_gradients
from tasks.recommendation.rivals import cgc, mmoe, single_task

TASKS = ("a", "b", "c")
CATEGORY = {"a": "x", "b": "x", "c": "y", "x": "x", "y": "y"}


def sample(share: Tensor, *, output: Tensor | None = None, owned: Tensor | None = None, **more: Any) -> LevelSample:
    gates, rows, experts = share.shape
    return LevelSample(
        output=torch.randn(rows, experts, 4) if output is None else output,
        share=share,
        weight=more.get("weight", share),
        allowed=more.get("allowed", torch.ones(gates, experts, dtype=torch.bool)),
        owned=torch.zeros(gates, experts, dtype=torch.bool) if owned is None else owned,
        experts=more.get("experts", tuple(f"shared.{e}" for e in range(experts))),
        gates=TASKS[:gates],
    )


def one_hot(*columns: int, experts: int = 3, rows: int = 5) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(columns), experts).float().unsqueeze(1).expand(-1, rows, -1)


def test_an_expert_of_one_gate_alone_is_degraded_and_one_of_all_is_not() -> None:
    taken = diagnose(sample(one_hot(0, 1, 2)), {}, CATEGORY)
    shared = diagnose(sample(torch.full((3, 5, 3), 1 / 3)), {}, CATEGORY)

    assert {x["occupancy"] for x in taken.per_expert.values()} == {1.0}
    assert {x["effective_users"] for x in taken.per_expert.values()} == {1.0}
    assert taken.findings["degradation"] == ["shared.0", "shared.1", "shared.2"]
    for numbers in shared.per_expert.values():
        assert numbers["occupancy"] == pytest.approx(1 / 3)
        assert numbers["effective_users"] == pytest.approx(3)
    assert shared.findings["degradation"] == []
    assert taken.overall["degradation_count"] == 3


def test_degradation_asks_only_gates_that_may_see_the_expert() -> None:
    allowed = torch.tensor([[True, True, False], [True, False, True], [True, False, False]])
    share = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.0, 0.75], [1.0, 0.0, 0.0]]).unsqueeze(1)

    found = diagnose(sample(share, allowed=allowed), {}, CATEGORY).per_expert

    assert found["shared.0"]["occupancy"] == pytest.approx(1 / 1.75)
    assert "occupancy" not in found["shared.1"]
    assert "occupancy" not in found["shared.2"]


def test_a_silent_expert_is_collapsed_and_its_units_are_dead() -> None:
    output = torch.randn(50, 3, 4).abs() + 0.1
    output[:, 1] = 0.0
    output[:, 2, :2] = 0.0

    report = diagnose(sample(torch.full((3, 50, 3), 1 / 3), output=output), {}, CATEGORY)

    fractions = [(x["zero_frac"], x["dead_units"]) for x in report.per_expert.values()]
    assert fractions == [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)]
    assert report.findings["collapse"] == ["shared.1"]
    assert report.overall["zero_frac_max"] == 1.0
    assert report.per_expert["shared.1"]["quiet_frac"] == 1.0


def test_quiet_experts_are_found_whatever_the_activation_and_spreads_are_compared() -> None:
    output = torch.randn(4000, 2, 8)
    output[:, 1] *= 1e-3

    report = diagnose(sample(torch.full((2, 4000, 2), 0.5), output=output), {}, CATEGORY)

    assert report.per_expert["shared.1"]["zero_frac"] < 0.01
    assert report.per_expert["shared.1"]["quiet_frac"] > 0.99
    assert report.overall["dist_ratio"] == pytest.approx(1000, rel=0.1)


def test_a_rare_task_that_ignores_its_own_expert_is_underfitting_a_common_one_is_not() -> None:
    owned = torch.eye(3, 4, dtype=torch.bool)
    share = torch.full((3, 5, 4), 0.0)
    share[..., 3] = 1.0
    share[2] = 0.25
    names = (*TASKS, "shared")

    report = diagnose(sample(share, owned=owned, experts=names), {"a": 0.3, "b": 0.005, "c": 0.005}, CATEGORY)

    assert [report.per_gate[t]["own_mass"] for t in TASKS] == [0.0, 0.0, 0.25]
    assert {report.per_gate[t]["fair"] for t in TASKS} == {0.25}
    assert report.findings["underfitting"] == ["b"]
    mild = Thresholds(rare_rate=0.001)
    assert (
        diagnose(sample(share, owned=owned, experts=names), {"b": 0.005}, CATEGORY, mild).findings["underfitting"] == []
    )


def test_entropy_saturation_and_divergence_of_hand_made_gates() -> None:
    mixed = diagnose(sample(torch.cat([one_hot(0), torch.full((1, 5, 3), 1 / 3), one_hot(1)])), {}, CATEGORY)

    assert [mixed.per_gate[t]["entropy"] for t in TASKS] == pytest.approx([0, 1, 0], abs=1e-6)
    assert [mixed.per_gate[t]["max_weight"] for t in TASKS] == pytest.approx([1, 1 / 3, 1])
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert divergence(p, q) == pytest.approx(math.log(2))
    assert divergence(p, p) == 0.0
    same = diagnose(sample(one_hot(0, 0, 1)), {}, CATEGORY).overall
    assert same["js_within"] == 0.0
    assert same["js_across"] == pytest.approx(math.log(2))


def test_foreign_mass_is_the_largest_weight_across_categories() -> None:
    share, experts = torch.zeros(3, 5, 3), ("x", "y.0", "shared")
    share[..., 2] = 1.0
    assert diagnose(sample(share, experts=experts), {}, CATEGORY).overall["foreign_mass"] == 0.0
    share[2, 3, 0] = 0.25  # task c is of category y

    assert diagnose(sample(share, experts=experts), {}, CATEGORY).overall["foreign_mass"] == 0.25


def test_correlation_of_own_mass_with_rarity() -> None:
    rates = {"a": 0.3, "b": 0.03, "c": 0.003}

    assert rate_correlation({"a": 3.0, "b": 2.0, "c": 1.0}, rates) == pytest.approx(1.0)
    assert rate_correlation({"a": 1.0, "b": 2.0, "c": 3.0}, rates) == pytest.approx(-1.0)
    assert rate_correlation({"a": 1.0, "b": 1.0, "c": 1.0}, rates) is None
    assert rate_correlation({"a": 1.0, "b": 2.0}, rates) is None


# --- on networks ---

TAILS, SPREAD, RATE = 1.0, 0.8, 0.1


def trained(bank: Any, *, stress: bool, folder: Path, epochs: int = 2) -> tuple[RankingTask, ExpertDiagnostics]:
    """Raw heavy-tailed counts and a high rate (recommendation-data 3.2), or scaled numbers and a low one."""
    sizes = {"num_users": 60, "num_items": 200, "train_rows": 4000, "val_rows": 200, "test_rows": 800}
    source = MultitaskLog(**sizes, **({"heavy_tails": TAILS, "scale_spread": SPREAD} if stress else {}))
    data = RecommendationData(
        source=source, seen=["angle_00"], validation=["angle_22"], unseen=[], batch_size=128, cache_dir=folder / "cache"
    )
    torch.manual_seed(0)
    net = partial(Ranker, bank=bank, encoder=lambda facts: FeatureEncoder(facts, normalise=not stress))
    task = RankingTask(net=net, facts=data.facts, scores=["gauc"])
    task.optimizer_config.lr = RATE if stress else 1e-3
    diagnostics = ExpertDiagnostics(figure=False)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[diagnostics],
        limit_val_batches=0,
        enable_model_summary=False,
        default_root_dir=folder,
        accelerator="cpu",
        **quiet,
    )
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    return task, diagnostics


def test_stress_makes_plain_experts_ill_and_home_stays_well(tmp_path: Path) -> None:
    plain = cgc(shared_experts=4, task_experts=1, width=32)
    ill = trained(plain, stress=True, folder=tmp_path / "ill")[1].result["experts"]
    sane = trained(plain, stress=False, folder=tmp_path / "sane")[1].result["experts"]
    well = trained(home(width=32), stress=True, folder=tmp_path / "well")[1].result["experts"]

    assert ill["collapse_count"] > 0
    assert ill["underfitting_count"] > 0
    assert ill["max_weight_max"] > 0.9
    assert ill["effective_users_min"] < 0.5 * sane["effective_users_min"]
    assert sane["collapse_count"] + sane["degradation_count"] + sane["underfitting_count"] == 0
    assert sane["max_weight_max"] < 0.6
    assert well["collapse_count"] == 0  # its gates saturate as well: the norm cures silence, not greed
    assert well["zero_frac_max"] < 0.01


@pytest.fixture(scope="module")
def batch() -> Any:
    from rec_common import make_batch

    return make_batch(rows=64, tasks=3)


FACTS: dict[str, Any] = {
    "domains": {"seen": ["s"], "validation": [], "unseen": []},
    **{"dense_dim": 3, "fields": {"a": 5, "b": 7}, "bags": {"bag": 9}},
    **{"tasks": ["click", "like", "view"], "categories": ["act", "act", "watch"]},
}


@pytest.mark.parametrize(("self_gates", "most"), [(True, 2.0), (False, 1e-6)])
def test_own_gradients_survive_a_gate_that_ignores_them_only_with_self_gates(
    self_gates: bool, most: float, batch: Any
) -> None:
    task = RankingTask(net=partial(Ranker, bank=home(width=8, self_gates=self_gates)), facts=FACTS)
    state = {name: value.clone() for name, value in task.state_dict().items()}

    found = own_gradients(task, batch)

    assert found.keys() == {"click", "like", "view"}
    assert all(x["kept"] < most for x in found.values())
    assert all((x["kept"] > 0.01) == self_gates for x in found.values())
    assert sum(x["grad_ratio"] for x in found.values()) == pytest.approx(3)
    assert task.training
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())


def test_networks_without_experts_of_a_tasks_own_have_no_such_gradients(batch: Any) -> None:
    assert own_gradients(RankingTask(net=partial(Ranker, bank=mmoe(width=8)), facts=FACTS), batch) == {}
    assert own_gradients(RankingTask(net=partial(Ranker, bank=single_task(width=8)), facts=FACTS), batch) == {}


def test_a_test_run_writes_a_report_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr("moeapps.training.callbacks.report.run_dir", lambda trainer: tmp_path)
    monkeypatch.setattr(
        "tasks.recommendation.report.experts.write_json", lambda path, content: written.update({path.name: content})
    )

    task, diagnostics = trained(home(width=8), stress=False, folder=tmp_path, epochs=1)

    assert len(expert_levels(task)) == len(diagnostics.levels) == 2
    assert set(diagnostics.result) == {"experts", "experts.level_1", "experts.level_2"}
    assert diagnostics.result["experts"]["foreign_mass"] == 0.0
    assert json.dumps(written["experts.json"])
    assert written["experts.json"]["experts"] == diagnostics.result["experts"]
    text = (tmp_path / "metrics" / "experts.md").read_text(encoding="utf-8")
    assert text.count("| shared") >= 3
    assert "| follow |" in text
    assert markdown([], {}, {}).startswith("# Experts")
