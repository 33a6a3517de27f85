# SPDX-License-Identifier: Apache-2.0
"""Laws of the auxiliary losses, each against a value known by arithmetic or a loop over rows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from moeapps.moe import objectives
from moeapps.moe.record import Record
from moeapps.moe.routers import Capacity, GatedShared, TopK, TopP
from moeapps.moe.routers.chooser import Chooser
from moeapps.moe.routing import DenseRouting, Routing
from tests.moe.losses_common import E, K, N, cyclic_record, logits, record_of, topk_record

# --- switch


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("sharp", [0.1, 5.0])
def test_balanced_routing_gives_exactly_one_for_any_k(k: int, sharp: float) -> None:
    torch.testing.assert_close(objectives.switch_balance(cyclic_record(k, sharp)).item(), 1.0, rtol=1e-12, atol=0)


def test_uniform_probabilities_give_one_whatever_was_selected() -> None:
    record = topk_record(torch.zeros(N, E, dtype=torch.float64), K)
    assert objectives.switch_balance(record).item() == pytest.approx(1.0, abs=1e-14)


def test_everything_on_one_expert_gives_the_number_of_experts() -> None:
    one = torch.zeros(N, E, dtype=torch.float64)
    one[:, 2] = 1000.0
    assert objectives.switch_balance(topk_record(one, 1)).item() == pytest.approx(E, abs=1e-12)


def test_value_equals_a_loop_over_rows() -> None:
    s = logits()
    record = topk_record(s, K)
    f, p = [0.0] * E, [0.0] * E
    for n in range(N):
        row = s[n].softmax(0)
        for e in row.argsort(descending=True)[:K]:
            f[e] += 1 / (N * K)
        for e in range(E):
            p[e] += row[e].item() / N
    assert objectives.switch_balance(record).item() == pytest.approx(
        E * sum(a * b for a, b in zip(f, p, strict=True)), abs=1e-12
    )


def test_gradient_pushes_the_overloaded_logit_down_and_reaches_every_row() -> None:
    s = logits(scale=0.1)
    with torch.no_grad():
        s[:, 0] += 2.0
    objectives.switch_balance(topk_record(s, 1)).backward()
    assert (s.grad[:, 0] > 0).all()
    assert (s.grad[:, 1:] < 0).all()
    torch.testing.assert_close(s.grad.sum(1), torch.zeros(N, dtype=torch.float64))


def test_balance_does_not_change_when_experts_are_renumbered() -> None:
    s = logits()
    order = torch.tensor([2, 0, 3, 1])
    a, b = objectives.switch_balance(topk_record(s, K)), objectives.switch_balance(topk_record(s[:, order], K))
    torch.testing.assert_close(a, b)


def test_masked_rows_count_nowhere() -> None:
    s = logits()
    mask = torch.arange(N) % 3 != 0
    masked, alone = topk_record(s, K, mask=mask), topk_record(s[mask], K)
    for function in (
        objectives.switch_balance,
        objectives.importance_cv2,
        objectives.load_cv2,
        objectives.z_loss,
        objectives.token_entropy,
        objectives.batch_entropy_gap,
        objectives.mutual_information,
    ):
        torch.testing.assert_close(function(masked), function(alone), msg=function.__name__)
        (grad,) = torch.autograd.grad(function(masked), s, retain_graph=True)
        assert (grad[~mask] == 0).all(), function.__name__


@pytest.mark.parametrize("k", [1, 2, 3])
def test_two_half_batches_with_common_counts_equal_the_whole_batch(k: int) -> None:
    s = logits()
    whole = objectives.switch_balance(topk_record(s, k))
    halves = [topk_record(part, k) for part in s.split(N // 2)]
    counts = sum(objectives.column_counts(half) for half in halves)
    synced = torch.stack([objectives.switch_balance(half, counts_E=counts) for half in halves]).mean()
    torch.testing.assert_close(synced, whole)
    torch.testing.assert_close(torch.autograd.grad(synced, s)[0], torch.autograd.grad(whole, s)[0])


def test_per_group_equals_the_mean_over_groups_routed_alone() -> None:
    s = logits()
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([3, 7, 11])[torch.randint(0, 3, (N,), generator=generator)]
    together = objectives.switch_balance(topk_record(s, K, group=group), per_group=True)
    alone = torch.stack([objectives.switch_balance(topk_record(s[group == g], K)) for g in (3, 7, 11)]).mean()
    torch.testing.assert_close(together, alone)


def test_per_group_leaves_masked_rows_and_empty_groups_out() -> None:
    s = logits()
    group = torch.arange(N) // 12
    mask = (group != 1) & (torch.arange(N) % 5 != 0)
    together = objectives.switch_balance(topk_record(s, K, group=group, mask=mask), per_group=True)
    alone = torch.stack([objectives.switch_balance(topk_record(s[mask & (group == g)], K)) for g in (0, 2, 3)]).mean()
    torch.testing.assert_close(together, alone)


def test_drops_shrink_the_load_of_the_full_expert_but_the_shares_still_sum_to_one() -> None:
    record = topk_record(torch.zeros(6, 2, dtype=torch.float64), 1)
    dropped = Routing(
        record.routing.row_M,
        torch.tensor([0, 0, 0, 1, 2, 2]),
        record.routing.weight_M,
        6,
        2,
        top_k=1,
        probs_NE=torch.tensor([[0.75, 0.25]], dtype=torch.float64).expand(6, 2),
    )
    assert objectives.switch_balance(Record("moe", dropped, nn.Identity())).item() == pytest.approx(
        2 * (0.75 * 0.75 + 0.25 * 0.25)
    )


def test_null_columns_share_their_mean_load() -> None:
    s = logits(e=6)
    record = record_of(TopK(3, num_null=2), s)
    raw = torch.bincount(s.softmax(-1).topk(3, -1).indices.flatten(), minlength=6).double()
    expected = raw.clone()
    expected[4:] = raw[4:].mean()
    torch.testing.assert_close(objectives.column_counts(record), expected)
    torch.testing.assert_close(
        objectives.switch_balance(record), 6 * (expected / expected.sum() * s.softmax(-1).mean(0)).sum()
    )


def test_padding_of_top_p_is_no_null_choice() -> None:
    p = torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.7, 0.1]], dtype=torch.float64)
    # Row 0 takes expert 0 and the null expert, row 1 takes expert 1 and expert 0.
    record = record_of(TopP(0.8, num_null=1), p.log())
    assert objectives.column_counts(record).tolist() == [2.0, 1.0, 1.0]


@pytest.mark.parametrize("choose", [TopK(3, num_null=2), TopP(0.6, num_null=2), GatedShared(TopK(2, num_null=2), 1)])
def test_null_choices_survive_capacity_and_leave_masked_rows_out(choose: Chooser) -> None:
    s, mask = logits(e=6 + choose.num_shared), torch.arange(N) % 4 != 0
    masked, alone = record_of(choose, s, mask=mask), record_of(choose, s[mask])
    torch.testing.assert_close(objectives.column_counts(masked), objectives.column_counts(alone))
    torch.testing.assert_close(objectives.switch_balance(masked), objectives.switch_balance(alone))
    dropped = Record("moe", Capacity(0.2, minimum=1)(alone.routing), alone.layer)
    torch.testing.assert_close(objectives.column_counts(dropped)[4:], objectives.column_counts(alone)[4:])


def test_per_group_with_null_experts_equals_groups_routed_alone() -> None:
    s, group, mask = logits(e=6), torch.arange(N) // 16, torch.arange(N) % 5 != 0
    together = objectives.switch_balance(record_of(TopK(3, num_null=2), s, group=group, mask=mask), per_group=True)
    parts = [record_of(TopK(3, num_null=2), s[mask & (group == g)]) for g in range(3)]
    torch.testing.assert_close(together, torch.stack([objectives.switch_balance(part) for part in parts]).mean())


def test_sigmoid_scores_are_normalised_per_row() -> None:
    record = topk_record(logits(), K)
    scores = torch.sigmoid(record.routing.logits_NE)
    routing = copy.copy(record.routing)
    object.__setattr__(routing, "probs_NE", scores)
    expected = scores / scores.sum(1, keepdim=True)
    torch.testing.assert_close(objectives.probabilities(Record("moe", routing, nn.Identity())), expected)


# --- importance, load, z


def test_importance_is_zero_when_balanced_and_one_expert_gives_zero() -> None:
    assert objectives.importance_cv2(cyclic_record(K, 2.0)).item() == pytest.approx(0.0, abs=1e-20)
    assert objectives.importance_cv2(topk_record(logits(e=1), 1)).item() == 0.0


def test_importance_of_one_expert_taking_all_is_experts_minus_one() -> None:
    one = torch.zeros(N, E, dtype=torch.float64)
    one[:, 1] = 1000.0
    assert objectives.importance_cv2(topk_record(one, 1)).item() == pytest.approx(E - 1)


def test_importance_of_dense_gates_is_the_mean_over_gates_and_their_own_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(2, N, 3, generator=generator, dtype=torch.float64)
    allowed = torch.tensor([[[True, True, False]], [[True, True, True]]])
    weight = weight * allowed
    routing = DenseRouting(weight, 3, allowed=allowed)
    sums = weight.sum(1)
    expected = torch.stack([v.var(correction=0) / v.mean() ** 2 for v in (sums[0, :2], sums[1])]).mean()
    torch.testing.assert_close(objectives.importance_cv2(Record("moe", routing, nn.Identity())), expected)


def test_load_counts_rows_when_the_noise_is_small_and_has_a_gradient() -> None:
    s = logits()
    counts = s.topk(K, -1).indices.flatten().bincount(minlength=E).double()
    sharp = objectives.load_cv2(topk_record(s, K), noise_std=1e-9)
    torch.testing.assert_close(sharp, counts.var(correction=0) / counts.mean() ** 2)
    objectives.load_cv2(topk_record(s, K)).backward()
    assert s.grad.abs().sum() > 0


def test_load_equals_a_loop_over_the_other_experts() -> None:
    s = logits(n=7)
    load = torch.zeros(E, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    for n in range(7):
        for e in range(E):
            others = torch.cat([s[n, :e], s[n, e + 1 :]]).sort(descending=True).values
            load[e] += normal.cdf((s[n, e] - others[K - 1]) / 0.5)
    torch.testing.assert_close(
        objectives.load_cv2(topk_record(s, K), noise_std=0.5),
        load.var(correction=0) / load.mean() ** 2,
        rtol=1e-6,
        atol=0,
    )


def test_load_is_zero_when_every_expert_is_always_chosen() -> None:
    assert objectives.load_cv2(topk_record(logits(), E)).item() == 0.0


def test_z_loss_is_the_squared_log_partition() -> None:
    s = logits()
    torch.testing.assert_close(objectives.z_loss(topk_record(s, K)), s.exp().sum(1).log().square().mean())
    assert objectives.z_loss(topk_record(torch.zeros(3, E), 1)).item() == pytest.approx(math.log(E) ** 2)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("dtype", "size"), [("float16", 300), ("bfloat16", 1e20), ("float32", 1e20), ("float32", 3e38), ("float64", 1e200)]
)
def test_z_loss_of_logits_whose_square_overflows_is_finite_and_pulls_them_to_zero(
    dtype: str, size: float, sign: int
) -> None:
    s = torch.full((N, E), sign * size, dtype=getattr(torch, dtype), requires_grad=True)

    value = objectives.z_loss(topk_record(s, K))
    (grad,) = torch.autograd.grad(value, s)

    assert value.isfinite()
    assert value > objectives.z_loss(topk_record(s.detach() / size, K))
    assert grad.isfinite().all()
    assert (grad * sign > 0).all()


def test_z_loss_is_exact_up_to_where_its_sum_overflows() -> None:
    column_1E = torch.eye(1, E)
    s = (1e18 * column_1E).repeat(N, 1).requires_grad_()

    value = objectives.z_loss(topk_record(s, K))

    torch.testing.assert_close(value, torch.tensor(1e36))
    torch.testing.assert_close(torch.autograd.grad(value, s)[0], (2e18 / N * column_1E).repeat(N, 1))


def test_z_loss_ignores_excluded_columns() -> None:
    s = logits().detach()
    excluded = torch.cat([s, torch.full((N, 1), -math.inf, dtype=torch.float64)], 1)
    torch.testing.assert_close(objectives.z_loss(topk_record(excluded, K)), objectives.z_loss(topk_record(s, K)))


# --- entropy


def test_entropies_of_uniform_and_of_decided_rows() -> None:
    uniform, decided = topk_record(torch.zeros(N, E, dtype=torch.float64), K), cyclic_record(1, 1000.0)
    assert objectives.token_entropy(uniform).item() == pytest.approx(math.log(E))
    assert objectives.batch_entropy_gap(uniform).item() == pytest.approx(0.0, abs=1e-14)
    assert objectives.mutual_information(uniform).item() == pytest.approx(0.0, abs=1e-14)
    assert objectives.token_entropy(decided).item() == pytest.approx(0.0, abs=1e-14)
    assert objectives.batch_entropy_gap(decided).item() == pytest.approx(0.0, abs=1e-14)
    assert objectives.mutual_information(decided).item() == pytest.approx(math.log(E))


def test_mutual_information_is_what_the_two_entropies_leave() -> None:
    record = topk_record(logits(), K)
    expected = math.log(E) - objectives.batch_entropy_gap(record) - objectives.token_entropy(record)
    torch.testing.assert_close(objectives.mutual_information(record), expected)


@pytest.mark.parametrize(
    "name", ["token_entropy", "batch_entropy_gap", "mutual_information", "switch_balance", "load_cv2", "z_loss"]
)
def test_gradients_equal_finite_differences(name: str) -> None:
    function = getattr(objectives, name)
    assert torch.autograd.gradcheck(lambda s: function(topk_record(s, K)), logits(n=5))


def test_gradients_are_finite_where_a_probability_is_zero() -> None:
    s = torch.tensor([[0.0, -math.inf, 1.0], [0.0, -2000.0, 1.0]], requires_grad=True)
    record = topk_record(s, 1)
    (
        objectives.token_entropy(record) + objectives.batch_entropy_gap(record) + objectives.switch_balance(record)
    ).backward()
    assert s.grad[:, [0, 2]].isfinite().all()


# --- without logits, and for dense gates


def test_one_expert_without_logits_is_balanced() -> None:
    routing = Routing(torch.arange(3), torch.zeros(3, dtype=torch.int64), torch.ones(3), 3, 1, top_k=1)
    record = Record("dense", routing, nn.Identity())
    assert objectives.switch_balance(record).item() == 1.0
    assert objectives.token_entropy(record).item() == 0.0


def test_entropy_and_z_are_defined_for_dense_gates() -> None:
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(2, N, E, generator=generator, dtype=torch.float64)
    p = s.softmax(-1)
    record = Record("gate", DenseRouting(p, E, logits_NE=s, probs_NE=p), nn.Identity())
    torch.testing.assert_close(objectives.token_entropy(record), torch.special.entr(p).sum(-1).mean())
    torch.testing.assert_close(objectives.z_loss(record), s.logsumexp(-1).square().mean())
