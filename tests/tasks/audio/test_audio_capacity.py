# SPDX-License-Identifier: Apache-2.0
"""Laws of the layer with dynamic capacity at its published sizes: how many experts, which weights, what nulls cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeapps.moe import GLUExperts, MoELayer, MoERecorder, Routing
from moeapps.moe.losses import Anneal
from moeapps.moe.objectives import chosen_balance
from moeapps.moe.presets import dense_twin, unimoe_audio
from moeapps.training.flops import count_flops

D, REAL, NULL = 12, 8, 1
COLUMNS = REAL + NULL


def layer(**options: Any) -> MoELayer:
    """A layer of the published numbers, in evaluation mode and double precision."""
    made = unimoe_audio(**options)(D).double().eval()
    assert isinstance(made, MoELayer)
    return made


def with_logits(made: MoELayer, logits_NX: Tensor) -> Tensor:
    """Rows of numbers that the layer scores as these logits; the first columns of a row are its logits."""
    score = made.router.score
    with torch.no_grad():
        score.weight.zero_()
        score.weight[: logits_NX.shape[1], : logits_NX.shape[1]] = torch.eye(logits_NX.shape[1])
    return torch.cat([logits_NX, torch.randn(len(logits_NX), D - logits_NX.shape[1])], 1).double()


def routed(made: MoELayer, x: Tensor, **options: Any) -> Routing:
    routing = made.route(x, **options)
    assert isinstance(routing, Routing)
    return routing


def columns_of(routing: Routing) -> Tensor:
    """Which columns, nulls included, each row takes, bool [N, X]: null ones from their marks."""
    real = routing.assignment() > 0
    assert routing.null_M is not None
    return torch.cat([real, routing.null_M.view(routing.num_rows, -1).any(-1, keepdim=True)], 1)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_the_chosen_are_the_fewest_that_reach_p(p: float, sharpness: float) -> None:
    made = layer(top_p=p, num_shared=0)
    x = with_logits(made, torch.randn(300, COLUMNS) * sharpness)
    for row, chosen in zip(x[:, :COLUMNS].softmax(-1).tolist(), columns_of(routed(made, x)).tolist(), strict=True):
        kept = [share for share, taken in zip(row, chosen, strict=True) if taken]
        assert sum(kept) >= p
        assert sum(kept) - min(kept) < p
        assert min(kept) >= max([share for share, taken in zip(row, chosen, strict=True) if not taken], default=0.0)


def test_more_probability_takes_more_experts_from_one_to_all() -> None:
    logits = torch.randn(200, COLUMNS)
    before = torch.zeros(200, dtype=torch.int64)
    for p in (1e-6, 0.2, 0.4, 0.6, 0.8, 0.99, 1.0):
        made = layer(top_p=p, num_shared=0)
        number = columns_of(routed(made, with_logits(made, logits))).sum(-1)
        assert (number >= before).all()
        assert p > 1e-6 or (number == 1).all()
        before = number
    assert (before == COLUMNS).all()  # p = 1: all, though their sum may be rounded to less


def test_undecided_rows_take_the_most_and_decided_ones_take_one() -> None:
    made = layer(num_shared=0)
    assert columns_of(routed(made, with_logits(made, torch.zeros(5, COLUMNS)))).sum(-1).tolist() == [7] * 5
    sure = F.one_hot(torch.arange(COLUMNS), COLUMNS).double() * 50
    assert torch.equal(columns_of(routed(made, with_logits(made, sure))), sure > 0)


def test_all_experts_without_nulls_are_a_soft_mixture() -> None:
    made = layer(top_p=1.0, num_null=0, num_shared=0)
    x = torch.randn(20, D).double()
    share = (x @ made.router.score.weight.T).softmax(-1)
    bank = made.experts
    assert isinstance(bank, GLUExperts)
    wanted = torch.zeros_like(x)
    for e in range(REAL):
        gate, up = (x @ bank.w_in[e]).chunk(2, -1)
        wanted = wanted + share[:, e : e + 1] * ((F.silu(gate) * up) @ bank.w_out[e])
    torch.testing.assert_close(made(x), wanted)


def test_alike_experts_are_one_expert_unless_a_null_takes_its_part() -> None:
    x = torch.randn(20, D).double()
    for null in (0, 1):
        made = layer(num_null=null, num_shared=0)
        bank = made.experts
        assert isinstance(bank, GLUExperts)
        with torch.no_grad():
            bank.w_in.copy_(bank.w_in[:1].expand_as(bank.w_in))
            bank.w_out.copy_(bank.w_out[:1].expand_as(bank.w_out))
        gate, up = (x @ bank.w_in[0]).chunk(2, -1)
        one = (F.silu(gate) * up) @ bank.w_out[0]
        routing = routed(made, x)
        kept = routing.assignment().new_zeros(20).double()
        kept = kept.index_add(0, routing.row_M, routing.weight_M)
        assert null or torch.allclose(kept, torch.ones(20).double())
        assert not null or (kept < 0.99).any()
        torch.testing.assert_close(made(x), kept.unsqueeze(-1) * one)


def test_rows_of_nulls_alone_have_the_shared_part_and_cost_no_routed_expert() -> None:
    logits = F.one_hot(torch.tensor([8] * 6), COLUMNS) * 60.0
    bare = layer(num_shared=0)
    assert torch.equal(bare(with_logits(bare, logits)), torch.zeros(6, D).double())
    made = layer()
    x = with_logits(made, logits)
    shared = made.experts.banks[1]
    a = torch.cat([torch.full((6, 1), 60.0), torch.zeros(6, 2)], 1).double().softmax(-1)
    wanted = torch.zeros(6, D).double()
    for s in range(2):
        gate, up = (x @ shared.w_in[s]).chunk(2, -1)
        wanted = wanted + a[:, 1 + s, None] * ((F.silu(gate) * up) @ shared.w_out[s])
    torch.testing.assert_close(made(x), wanted)
    router = 2 * 6 * D * (COLUMNS + 2)
    both_shared = 2 * 6 * 3 * (2 * D * shared.hidden_dim)
    assert count_flops(made, x) == router + both_shared


def test_gated_weights_of_real_null_and_shared_experts_sum_to_one() -> None:
    made = layer()
    x = torch.randn(200, D).double()
    routing = routed(made, x)
    z = x @ made.router.score.weight.T
    chosen = columns_of(routing)
    share = z[:, :COLUMNS].softmax(-1).where(chosen, 0)
    null = share[:, REAL] / share.sum(-1)
    a = torch.cat([z[:, :COLUMNS].masked_fill(~chosen, -math.inf), z[:, COLUMNS:]], 1).softmax(-1)
    assert routing.shared_weight_NS is not None
    real = torch.zeros(200).double().index_add(0, routing.row_M, routing.weight_M)
    torch.testing.assert_close(routing.shared_weight_NS, a[:, COLUMNS:])
    total = real + null * a[:, :COLUMNS].sum(-1) + routing.shared_weight_NS.sum(-1)
    torch.testing.assert_close(total, torch.ones(200).double())
    added = layer(shared_weighting="add")
    assert routed(added, x).shared_weight_NS is None


@pytest.mark.parametrize("p", [0.7, 1.0])
def test_balance_of_undecided_rows_is_the_number_they_take(p: float) -> None:
    made = layer(top_p=p)
    # Rows prefer by a hair another set of columns each, so that all columns are taken equally often.
    turns = torch.stack([torch.arange(COLUMNS).roll(n) for n in range(COLUMNS)]).double() * 1e-9
    x = with_logits(made, turns)
    with MoERecorder() as recorder:
        made(x)
    assert chosen_balance(recorder.records[0]).item() == pytest.approx(7 if p == 0.7 else COLUMNS)


def test_balance_knows_neither_names_of_experts_nor_padded_rows() -> None:
    made = layer()
    x, keep = torch.randn(60, D).double(), torch.arange(60) < 40

    def balance(rows: Tensor, mask: Tensor | None = None) -> float:
        with MoERecorder() as recorder:
            made(rows, token_mask=mask)
        return chosen_balance(recorder.records[0]).item()

    wanted = balance(x[keep])
    assert balance(x, keep) == pytest.approx(wanted)
    assert balance(x) != pytest.approx(wanted)
    order = torch.cat([torch.randperm(COLUMNS), torch.arange(COLUMNS, COLUMNS + 2)])
    with torch.no_grad():
        made.router.score.weight.copy_(made.router.score.weight[order])
    assert balance(x[keep]) == pytest.approx(wanted)


def test_the_weight_of_balance_falls_as_published() -> None:
    fall = Anneal(final=0.001, steps=10_000)
    assert [fall.at(0.025, step) for step in (0, 5_000, 10_000, 50_000)] == pytest.approx([0.025, 0.013, 0.001, 0.001])


def test_a_fixed_number_of_experts_is_the_layer_of_top_k() -> None:
    made = layer(top_k=3, num_null=0, num_shared=0)
    x = torch.randn(30, D).double()
    z = x @ made.router.score.weight.T
    value, index = z.topk(3)
    wanted = torch.zeros(30, REAL).double().scatter(1, index, value.softmax(-1))
    routing = routed(made, x)
    found = torch.zeros(30, REAL).double()
    found[routing.row_M, routing.expert_M] = routing.weight_M.detach()
    torch.testing.assert_close(found, wanted)


def test_adamoe_gives_the_share_of_its_nulls_to_the_real_experts() -> None:
    x = torch.randn(200, D).double()
    made = layer(top_k=4, num_null=4, null_mass="redistributed", num_shared=0)
    p = (x @ made.router.score.weight.T).softmax(-1)
    value, index = p.topk(4)
    real = index < REAL
    weight = value.where(real, 0) / value.where(real, 0).sum(-1, keepdim=True).clamp(min=1e-300)
    wanted = torch.zeros(200, REAL + 4).double().scatter(1, index, weight)[:, :REAL]
    routing = routed(made, x)
    found = torch.zeros(200, REAL + 1).double()
    found.index_put_((routing.row_M, routing.expert_M), routing.weight_M.detach(), accumulate=True)
    torch.testing.assert_close(found[:, :REAL], wanted)
    assert (wanted.sum(-1) == 0).any()  # rows of nulls alone have nothing


def test_a_budget_is_held_and_has_a_twin_of_its_compute() -> None:
    moe = unimoe_audio(budget=2.0, jitter=0.0)
    made, x = moe(D).train(), torch.randn(400, D)
    for _ in range(150):
        made(x)
    assert isinstance(made, MoELayer)
    taken = routed(made.eval(), x).counts().sum() / 400
    assert float(taken) == pytest.approx(2, rel=0.05)
    assert dense_twin(moe=moe)(D).experts.hidden_dim == 2 * D + 2 * D // 2
    assert dense_twin(moe=moe, match="params")(D).experts.hidden_dim == REAL * D + 2 * D // 2


@pytest.mark.parametrize("options", [{}, {"weighing": "sparse_mixer"}, {"budget": 2.0}, {"top_k": 2}])
def test_evaluation_does_not_depend_on_batch_mates(options: dict[str, Any]) -> None:
    made = layer(**options)
    x = torch.randn(40, D).double()
    torch.testing.assert_close(made(x), torch.cat([made(row) for row in x.split(1)]))
    assert made.router.pool == "row"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": 2.0, "top_k": 2}, "leave out top_k"),
        ({"budget": 2.0, "weighing": "sparse_mixer"}, "or leave out the budget"),
        ({"null_mass": "redistributed", "num_null": 0}, "use num_null >= 1"),
        ({"null_mass": "redistributed", "weighing": "sparse_mixer"}, "'proportional'"),
    ],
)
def test_options_that_leave_each_other_no_room_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        unimoe_audio(**options)
