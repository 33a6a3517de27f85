# SPDX-License-Identifier: Apache-2.0
"""The stages and their test: what trains, what is read, what a test of episodes says."""

from __future__ import annotations

import copy
import csv
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeapps.data.images.batch import ImageBatch
from moeapps.training.optim import OptimizerConfig
from moeapps.training.stages import freeze_all_but
from tasks.adaptation.data.batch import Episode, EpisodeBatch
from tasks.adaptation.data.digits import DigitDomains
from tasks.adaptation.datamodule import AdaptationData
from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.module import AdaptationTask, AggregatorTask, ExpertsTask, MetaTask, StudentTask
from tasks.adaptation.nets.adapt import InnerStep
from tasks.adaptation.nets.adapters import Adapter, Distil, Unadapted
from tasks.adaptation.rivals.experts import Ensemble
from tasks.adaptation.rivals.prototypes import T3A
from tests.tasks.adaptation.meta_dmoe_common import K, facts, images, net, small

ROLES = {"seen": ["plain", "inverted", "pen"], "validation": ["stripes"], "unseen": ["faded"]}


def data(tmp_path: Path, **options: Any) -> AdaptationData:
    source = DigitDomains(train_per_class=2, held_per_class=1, unseen_per_class=2)
    sizes = {"support": 4, "query": 6, "episodes_per_step": 2, "steps_per_epoch": 2, "draws": 2, "eval_batch_size": 9}
    return AdaptationData(source=source, cache_dir=tmp_path, **{**ROLES, **sizes, "mode": "episodes", **options})


def make(kind: type[AdaptationTask], told: dict[str, Any], **options: Any) -> AdaptationTask:
    torch.manual_seed(0)
    step = options.pop("step", None) or InnerStep(rate=0.1)
    statistics = options.pop("expert_statistics", "running")

    def build(facts: dict[str, Any]) -> MetaDMoE:
        return MetaDMoE(facts, backbone=small, heads=2, step=step, expert_statistics=statistics)

    return kind(net=build, facts=told, **options)


def trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", default_root_dir=tmp_path, max_epochs=1, **quiet, **options)


TRAINED = {
    StudentTask: ("net.student.",),
    ExpertsTask: ("net.layer.experts.", "net.expert_heads."),
    AggregatorTask: ("net.aggregator.", "net.teacher_head."),
    MetaTask: ("net.student.", "net.aggregator.", "net.step."),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_a_stage_trains_its_parts_and_leaves_all_else_as_it_was(kind: type[AdaptationTask], tmp_path: Path) -> None:
    mode = "episodes" if kind is MetaTask else "rows"
    module = data(tmp_path, mode=mode, evaluation="episodes", batch_size=12, mixing="balanced")
    task = make(kind, module.facts, step=InnerStep(rate=0.1, learned=True), optimizer=OptimizerConfig(lr=0.01))
    before = copy.deepcopy(task.state_dict())

    trainer(tmp_path, limit_val_batches=1, num_sanity_val_steps=0, log_every_n_steps=1).fit(task, datamodule=module)

    changed = {name for name, value in task.state_dict().items() if not torch.equal(before[name], value)}
    assert changed
    assert all(name.startswith(TRAINED[kind]) for name in changed)
    expected = {name for name, _ in task.named_parameters() if name.startswith(TRAINED[kind])}
    if kind is MetaTask:  # evaluation mode throughout: running statistics stay
        assert not any("running" in name for name in changed)
        assert changed == expected
    else:
        assert expected <= changed


@pytest.mark.parametrize("inference_mode", [True, False])
def test_a_test_gives_the_same_numbers_under_either_mode(inference_mode: bool, tmp_path: Path) -> None:
    module = data(tmp_path)
    task = make(MetaTask, module.facts)
    before = copy.deepcopy(task.state_dict())

    trainer(tmp_path, inference_mode=inference_mode).test(task, datamodule=module, verbose=False)

    after = task.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name.startswith("net."))
    for domain in ("plain", "stripes", "faded"):
        expected = by_hand(task, module, domain)
        found = {row.metric: row.value for row in task.results.scores if row.domain == domain}
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def by_hand(task: AdaptationTask, module: AdaptationData, domain: str) -> dict[str, float]:
    """Scores of a domain, draw by draw, without the harness."""
    episodes, whole = module.episodes(domain, "test"), module.images(domain, "test")
    right = plain = total = 0
    losses = []
    task.eval()
    for draw in range(module.draws):
        support, query = episodes.rows(draw)
        weights = task.net.adapt(whole.image[support])
        with torch.no_grad():
            after, before = task.net(whole.image[query], weights), task.net(whole.image[query])
        label = whole.label[query]
        right += int((after.argmax(1) == label).sum())
        plain += int((before.argmax(1) == label).sum())
        losses.append(cross_entropy(after, label, reduction="sum"))
        total += len(query)
    return {
        "accuracy": right / total,
        "accuracy_before": plain / total,
        "gain": (right - plain) / total,
        "loss": float(sum(losses)) / total,
    }


