# SPDX-License-Identifier: Apache-2.0
"""The ranking task: its masked loss, bad input, predictions, and the configs of HoME's rivals."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from jsonargparse import ArgumentParser
from rec_common import make_batch
from torch import Tensor

from benchmarks.grids import given, load_grid
from tasks.recommendation import rivals
from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.data.multitask_log import MultitaskLog
from tasks.recommendation.data.readers.movielens import MovieLens100K
from tasks.recommendation.model import Ranker, home
from tasks.recommendation.module import RankingTask, masked_losses
from tasks.recommendation.nets.embeddings import FeatureEncoder
from tasks.recommendation.nets.levels import RankingNet
from tasks.recommendation.report.categories import category_means
from tasks.recommendation.rivals import mmoe, stem

PLANS = {**vars(rivals), "home": home}

CONFIGS = Path(__file__).parents[3] / "configs"
FACTS: dict[str, Any] = {
    "domains": {"seen": ["s"], "validation": [], "unseen": []},
    **{"dense_dim": 3, "fields": {"a": 5, "b": 7}, "bags": {"bag": 9}},
    **{"tasks": ["click", "like", "view"], "categories": ["act", "act", "watch"]},
}


def task(**options: Any) -> RankingTask:
    return RankingTask(net=partial(Ranker, bank=home(width=8)), facts=FACTS, **options)


def batch(rows: int = 12) -> Interactions:
    return make_batch(rows=rows, tasks=3)


# --- loss ---


def test_loss_is_the_mean_over_known_labels_summed_over_tasks() -> None:
    logits, label = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 2, (9, 3)).double()
    mask = torch.rand(9, 3) < 0.6

    losses = masked_losses(logits, label, mask, torch.ones(3, dtype=torch.float64))

    for t in range(3):
        p = torch.sigmoid(logits[mask[:, t], t])
        y = label[mask[:, t], t]
        torch.testing.assert_close(losses[t], -(y * p.log() + (1 - y) * (1 - p).log()).mean())


def test_a_task_without_a_label_adds_nothing_and_does_not_move_its_learned_weight() -> None:
    made, data = task(uncertainty=True), batch()
    data.mask[:, 1] = False
    assert made.log_variance is not None
    with torch.no_grad():
        made.log_variance.copy_(torch.tensor([0.3, -0.2, 0.1]))

    out = made.eval().shared_step(data, "train")
    out.loss.backward()

    plain = masked_losses(made(data), data.label, data.mask, torch.ones(3))
    s = made.log_variance.detach()
    expected = sum(plain[t] * math.exp(-float(s[t])) + s[t] for t in (0, 2))
    torch.testing.assert_close(out.loss, expected)
    assert made.log_variance.grad is not None
    assert made.log_variance.grad[1] == 0
    assert out.weight == int((data.mask[:, 0] | data.mask[:, 2]).sum())


def test_hidden_labels_and_rows_without_any_change_nothing() -> None:
    logits = torch.randn(6, 3, requires_grad=True)
    label, mask = torch.randint(0, 2, (6, 3)).float(), torch.ones(6, 3, dtype=torch.bool)
    mask[2] = False
    mask[:, 1] = False
    ones = torch.ones(3)

    losses = masked_losses(logits, label, mask, ones)
    grad = torch.autograd.grad(losses.sum(), logits)[0]  # through the nan of the task without labels, too

    keep = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(losses, masked_losses(logits[keep], label[keep], mask[keep], ones), equal_nan=True)
    assert masked_losses(logits, 1 - label, mask & False, ones).isnan().all()
    assert losses.isnan().tolist() == [False, True, False]
    assert not grad[2].any()
    assert not grad[:, 1].any()


def test_the_loss_of_rare_tasks_is_exact_far_out() -> None:
    logits = torch.tensor([[-200.0], [200.0]], requires_grad=True)

    loss = masked_losses(logits, torch.tensor([[1.0], [1.0]]), torch.ones(2, 1, dtype=torch.bool), torch.ones(1))

    assert loss.item() == 100.0


def test_positive_weights_count_positives_more_and_uncertainty_weighs_tasks() -> None:
    weighted, plain, data = task(positive_weight={"like": 5.0}), task(), batch()
    weighted.load_state_dict({**plain.state_dict(), "positive_weight": weighted.positive_weight})
    weighted.eval()
    plain.eval()
    logits = plain(data)
    known = data.mask[:, 1]
    extra = F.binary_cross_entropy_with_logits(logits[known, 1], data.label[known, 1], reduction="none")

    more = weighted.shared_step(data, "val").loss - plain.shared_step(data, "val").loss
    torch.testing.assert_close(more, 4 * (extra * data.label[known, 1]).sum() / known.sum())

    learned = task(uncertainty=True).eval()
    losses = masked_losses(learned(data), data.label, data.mask, torch.ones(3))
    torch.testing.assert_close(learned.shared_step(data, "val").loss, losses.sum())  # s = 0 at first
    s = torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():
        learned.log_variance.copy_(s)
    torch.testing.assert_close(learned.shared_step(data, "val").loss, (torch.exp(-s) * losses + s).sum())


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive_weight": {"share": 2.0}}, "weights above 0 for some of the tasks"),
        ({"positive_weight": {"like": 0.0}}, "weights above 0"),
        ({"scores": ["gini"]}, None),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str | None) -> None:
    with pytest.raises(ValueError, match=message):
        task(**options).configure_metrics("s")


def test_facts_of_another_data_module_are_refused() -> None:
    with pytest.raises(ValueError, match="facts lacks"):
        RankingTask(facts={"domains": FACTS["domains"], "dense_dim": 3})


def test_one_row_cannot_be_trained_on_but_can_be_answered() -> None:
    with pytest.raises(ValueError, match="one row"):
        task().shared_step(batch(1), "train")
    bare = partial(Ranker, bank=home(width=8), encoder=lambda facts: FeatureEncoder(facts, normalise=False))
    with pytest.raises(ValueError, match=r"1 row\(s\) in training mode"):
        RankingTask(net=bare, facts=FACTS).shared_step(batch(1), "train")
    assert task().eval().predict_step(batch(1))["probability"].shape == (1, 3)


def test_a_task_without_positives_has_a_loss_and_no_gauc_and_does_not_spoil_the_mean() -> None:
    net, data = task(), batch(60)
    data.label[:, 2] = 0.0
    metrics = net.configure_metrics("s")

    out = net.shared_step(data, "train")
    out.loss.backward()
    metrics.update(*out.metric_args)
    scores = metrics.compute()

    assert out.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert math.isnan(scores["gauc_view"])
    assert scores["gauc"] == pytest.approx(float((scores["gauc_click"] + scores["gauc_like"]) / 2))


def test_a_batch_without_any_label_gives_no_loss_and_no_gradient() -> None:
    net, data = task(), batch()
    data.mask[:] = False

    loss = net.shared_step(data, "train").loss
    loss.backward()

    assert loss == 0
    assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)


# --- use ---


def test_predictions_are_probabilities_with_rows_and_users() -> None:
    net, data = task().eval(), batch()

    found = net.predict_step(data)

    torch.testing.assert_close(found["probability"], net(data).sigmoid())
    assert torch.equal(found["row"], data.row)
    assert torch.equal(found["user"], data.user)


def test_stem_has_tables_for_every_task_and_a_shared_one() -> None:
    net = RankingTask(net=partial(Ranker, bank=stem(width=8)), facts=FACTS)

    assert len(net.net.encoders) == 4
    first = net.net.encoders[0].table.table.weight
    loss = F.binary_cross_entropy_with_logits(net(batch())[:, 1], batch().label[:, 1])
    grads = torch.autograd.grad(loss, [e.table.table.weight for e in net.net.encoders], allow_unused=True)
    assert first.shape == net.net.encoders[3].table.table.weight.shape
    assert [bool(g is not None and g.any()) for g in grads] == [False, True, False, True]


def test_means_over_the_tasks_of_a_category() -> None:
    rows = [
        {"domain": d, "role": "seen", "metric": f"gauc_{t}", "value": v}
        for d, t, v in (("p", "a", 0.5), ("p", "b", 0.7), ("p", "c", 0.9), ("q", "a", 0.7), ("q", "b", math.nan))
    ]
    rows.append({"domain": "p", "role": "seen", "metric": "gauc", "value": 0.1})

    means = category_means(rows, ["a", "b", "c"], ["x", "x", "y"])

    assert means == {"seen.x": {"gauc": pytest.approx(19 / 30)}, "seen.y": {"gauc": 0.9}}
    assert category_means(rows, ["a"], ["x"]) == {}


# --- configs ---


def bank(*files: str) -> tuple[str, dict[str, Any]]:
    """Function and options of the bank of configs/home.yaml under overlays, as the command line joins them."""
    path, options = "", {}
    for file in ("home.yaml", *files):
        config = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))
        found = config.get("model", {}).get("init_args", {}).get("net", {}).get("init_args", {}).get("bank", {})
        if found.get("class_path", path) != path:
            path = found["class_path"]
            allowed = ArgumentParser().add_function_arguments(PLANS[path.rpartition(".")[2]], as_group=False)
            options = {key: value for key, value in options.items() if key in allowed}
        options |= found.get("init_args", {})
    return path.rpartition(".")[2], options


def parameters(*files: str) -> int:
    name, options = bank(*files)
    facts = MultitaskLog().schema.facts() | {"domains": FACTS["domains"]}
    net = RankingTask(net=partial(Ranker, bank=PLANS[name](**options)), facts=facts)
    return sum(p.numel() for p in net.parameters())


OVERLAYS = sorted(path.name for path in CONFIGS.glob("baselines/home_*.yaml"))
UNMATCHED = {"home_uniform_gates.yaml"}  # gates that learn nothing have no parameters


@pytest.mark.parametrize("name", OVERLAYS)
def test_rivals_and_ablations_have_as_many_parameters_as_home(name: str) -> None:
    ratio = parameters(f"baselines/{name}") / parameters()

    assert (abs(ratio - 1) <= 0.02) == (name not in UNMATCHED)
    assert 0.94 < ratio < 1.02


def test_mmoe_has_as_many_parameters_as_home_on_movielens_too() -> None:
    facts = MovieLens100K().schema.facts() | {"domains": FACTS["domains"]}
    option = "--model.init_args.net.init_args.bank.init_args.num_experts"
    more = {"num_experts": int(given(load_grid("home").variants["mmoe_ml100k"], option) or 0)}
    sizes = []
    for (name, options), own in ((bank(), {}), (bank("baselines/home_mmoe.yaml"), more)):
        net = RankingTask(net=partial(Ranker, bank=PLANS[name](**options | own)), facts=facts)
        sizes.append(sum(p.numel() for p in net.parameters()))

    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


@pytest.mark.parametrize("name", ["mmoe", "omoe", "cgc", "ple", "ml_mmoe", "adatt", "adatt_sp", "stem"])
def test_rivals_have_plain_relu_experts_and_none_of_homes_parts(name: str) -> None:
    function, options = bank(f"baselines/home_{name}.yaml")
    net = PLANS[function](**options)(66, FACTS)
    assert isinstance(net, RankingNet)
    for level in net.levels:
        assert (level.moe.experts.norm, level.moe.experts.activation) == ("none", "relu")
        assert level.feature_gates is None
        assert level.moe.router.residual != "self_gate"


def test_default_network_is_home() -> None:
    assert isinstance(RankingTask(facts=FACTS).net.bank, RankingNet)
    logits: Tensor = RankingTask(net=partial(Ranker, bank=mmoe(width=8)), facts=FACTS)(batch())
    assert logits.shape == (12, 3)
