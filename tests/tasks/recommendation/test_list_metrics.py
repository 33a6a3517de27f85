# SPDX-License-Identifier: Apache-2.0
"""Scores of lists against lists worked by hand, double loops and an independent library."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeapps.evaluation.units import pooled_score
from moeapps.training.scores import DomainScores
from tasks.recommendation.metrics import gauc
from tasks.recommendation.report.list_metrics import (
    ListMetrics,
    expected_list_auc,
    gate_stability,
    list_auc,
    list_metrics,
    ndcg,
    reciprocal_rank,
    user_parts,
)


def tensors(*lists: tuple[list[float], list[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and labels of ragged lists, padded by a score that would win everything."""
    most = max(len(score) for score, _ in lists)
    padded = [([*s, *[99.0] * (most - len(s))], [*y, *[0.0] * (most - len(y))]) for s, y in lists]
    mask = torch.tensor([[k < len(s) for k in range(most)] for s, _ in lists])
    return torch.tensor([s for s, _ in padded]), torch.tensor([y for _, y in padded]), mask


def test_lists_worked_by_hand() -> None:
    score, label, mask = tensors(
        ([3, 1, 2, 0], [0, 0, 1, 0]),  # second of four: 2 of 3 negatives below
        ([1, 1, 0], [1, 0, 0]),  # tied with one, above the other: 1.5 of 2
        ([2, 2, 2, 2, 2], [1, 0, 0, 0, 0]),  # all tied
        ([0.9, 0.5, 0.1], [0, 1, 1]),  # two positives below the negative
    )

    assert list_auc(score, label, mask).tolist() == pytest.approx([2 / 3, 0.75, 0.5, 0.0])
    assert reciprocal_rank(score, label, mask).tolist() == pytest.approx([1 / 2, 1 / 1.5, 1 / 3, 1 / 2])
    d = [1 / math.log2(r + 1) for r in range(1, 6)]
    wanted = [d[1], (d[0] + d[1]) / 2, sum(d) / 5, (d[1] + d[2]) / (d[0] + d[1])]
    assert ndcg(score, label, mask).tolist() == pytest.approx(wanted)
    assert ndcg(score, label, mask, 1).tolist() == pytest.approx([0, 0.5, 0.2, 0])


def test_what_is_not_defined_is_not_a_number_and_never_zero() -> None:
    score, label, mask = tensors(([1, 2], [0, 0]), ([1.0], [1.0]), ([1.0], [0.0]), ([1, 2], [1, 1]), ([2, 1], [1, 0]))

    assert list_auc(score, label, mask).isnan().tolist() == [True, True, True, True, False]
    assert reciprocal_rank(score, label, mask).isnan().tolist() == [True, False, True, False, False]
    assert ndcg(score, label, mask).isnan().tolist() == [True, False, True, False, False]
    assert ndcg(score, label, mask)[1] == 1
    metric = ListMetrics()
    metric.update(score, label, mask, torch.arange(5), torch.full((5,), 9))
    found = metric.compute()
    assert found["list_auc"] == 1
    assert metric.scorable == 1
    assert found["list_auc_tail"].isnan()
    assert found["list_auc_cold"].isnan()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 7), st.integers(1, 6), st.integers(0, 999))
def test_scores_are_those_of_loops_and_of_scikit_learn(rows: int, num: int, levels: int, seed: int) -> None:
    from sklearn.metrics import ndcg_score

    g = torch.Generator().manual_seed(seed)
    score = torch.randint(0, levels, (rows, num), generator=g).double() / 3
    label = (torch.rand(rows, num, generator=g) < 0.4).double()
    mask = torch.rand(rows, num, generator=g) < 0.8
    label = label * mask
    found = {k: ndcg(score, label, mask, k) for k in (None, 1, 3)}
    auc, rank = list_auc(score, label, mask), reciprocal_rank(score, label, mask)

    for b in range(rows):
        real = [i for i in range(num) if mask[b, i]]
        pairs = [(i, j) for i, j in itertools.product(real, real) if label[b, i] == 1 and label[b, j] == 0]
        won = sum(1.0 if score[b, i] > score[b, j] else 0.5 * (score[b, i] == score[b, j]) for i, j in pairs)
        assert math.isnan(auc[b]) if not pairs else float(auc[b]) == pytest.approx(float(won) / len(pairs))
        positives = [i for i in real if label[b, i] == 1]
        if not positives:
            assert math.isnan(rank[b])
            continue
        negatives = [j for j in real if label[b, j] == 0]
        best = min(
            1 + sum(float(score[b, j] > score[b, i]) + 0.5 * float(score[b, j] == score[b, i]) for j in negatives)
            for i in positives
        )
        assert float(rank[b]) == pytest.approx(1 / best)
        if len(real) > 1:
            for k, values in found.items():
                wanted = ndcg_score([label[b, real].tolist()], [score[b, real].tolist()], k=k)
                assert float(values[b]) == pytest.approx(wanted, abs=1e-9)