def test_kept_features_are_those_that_the_experts_compute(tmp_path: Path) -> None:
    module = data(tmp_path)
    task = make(AggregatorTask, module.facts).eval()
    task._trainer = trainer(tmp_path)
    task._trainer.datamodule = module
    batch = ImageBatch.cat([module.images(name, "train", torch.tensor([3, 0, 5])) for name in ROLES["seen"]])

    for _ in range(2):  # computed, then looked up
        z, present = task.tokens(batch)
        task.cache_features = False
        fresh, same = task.tokens(batch)
        task.cache_features = True
        torch.testing.assert_close(z, fresh, atol=1e-6, rtol=1e-5)
        assert torch.equal(present, same)
        assert present.tolist() == (~torch.eye(3, dtype=torch.bool)).repeat_interleave(3, 0).tolist()


def test_statistics_of_a_batch_are_those_of_one_domain(tmp_path: Path) -> None:
    module = data(tmp_path)
    task = make(AggregatorTask, module.facts, expert_statistics="batch").eval()
    task._trainer = trainer(tmp_path)
    task._trainer.datamodule = module
    parts = [module.images(name, "train", torch.tensor([3, 0, 5])) for name in ROLES["seen"]]

    z, _ = task.tokens(ImageBatch.cat(parts))

    alone = torch.cat([task.net.tokens(part.image, task.expert_of[part.domain])[0] for part in parts])
    torch.testing.assert_close(z, alone, atol=1e-6, rtol=1e-5)
    assert not task._features


