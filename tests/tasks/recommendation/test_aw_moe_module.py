# SPDX-License-Identifier: Apache-2.0
"""The list-ranking task: its loss and contrast, what masks touch, training, scores, predictions and bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from aw_moe_common import FACTS, make_lists
from torch import Tensor

from moeapps.moe import MoERecorder
from moeapps.moe.routing import DenseRouting
from moeapps.training.callbacks.routing import expert_work
from moeapps.training.optim import OptimizerConfig
from tasks.recommendation.data.lists import Lists, truncated
from tasks.recommendation.data.taste_types import TasteTypes
from tasks.recommendation.datamodule import ListData
from tasks.recommendation.losses import info_nce, pointwise, random_mask
from tasks.recommendation.model import ListRanker, aw_moe
from tasks.recommendation.module import ListRankingTask, of_taken
from tasks.recommendation.report.score_writer import ListWriter
from tasks.recommendation.rivals.list_banks import averaged_experts, category_gate
from tasks.recommendation.rivals.popularity import Popularity


def task(key: str = "target", **options: Any) -> ListRankingTask:
    torch.manual_seed(0)
    bank = aw_moe(num_experts=3, hidden_dim=8, key=key)  # type: ignore[arg-type]
    return ListRankingTask(**{"facts": FACTS, "net": partial(ListRanker, bank=bank), **options})


def gradients(made: ListRankingTask, batch: Lists) -> list[Tensor]:
    made.zero_grad()
    made.shared_step(batch, "train").loss.backward()
    return [p.grad.clone() for p in made.parameters() if p.grad is not None]


# --- the loss ---


@pytest.mark.parametrize("key", ["target", "query", "none"])
@pytest.mark.parametrize("what", ["gate", "interest"])
def test_the_contrast_is_between_the_history_and_a_part_of_it_for_what_was_taken(key: str, what: str) -> None:
    made, batch = task(key, contrast_weight=0.5, contrast_on=what, mask_probability=0.5), make_lists(12)

    out = made.shared_step(batch, "train")

    plain = task(key)
    kept = random_mask(batch.history_mask, 0.5, made.mask_generator())
    assert not torch.equal(kept, batch.history_mask)
    views = [getattr(made(replace(batch, history_mask=mask)), what) for mask in (batch.history_mask, kept)]
    torch.testing.assert_close(out.logs["loss_rank"], plain.shared_step(batch, "train").loss)
    first, second = (of_taken(view, batch) for view in views)
    known = batch.history_mask.any(1)
    expected = info_nce(first[known], second[known], batch.user[known])
    torch.testing.assert_close(out.logs["loss_contrast"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, out.logs["loss_rank"] + 0.5 * expected, atol=1e-5, rtol=1e-5)


def test_masks_of_probability_zero_leave_the_gate_as_it_is() -> None:
    made, batch = task(contrast_weight=1.0, mask_probability=0.0), make_lists(12)
    out = made.shared_step(batch, "train")
    first, second = made.two_views(batch, made(batch), batch.history_mask)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)
    assert float(out.logs["gate_same"]) == pytest.approx(1.0, abs=1e-6)


def test_a_weight_of_zero_is_the_run_without_bit_by_bit_and_another_mask_seed_changes_the_contrast_alone() -> None:
    batch = make_lists(12)
    plain, zero = task(), task(contrast_weight=0.0, mask_probability=0.7, temperature=3.0, mask_seed=9)
    for a, b in zip(gradients(plain, batch), gradients(zero, batch), strict=True):
        assert torch.equal(a, b)
    state = torch.get_rng_state()
    one, two = (task(contrast_weight=1.0, mask_seed=seed, mask_probability=0.6) for seed in (0, 1))
    torch.set_rng_state(state)
    first, second = one.shared_step(batch, "train"), two.shared_step(batch, "train")
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the global generator
    assert torch.equal(first.logs["loss_rank"], second.logs["loss_rank"])
    assert not torch.equal(first.logs["loss_contrast"], second.logs["loss_contrast"])


def test_augmentation_drops_past_items_in_training_alone() -> None:
    made, plain, batch = task(mask_rank_branch=True, mask_probability=0.6), task(), make_lists(12)
    assert not torch.equal(made.shared_step(batch, "train").loss, plain.shared_step(batch, "train").loss)
    assert torch.equal(made.eval().shared_step(batch, "val").loss, plain.eval().shared_step(batch, "val").loss)


def test_the_second_look_is_in_no_record_and_no_expert_runs_for_it() -> None:
    made, batch = task(contrast_weight=1.0), make_lists()
    for stage in ("train", "test"):
        with MoERecorder(made) as recorder:
            made.shared_step(batch, stage)  # type: ignore[arg-type]
        (record,) = recorder.records
        assert record.routing.num_rows == batch.label.numel()


# --- scores and predictions ---


def test_evaluation_scores_a_cut_history_as_the_cut_lists_would_be() -> None:
    made, batch = task().eval(), make_lists()
    out = made.shared_step(batch, "test")
    scores, label, mask, user, events, oracle, cut, none, gate, gate_cut = out.metric_args

    torch.testing.assert_close(cut, made(truncated(batch, 3)).logits)
    torch.testing.assert_close(none, made(truncated(batch, 0)).logits)
    torch.testing.assert_close(scores, made(batch).logits)
    assert events.tolist() == batch.history_mask.sum(1).tolist()
    assert oracle is None
    chosen = batch.label.argmax(1)
    torch.testing.assert_close(gate, made(batch).gate[torch.arange(8), chosen])
    torch.testing.assert_close(gate_cut, made(truncated(batch, 3)).gate[torch.arange(8), chosen])
    torch.testing.assert_close(out.loss, pointwise(scores, label, mask))
    users, parts = out.parts["list_auc"]
    assert (users.tolist(), parts.shape) == (user.tolist(), (8, 1, 3))


def test_labels_of_the_factor_are_given_for_each_row_that_the_gate_routes() -> None:
    batch = make_lists(4)
    assert task("target").routing_factors(batch)["factor"].label_N.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    assert task("query").routing_factors(batch)["factor"].label_N.tolist() == [0, 1, 0, 1]
    assert task(facts={**FACTS, "factors": []}).routing_factors(batch) == {}


def test_work_of_experts_is_the_size_of_their_weights_where_gates_may_be_negative() -> None:
    made, batch = task("none"), make_lists(4)
    with MoERecorder(made) as recorder:
        made(batch)
    (record,) = recorder.records
    weight = torch.tensor([[3.0, -1.0, 0.0], [0.5, 0.5, -1.0], [1.0, 0.0, 0.0], [-2.0, 2.0, 4.0]])
    signed = replace(record, routing=DenseRouting(weight, 3))
    assert signed.work()[0].tolist() == [0.75, 0.25, 0.0]
    assert signed.work().sum(1).tolist() == [1.0] * 4
    assert expert_work(signed).tolist() == [6.5, 3.5, 5.0]


def test_predictions_are_probabilities_with_ranks_and_no_padding() -> None:
    made, batch = task().eval(), make_lists(3)
    batch = replace(batch, candidate_mask=torch.arange(4).expand(3, 4) < torch.tensor([[4], [2], [3]]))
    answer = made.predict_step(batch)
    columns = ListWriter("csv").columns(answer, batch, "shop", made)

    assert columns["row"].tolist() == [0] * 4 + [1] * 2 + [2] * 3
    assert columns["item"].tolist() == batch.candidate_item[batch.candidate_mask].tolist()
    real = made(batch).logits.sigmoid()[batch.candidate_mask]
    torch.testing.assert_close(torch.from_numpy(columns["probability"]), real.detach())
    for row, num in ((0, 4), (1, 2), (2, 3)):
        here = columns["row"] == row
        assert sorted(columns["rank"][here].tolist()) == list(range(1, num + 1))
        best = columns["probability"][here].argmax()
        assert columns["rank"][here][best] == 1
    assert not answer["probability"][~batch.candidate_mask].any()
    assert answer["gate"].shape == (3, 3)


# --- training ---


@pytest.mark.parametrize("options", [{}, {"ranking_loss": "softmax"}, {"contrast_weight": 0.05}], ids=str)
def test_sixty_steps_on_one_batch_halve_the_loss(options: dict[str, Any]) -> None:
    made, batch = task(**options), make_lists(16)
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        out = made.shared_step(batch, "train")
        losses.append(float(out.logs.get("loss_rank", out.loss).detach()))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


def fitted(weight: float | None, folder: Any, **options: Any) -> ListRankingTask:
    """Two steps by the trainer."""
    L.seed_everything(3, verbose=False)
    log = TasteTypes(num_items=240, train_lists=64, val_lists=32, test_lists=32)
    data = ListData(source=log, batch_size=32, cache_dir=folder)
    bank = aw_moe(num_experts=2, hidden_dim=4)
    extra = {} if weight is None else {"contrast_weight": weight, "mask_seed": 5}
    made = ListRankingTask(
        facts=data.facts, net=partial(ListRanker, bank=bank), optimizer=OptimizerConfig(lr=1e-2), **extra, **options
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(made, datamodule=data)
    return made


def test_a_training_with_weight_zero_ends_at_the_same_bits_and_one_with_weight_elsewhere(tmp_path: Any) -> None:
    plain, zero, contrast = (fitted(weight, tmp_path) for weight in (None, 0.0, 0.5))
    same = [torch.equal(a, b) for a, b in zip(plain.parameters(), zero.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(plain.parameters(), contrast.parameters(), strict=True))


# --- bad input ---


def test_lists_that_are_odd_have_defined_losses() -> None:
    made = task(contrast_weight=1.0, mask_probability=0.5)
    batch = make_lists()
    no_positive = replace(batch, label=torch.zeros_like(batch.label))
    out = made.shared_step(no_positive, "train")
    assert out.loss.isfinite()
    assert out.weight == 8
    pairs = task(ranking_loss="pairwise").shared_step(no_positive, "train")
    assert (pairs.weight, float(pairs.loss.detach())) == (0, 0.0)

    one_user = replace(batch, user=torch.zeros_like(batch.user))  # nobody to differ from
    assert float(made.shared_step(one_user, "train").logs["loss_contrast"].detach()) == pytest.approx(0, abs=1e-6)
    newcomers = replace(batch, history_mask=torch.zeros_like(batch.history_mask))
    out = made.shared_step(newcomers, "train")
    out.loss.backward()
    assert float(out.logs["loss_contrast"].detach()) == 0
    alone = make_lists(1)
    assert made.shared_step(alone, "train").loss.isfinite()
    single = made.shared_step(make_lists(candidates=1), "train")
    assert single.loss.isfinite()


WRONG: list[tuple[Callable[[], object], str]] = [
    (
        lambda: task(facts={"domains": {}}),
        "ListRankingTask: facts lacks .*must be lists: ListData, as in configs/aw_moe",
    ),
    (lambda: task(ranking_loss="hinge"), "ranking_loss='hinge'"),
    (lambda: task(contrast_on="scores"), "gate or interest"),
    (lambda: task(contrast_weight=-1.0), "weight of at least 0"),
    (lambda: task(mask_probability=1.0), "probability in"),
    (lambda: task(temperature=0.0), "above 0"),
    (lambda: task(net=Popularity, contrast_weight=1.0), "Popularity has no gate to contrast"),
    (
        lambda: task(net=partial(ListRanker, bank=averaged_experts()), contrast_weight=1.0),
        "gate reads nothing and is the",
    ),
    (
        lambda: task(net=partial(ListRanker, bank=category_gate()), contrast_weight=1.0),
        "gate reads category and is the",
    ),
]


@pytest.mark.parametrize(("make", "text"), WRONG, ids=[text for _, text in WRONG])
def test_what_cannot_be_done_says_why(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("bank", [averaged_experts(), category_gate()])
def test_a_gate_without_the_history_learns_nothing_from_its_contrast_but_the_user_does(bank: Any) -> None:
    torch.manual_seed(0)
    made, batch = task(net=partial(ListRanker, bank=bank), contrast_weight=1.0, contrast_on="interest"), make_lists(12)
    kept = random_mask(batch.history_mask, 0.5, torch.Generator().manual_seed(0))
    out = made(batch)

    whole, cut = made.two_views(batch, out, kept)
    assert not torch.equal(whole, cut)
    made.contrast_on = "gate"  # what is refused where it is made
    assert torch.equal(*made.two_views(batch, out, kept))


def test_a_gate_that_reads_nothing_can_be_scored_but_not_told_apart() -> None:
    made = task(net=partial(ListRanker, bank=averaged_experts(num_experts=3, hidden_dim=4)))
    gate = made.shared_step(make_lists(), "val").metric_args[-2]
    torch.testing.assert_close(gate, torch.full((8, 3), 1 / 3))
    assert task(net=Popularity).shared_step(make_lists(), "val").metric_args[-2:] == (None, None)