def test_one_score_for_all_is_one_half_and_the_other_way_round_is_the_rest() -> None:
    g = torch.Generator().manual_seed(0)
    score, mask = torch.randn(200, 6, generator=g), torch.rand(200, 6, generator=g) < 0.9
    label = (torch.rand(200, 6, generator=g) < 0.3).float() * mask
    auc = list_auc(score, label, mask)

    defined = ~auc.isnan()
    assert (list_auc(torch.zeros(200, 6), label, mask)[defined] == 0.5).all()
    torch.testing.assert_close(list_auc(-score, label, mask)[defined], 1 - auc[defined])
    torch.testing.assert_close(list_auc(score.exp() * 3, label, mask), auc, equal_nan=True)
    order = torch.randperm(6)
    torch.testing.assert_close(list_auc(score[:, order], label[:, order], mask[:, order]), auc, equal_nan=True)


def test_expected_auc_is_the_mean_over_which_candidate_is_the_one() -> None:
    g = torch.Generator().manual_seed(0)
    score = torch.randint(0, 4, (20, 5), generator=g).double()
    p = torch.rand(20, 5, generator=g).double().softmax(1)
    mask = torch.ones(20, 5, dtype=torch.bool)

    wanted = sum(p[:, i] * list_auc(score, torch.eye(5)[i].expand(20, 5), mask) for i in range(5))
    torch.testing.assert_close(expected_list_auc(score, p, mask), wanted)
    assert expected_list_auc(score[:, :1], p[:, :1] * 0 + 1, mask[:, :1]).isnan().all()
    some = mask.clone()
    some[3] = False
    assert expected_list_auc(score, p, some).isnan().tolist() == [n == 3 for n in range(20)]
    assert expected_list_auc(score[:, :0], p[:, :0], mask[:, :0]).isnan().all()


def test_padding_does_not_count() -> None:
    g = torch.Generator().manual_seed(1)
    score, label = torch.randn(30, 5, generator=g), torch.eye(5)[torch.randint(0, 3, (30,), generator=g)]
    mask = torch.arange(5).expand(30, 5) < torch.randint(3, 6, (30, 1), generator=g)
    loud = torch.where(mask, score, torch.tensor(math.nan))
    args = (label * mask, mask)

    for function in (list_auc, reciprocal_rank, ndcg):
        torch.testing.assert_close(function(loud, *args), function(torch.where(mask, score, 1e9), *args))


def test_wrong_scores_are_told() -> None:
    label, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="1 of 6 scores are not finite"):
        list_auc(torch.tensor([[0.0, 1, 2], [0, math.nan, 1]]), label, mask)
    with pytest.raises(ValueError, match=r"all are \[B, N\]"):
        ndcg(torch.zeros(2, 4), label, mask)
    with pytest.raises(ValueError, match="k=0"):
        ndcg(label, label, mask, 0)
    with pytest.raises(ValueError, match="places count from 1"):
        ListMetrics([0])


def test_cosines_are_those_of_all_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    gate, other = torch.randn(12, 3, generator=g), torch.randn(12, 3, generator=g)
    user = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 5])
    gate[4] = 0  # no direction

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    same, between = gate_stability(gate, other, user)
    rows = [i for i in range(12) if i != 4]
    assert float(same) == pytest.approx(np.mean([cosine(gate[i], other[i]) for i in rows]), abs=1e-6)
    pairs = [(i, j) for i, j in itertools.permutations(rows, 2) if user[i] != user[j]]
    assert float(between) == pytest.approx(np.mean([cosine(gate[i], gate[j]) for i, j in pairs]), abs=1e-6)
    assert float(gate_stability(gate, 2 * gate, user)[0]) == pytest.approx(1)
    assert gate_stability(gate[:3], other[:3], user[:3])[1].isnan()