class Unread:
    """Labels that must not be looked at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a support label was read ({name})")

    def __len__(self) -> int:
        return 4


def hidden(images: ImageBatch) -> ImageBatch:
    return replace(images, label=Unread())  # type: ignore[arg-type]


ADAPTERS: list[Adapter] = [Unadapted(), Distil(), Distil(form="batch", size=3), T3A(form="support"), Ensemble()]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: f"{type(a).__name__}-{a.form}")
def test_support_labels_are_never_read_in_evaluation(adapter: Adapter) -> None:
    task = make(MetaTask, facts(), adapter=adapter).eval()

    answer = task.answer(EpisodeBatch((hide(episode(3)),)), "u")

    assert answer.after.shape == (6, K)


def test_support_labels_are_never_read_in_training() -> None:
    task = make(MetaTask, facts(), cache_features=False)

    task.shared_step(EpisodeBatch((hide(episode(1)), hide(episode(2)))), "train").loss.backward()

    assert all(p.grad is not None for p in task.net.student.parameters())


def episode(domain: int, seed: int = 0, support: int = 4, query: int = 6) -> Episode:
    def some(count: int, seed: int) -> ImageBatch:
        label = torch.arange(count) % K
        return ImageBatch(images(count, seed), label, torch.full((count,), domain), torch.arange(count))

    return Episode(some(support, seed), some(query, seed + 100), domain)


def hide(whole: Episode) -> Episode:
    return replace(whole, support=hidden(whole.support))


def test_the_loss_of_a_step_is_that_of_the_adapted_student_with_the_own_expert_masked() -> None:
    task = make(MetaTask, facts(), cache_features=False)
    task.train()
    batch = EpisodeBatch((episode(0), episode(2, seed=7)))
    losses = []
    for one, others in ((batch.episodes[0], (1, 2)), (batch.episodes[1], (0, 1))):
        x, backbone = one.support.image, task.net.student.backbone
        z = torch.stack([task.net.experts[e](x) for e in others], 1)
        target = task.net.aggregator(z, torch.ones(z.shape[:2], dtype=torch.bool))
        values = dict(backbone.named_parameters())
        slope = torch.autograd.grad((backbone(x) - target).square().mean(), list(values.values()))
        moved = {n: v - 0.1 * g for (n, v), g in zip(values.items(), slope, strict=True)}
        feature = torch.func.functional_call(backbone, moved, one.query.image)
        losses.append(cross_entropy(task.net.student.head(feature), one.query.label))

    found = task.shared_step(batch, "train").loss

    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=1e-6, rtol=1e-6)


def test_each_expert_learns_from_rows_of_its_own_domains() -> None:
    told = facts(num_experts=2, expert_of=[1, 0, 1, -1, -1])
    task = make(ExpertsTask, told)
    freeze_all_but(task, task.trained or [])
    rows = torch.tensor([0, 1, 2, 0, 2, 1, 1, 0])
    batch = ImageBatch(images(8), torch.arange(8) % K, rows, torch.arange(8))
    (loss := task.shared_step(batch, "train").loss).backward()

    own = torch.tensor([1, 0, 1])[rows]
    parts = [
        cross_entropy(task.net.expert_heads[e](task.net.experts[e](batch.image[own == e])), batch.label[own == e])
        for e in (0, 1)
    ]
    expected = sum(part * int((own == e).sum()) for e, part in enumerate(parts)) / 8
    torch.testing.assert_close(loss.detach(), torch.as_tensor(expected).detach(), atol=1e-5, rtol=1e-5)


def test_rows_without_a_label_do_not_count() -> None:
    task = make(StudentTask, facts()).eval()
    batch = ImageBatch(images(6), torch.tensor([0, -1, 2, -1, 1, 3]), torch.zeros(6).long(), torch.arange(6))

    out = task.shared_step(batch, "train")

    known = batch.label >= 0
    torch.testing.assert_close(out.loss, cross_entropy(task.net(batch.image[known]), batch.label[known]))
    assert out.labelled == 4
    none = task.shared_step(replace(batch, label=torch.full((6,), -1)), "train")
    assert none.labelled == 0
    assert float(none.loss.detach()) == 0


def test_parts_of_an_episode_share_one_adaptation() -> None:
    class Counting(Distil):
        calls: ClassVar[list[int]] = []

        def adapt(self, net: MetaDMoE, image: Tensor, state: Any, own: int) -> Any:
            self.calls.append(len(image))
            return super().adapt(net, image, state, own)

    task = make(MetaTask, facts(), adapter=Counting()).eval()
    whole = episode(3)
    parts = [replace(whole, query=whole.query.take(torch.arange(6)[rows])) for rows in (slice(0, 2), slice(2, 6))]
    found = torch.cat([task.answer(EpisodeBatch((part,)), "u").after for part in parts])

    assert Counting.calls == [4]
    torch.testing.assert_close(found, task.net(whole.query.image, task.net.adapt(whole.support.image)))
    task.answer(EpisodeBatch((replace(whole, draw=1),)), "u")
    assert len(Counting.calls) == 2


def test_batches_start_afresh_and_online_goes_on() -> None:
    made, query = net(InnerStep(rate=0.3)), images(5, seed=9)
    batch, _ = Distil(form="batch", size=2).answer(made, None, query, -1)
    online, _ = Distil(form="online", size=2).answer(made, None, query, -1)

    weights = None
    for part, of_batch, of_online in zip(query.split(2), batch.split(2), online.split(2), strict=True):
        torch.testing.assert_close(of_batch, made(part, made.adapt(part)))
        weights = made.adapt(part, start=weights)
        torch.testing.assert_close(of_online, made(part, weights))


def test_passes_are_counted_as_the_method_is_written() -> None:
    task = make(MetaTask, facts(), adapter=Distil(), step=InnerStep(rate=0.1, steps=2)).eval()

    answer = task.answer(EpisodeBatch((episode(3),)), "u")

    # Three experts and two steps on 4 images; one network on 6.
    assert (answer.adapting.forward, answer.adapting.backward) == (3 * 4 + 2 * 4, 2 * 4)
    assert (answer.answering.forward, answer.answering.backward) == (6, 0)


def test_predictions_are_tables_by_domain(tmp_path: Path) -> None:
    module = data(tmp_path / "cache")
    task = make(MetaTask, module.facts)
    module.prepare_data()
    batch = module.episodes("faded", "test")[1]
    task._trainer = trainer(tmp_path)
    task._trainer.datamodule = module
    place = module.eval_domains("predict").index("faded")

    said = task.eval().predict_step(batch, 1, place)
    task.prediction_writer().save(tmp_path, "faded", 0, said, module)  # type: ignore[union-attr]

    with open(tmp_path / "faded.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    query = batch.episodes[0].query
    assert [int(row["index"]) for row in rows] == query.index.tolist()
    assert [row["label"] for row in rows] == [f"digit_{number}" for number in query.label.tolist()]
    logits = torch.tensor([[float(row[f"logit_digit_{k}"]) for k in range(10)] for row in rows])
    torch.testing.assert_close(logits, said["logits"])
    assert [row["prediction"] for row in rows] == [f"digit_{k}" for k in logits.argmax(1).tolist()]


@pytest.mark.parametrize("query", [1, 2])
@pytest.mark.parametrize("support", [1, 2])
def test_few_images_have_a_result(support: int, query: int) -> None:
    task = make(MetaTask, facts(), step=InnerStep(rate=0.1, statistics=1.0)).eval()

    answer = task.answer(EpisodeBatch((episode(3, support=support, query=query),)), "u")

    assert bool(answer.after.isfinite().all())


def test_an_adapter_for_classes_refuses_measured_values() -> None:
    told = facts(target="regression", num_classes=1, class_names=[])
    with pytest.raises(ValueError, match="T3A needs classes"):
        make(StudentTask, told, adapter=T3A())
    task = make(MetaTask, told)
    assert (task.monitor, task.main_metric) == ("val/validation/pearson", "pearson")


def test_facts_of_other_data_are_told() -> None:
    told = facts()
    del told["expert_of"]
    with pytest.raises(ValueError, match=r"lacks \['expert_of'\].*AdaptationData"):
        make(StudentTask, told)


def test_a_test_scores_adapters_beside_on_the_same_network(tmp_path: Path) -> None:
    module = data(tmp_path)
    beside: dict[str, Adapter] = {"t3a": T3A(form="support"), "step": Distil()}
    both = make(StudentTask, module.facts, beside=beside)
    trainer(tmp_path).test(both, datamodule=module, verbose=False)
    found = {(row.domain, row.metric): row.value for row in both.results.scores}

    for name, adapter in beside.items():
        alone = make(StudentTask, module.facts, adapter=adapter)
        trainer(tmp_path).test(alone, datamodule=module, verbose=False)
        scores = {(row.domain, row.metric): row.value for row in alone.results.scores}
        for domain in ("plain", "stripes", "faded"):
            assert found[domain, f"accuracy_{name}"] == pytest.approx(scores[domain, "accuracy"])
            assert found[domain, "accuracy"] == pytest.approx(scores[domain, "accuracy_before"])
