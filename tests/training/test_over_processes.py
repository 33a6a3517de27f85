# SPDX-License-Identifier: Apache-2.0
"""Scores and reports of several processes are those of one with all rows, also where a process has no row at all."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAUROC

from moeapps.moe import NormalisedExperts
from moeapps.moe.ranks import is_spread, sum_over_ranks
from moeapps.moe.record import Place
from moeapps.training.callbacks import ExpertReport, RoutingMonitor, summary
from moeapps.training.callbacks.experts import LayerWork
from moeapps.training.callbacks.routing import _Layer
from moeapps.training.scores import DomainScores, ScoreTable, over_processes
from tasks.adaptation.metrics import adaptation_metrics
from tasks.adaptation.report.domains import DomainReport
from tasks.audio.metrics import audio_metrics
from tasks.audio.rivals.counts import BigramLM
from tasks.dynamics.metrics import trajectory_metrics
from tasks.dynamics.module import DynamicsTask
from tasks.image_diffusion.metrics import paired_metrics
from tasks.point_cloud.metrics import segmentation_metrics
from tasks.recommendation.metrics import RankingScores, ranking_metrics
from tasks.recommendation.nets.dice import Dice
from tasks.recommendation.report.categories import oracle_scores
from tasks.recommendation.report.list_metrics import list_metrics
from tasks.recommendation.rivals.popularity import Popularity
from tests.processes import in_processes

N = 12
# A process without any batch of a domain says so when its metric is computed; threads share the filter of warnings.
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")


def numbers(*shape: int) -> Tensor:
    return torch.randn(N, *shape)


def labels(high: int, *shape: int) -> Tensor:
    return torch.randint(high, (N, *shape))


def listed() -> list[Any]:
    one = torch.eye(4)[labels(4)]
    return [
        *(numbers(4), one, torch.ones(N, 4, dtype=torch.bool), labels(5), labels(12)),
        *(numbers(4).softmax(1), numbers(4), numbers(4), numbers(3).abs(), numbers(3).abs()),
    ]


# Metrics of a domain, and what `update` gets for all rows.
CASES: dict[str, tuple[Callable[[], MetricCollection], Callable[[], list[Any]]]] = {
    "ranking": (
        lambda: ranking_metrics(["a", "b"], ("gauc", "gauc_expected", "auc", "logloss")),
        lambda: [numbers(2), labels(2, 2).float(), labels(5, 2) > 0, labels(3), torch.rand(N, 2)],
    ),
    "ranking without truth": (
        lambda: ranking_metrics(["a"]),
        lambda: [numbers(1), labels(2, 1), labels(5, 1) > 0, labels(3)],
    ),
    "lists": (list_metrics, listed),
    "trajectories": (trajectory_metrics, lambda: [numbers(2, 3, 2), numbers(2, 3, 2)]),
    "points": (lambda: segmentation_metrics(3), lambda: [labels(3), labels(3), labels(3), labels(3)]),
    "images": (paired_metrics, lambda: [numbers().abs(), numbers().abs(), torch.rand(N)]),
    "codes": (lambda: audio_metrics(2), lambda: [numbers(2).abs().double(), labels(4, 2).double()]),
    "classes": (
        lambda: adaptation_metrics(3, ["other"], measured=False),
        lambda: [numbers(3), numbers(3), labels(3), {"other": numbers(3)}],
    ),
    "values": (lambda: adaptation_metrics(1, [], measured=True), lambda: [numbers(1), numbers(1), numbers()]),
    # Not ours: keeps rows [N, C] and labels [N] in lists.
    "torchmetrics": (lambda: MetricCollection({"auroc": MulticlassAUROC(3)}), lambda: [numbers(3), labels(3)]),
}
SHARES = {"first alone": (N, 0, 0), "second alone": (0, N, 0), "one without": (5, 0, 7), "last without": (4, 8, 0)}


def scored(make: Callable[[], MetricCollection], given: list[Any], rows: Tensor) -> DomainScores:
    """The scores of a process that has these rows, in batches of at most 4."""
    scores = DomainScores({"d": "seen"}, lambda _: make())
    for batch in rows.split(4) if len(rows) else ():
        part = [{k: v[batch] for k, v in x.items()} if isinstance(x, dict) else x[batch] for x in given]
        added = torch.stack([batch.double(), batch.double() ** 2, torch.ones(len(batch)).double()], 1).unsqueeze(1)
        scores.update(
            *("d", batch.float().mean(), len(batch), tuple(part), {"u": batch.float()}),
            parts={"p": (batch // 2 + 70_000, added)},
        )
    return scores


def assert_same(found: ScoreTable, expected: ScoreTable) -> None:
    told = [[(x.metric, x.n, x.direction) for x in table.scores] for table in (found, expected)]
    assert told[0] == told[1]
    for left, right in zip(found.scores, expected.scores, strict=True):
        assert left.value == pytest.approx(right.value, rel=1e-5, abs=1e-6, nan_ok=True), left.metric
    assert found.scorable == expected.scorable
    assert sorted(found.units["d"]["u"]) == sorted(expected.units["d"]["u"])
    torch.testing.assert_close(torch.tensor(found.parts["d"]["p"]), torch.tensor(expected.parts["d"]["p"]))


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_process_also_where_a_process_has_no_row(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, given = CASES[name][0], CASES[name][1]()
    expected = scored(make, given, torch.arange(N)).compute(["d"])
    assert not all(math.isnan(score.value) for score in expected.scores if score.metric != "loss")
    for sizes in SHARES.values():
        shares = torch.arange(N).split(sizes)
        scores = [scored(make, given, rows) for rows in shares]
        for found in in_processes(monkeypatch, 3, lambda rank, held=scores: held[rank].compute(["d"])):
            assert_same(found, expected)


def subclasses(kind: type[Metric]) -> Iterator[type[Metric]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_no_metric_of_a_task_is_left_out_above() -> None:
    for path in Path("tasks").rglob("*.py"):
        if "(Metric)" in path.read_text() or "add_state(" in path.read_text():
            importlib.import_module(".".join(path.with_suffix("").parts))
    own = {kind for kind in subclasses(Metric) if kind.__module__.startswith("tasks.")}
    tested = {type(part) for make, _ in CASES.values() for part in make().modules()}
    assert RankingScores in own
    assert own <= tested


def test_a_metric_keeps_a_way_of_its_own_to_join() -> None:
    def mine(values: Tensor, group: Any = None) -> list[Tensor]:
        return [values]

    assert over_processes(MulticlassAUROC(3, dist_sync_fn=mine)).dist_sync_fn is mine


# Reports --------------------------------------------------------------------------------------------------------------


def test_an_expert_report_joins_layers_that_a_process_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [Place("encoder", (0,)), Place("encoder", (1,))]
    reports = [ExpertReport() for _ in range(3)]
    for rank, held in enumerate((places[:1], [], places)):
        for place in held:
            reports[rank].layers[place] = LayerWork(
                torch.full((1, 2), rank + 1.0), torch.ones(3), {"class": torch.full((1, 3, 2), 10.0 * (rank + 1))}
            )

    in_processes(monkeypatch, 3, lambda rank: reports[rank]._sum_over_processes(torch.device("cpu")))

    for report in reports:
        assert [list(layer.work_DE[0]) for layer in report.layers.values()] == [[4, 4], [3, 3]]
        assert [float(layer.sums[0]) for layer in report.layers.values()] == [2, 1]
        assert [float(layer.tables["class"].max()) for layer in report.layers.values()] == [40, 30]


def test_a_routing_monitor_joins_layers_that_a_process_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monitors = [RoutingMonitor(figures=False) for _ in range(2)]
    monitors[1]._layers = {"moe": _Layer(torch.ones(2, 3), torch.tensor(4.0), torch.tensor(5.0), torch.ones(4))}

    in_processes(monkeypatch, 2, lambda rank: monitors[rank]._join(torch.device("cpu")))

    for monitor in monitors:
        layer = monitor._layers["moe"]
        assert (float(layer.table_SE.sum()), float(layer.entropy), float(layer.rows)) == (6, 4, 5)
        assert layer.workers.tolist() == [1, 1, 1, 1]


def test_a_report_by_domain_is_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [DomainReport(figures=False) for _ in range(3)]
    for rank, draws in ((0, 1), (2, 2)):
        reports[rank]._sums["d"] |= {"images": 4.0, "draws": draws}
        reports[rank]._attention["d"] = torch.tensor([1.0, rank])
        reports[rank]._changed["mended"].append(("d", torch.zeros(1), rank, 0, 0))

    task: Any = None
    in_processes(monkeypatch, 3, lambda rank: reports[rank].finish(task, None))

    for report in reports:
        assert dict(report._sums["d"]) == {"images": 8, "draws": 2}
        assert report._attention["d"].tolist() == [2, 2]
        assert [image[2] for image in report._changed["mended"]] == [0, 2]


def test_what_the_truth_scores_is_of_the_rows_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    make, given = CASES["ranking"][0], CASES["ranking"][1]()
    expected = oracle_scores(scored(make, given, torch.arange(N)), ["a", "b"])
    assert expected["oracle"]["margin"] >= 0
    scores = [scored(make, given, rows) for rows in torch.arange(N).split((5, 0, 7))]
    for found in in_processes(monkeypatch, 3, lambda rank: oracle_scores(scores[rank], ["a", "b"])):
        assert found.keys() == expected.keys()
        for group, values in expected.items():
            assert found[group] == pytest.approx(values, nan_ok=True)


# States ---------------------------------------------------------------------------------------------------------------


def test_counting_rivals_count_the_rows_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"num_codebooks": 2, "num_codes": 5, "domains": {"seen": ["a", "b"]}, "kinds": {"a": "x", "b": "x"}}
    inputs_BKL, target_BLK, domain_B = labels(5, 2, 3), labels(5, 3, 2), labels(2)
    item_BN, taken_BN = labels(7, 4), labels(2, 4)

    def counted(rows: Tensor) -> list[Tensor]:
        codes, popular = BigramLM(facts), Popularity({"item_fields": {"item": 7}})
        codes.count(inputs_BKL[rows], target_BLK[rows], domain_B[rows])
        popular(
            SimpleNamespace(
                candidates=item_BN[rows].unsqueeze(-1), label=taken_BN[rows], candidate_mask=item_BN[rows] > 0
            )
        )
        return [codes.counts, codes.pairs, popular.counts]

    expected = counted(torch.arange(N))
    shares = torch.arange(N).split((5, 7))
    assert not torch.equal(counted(shares[0])[0], expected[0])
    for found in in_processes(monkeypatch, 2, lambda rank: counted(shares[rank])):
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


def test_a_loss_that_is_not_finite_on_one_process_skips_the_step_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = []
    task = SimpleNamespace(trainer=SimpleNamespace(world_size=2), _skip=lambda: skipped.append(True))
    task._average = MethodType(DynamicsTask._average, task)
    # The other process: gradients of 0, and a loss that is not finite.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value.add_(0.0 if value.dim() else torch.inf))
    weight = torch.ones(3, requires_grad=True)

    DynamicsTask._descend(task, weight.square().sum(), [weight], None)  # type: ignore[arg-type]

    assert skipped
    assert weight.grad is None


def test_what_the_first_process_measures_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(*_: Any) -> None:
        asked.append(is_spread())
        assert sum_over_ranks(torch.ones(())) == 1

    monkeypatch.setattr(summary, "measure_cost", measure)
    monkeypatch.setattr(summary, "measure_training", measure)
    counts = {"estimated_stepping_batches": 4, "accumulate_grad_batches": 1, "world_size": 2}
    trainer: Any = SimpleNamespace(is_global_zero=True, precision_plugin=None, **counts)
    batches = SimpleNamespace(example_batch=lambda: None, first_training_batch=lambda: None)
    task: Any = SimpleNamespace(data=batches, parameters=lambda: iter(()))

    def first(rank: int) -> bool:
        if rank == 0:
            callback = summary.MoESummary()
            callback._measure_training(trainer, task)
            callback._measure(trainer, task, show=False)
        return is_spread()

    assert in_processes(monkeypatch, 2, first) == [True, True]
    assert asked == [False, False]


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), ["BatchNorm1d", "--trainer.sync_batchnorm true"]),
        (NormalisedExperts(2, dim=3, out_dim=2), ["NormalisedExperts"]),
        (Dice(3), ["Dice"]),
        (nn.Sequential(nn.LayerNorm(2), NormalisedExperts(2, dim=3, out_dim=2, norm="layer")), None),
        (nn.SyncBatchNorm(3), None),
    ],
    ids=["torch", "experts", "dice", "none", "joined"],
)
def test_batch_statistics_of_each_process_are_told_in_one_line(
    net: nn.Module, told: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="moeapps"):
        summary.tell_of_batch_statistics(net)

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (told is not None)
    for word in told or ():
        assert word in lines[0]
    if told and len(told) == 1:
        assert "sync_batchnorm" not in lines[0]