def batches(users: int = 6) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    made = []
    for rows in (40, 1, 25):
        label = torch.eye(4)[torch.randint(0, 4, (rows,), generator=g)]
        label[::9] = 0
        made.append(
            {
                "score": torch.randn(rows, 4, generator=g),
                "label": label,
                "mask": torch.ones(rows, 4, dtype=torch.bool),
                "user": torch.randint(0, users, (rows,), generator=g),
                "events": torch.randint(0, 12, (rows,), generator=g),
                "oracle": torch.randn(rows, 4, generator=g).softmax(1),
                "truncated": torch.randn(rows, 4, generator=g),
                "no_history": torch.randn(rows, 4, generator=g),
                "gate": torch.randn(rows, 3, generator=g),
                "gate_truncated": torch.randn(rows, 3, generator=g),
            }
        )
    return made


def test_collection_scores_the_whole_epoch_and_every_kind_of_user_apart() -> None:
    metrics = list_metrics((1, 2))
    for batch in batches():
        metrics.update(**batch)
    found = {name: float(value) for name, value in metrics.compute().items()}

    rows = {name: torch.cat([batch[name] for batch in batches()]) for name in batches()[0]}
    args = (rows["label"], rows["mask"])
    auc = list_auc(rows["score"], *args)
    full = rows["events"] > 5
    cut = list_auc(rows["truncated"], *args)
    assert found["list_auc"] == pytest.approx(float(auc.nanmean()))
    assert found["ndcg_2"] == pytest.approx(float(ndcg(rows["score"], *args, 2).nanmean()))
    assert found["list_auc_cold"] == pytest.approx(float(auc[rows["events"] == 0].nanmean()))
    assert found["list_auc_tail"] == pytest.approx(float(auc[torch.isin(rows["events"], torch.arange(1, 6))].nanmean()))
    assert found["list_auc_truncated"] == pytest.approx(float(cut[full].nanmean()))
    assert found["truncation_gap"] == pytest.approx(float((auc - cut)[full].nanmean()))
    whose = rows["user"].repeat_interleave(4)
    assert found["gauc"] == pytest.approx(float(gauc(rows["score"].flatten(), rows["label"].flatten(), whose)))
    same, between = gate_stability(rows["gate"][full], rows["gate_truncated"][full], rows["user"][full])
    assert (found["gate_same"], found["gate_between"]) == pytest.approx((float(same), float(between)))
    assert found["list_auc_ceiling"] >= found["list_auc_expected"]
    better = next(iter(metrics.values())).larger_is_better
    assert set(found) == set(better)
    assert not better["truncation_gap"]


def test_scores_of_what_is_not_given_are_left_out_and_reset_forgets() -> None:
    metric = ListMetrics()
    first = {name: batches()[0][name] for name in ("score", "label", "mask", "user", "events")}
    metric.update(**first)

    absent = {"list_auc_expected", "list_auc_ceiling", "list_auc_truncated", "list_auc_no_history", "truncation_gap"}
    assert not (absent | {"gate_same", "gate_between"}) & set(metric.compute())
    metric.reset()
    with pytest.warns(UserWarning, match="compute"):
        assert all(value.isnan() for value in metric.compute().values())


def test_one_user_in_a_batch_and_a_user_twice_are_defined() -> None:
    metric = ListMetrics()
    batch = batches(users=1)[0]
    metric.update(**batch)
    found = metric.compute()

    assert found["gate_between"].isnan()
    assert 0 < float(found["gauc"]) < 1


def test_parts_of_users_pool_to_the_mean_over_lists() -> None:
    scores = DomainScores({"d": "seen"}, lambda domain: list_metrics())
    every = []
    for batch in batches():
        auc = list_auc(batch["score"], batch["label"], batch["mask"])
        every.append(auc)
        parts = {"list_auc": user_parts(auc, batch["user"])}
        scores.update("d", torch.tensor(1.0), len(auc), tuple(batch.values()), {}, parts=parts)
    table = scores.compute(["d"])

    pooled = pooled_score(np.array(table.parts["d"]["list_auc"]).sum(0))
    assert float(pooled) == pytest.approx(float(torch.cat(every).nanmean()))
    assert table.scorable["d"] == int((~torch.cat(every).isnan()).sum())
    assert {row.metric: row.direction for row in table.scores}["truncation_gap"] == "min"
