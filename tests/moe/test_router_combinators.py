# SPDX-License-Identifier: Apache-2.0
"""Laws of routers made of others: conditional splits, gates beside each other, sums of routers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moeapps.moe import (
    ConditionalSplit,
    Dense,
    ExpertChoice,
    GatedShared,
    LinearScore,
    MLPExperts,
    MoELayer,
    MultiGate,
    PrototypeScore,
    RandomScore,
    Record,
    Router,
    Slots,
    SumRouters,
    Threshold,
    TopK,
    TopP,
)
from moeapps.moe.objectives import chosen_balance
from tests.moe.router_common import D, E, features

# --- conditional splits ---------------------------------------------------------------------------------------------


def test_conditional_split_sends_each_group_where_it_belongs() -> None:
    inner = Router(PrototypeScore(D, E), TopK(2, weighing="identity")).double()
    split = ConditionalSplit(inner, fixed_groups=(-1, 7))
    x, group = features(), torch.tensor([-1, 0, 7, 1, 7, 7, 3, -1, 2, 2, 2, 2])
    assert split.num_experts == E + 2
    routing, plain = split(x, group=group), inner(x)
    dense, rest = routing.assignment(), (group >= 0) & (group < 7)
    torch.testing.assert_close(dense[rest][:, :E], plain.assignment()[rest])
    assert dense[group == -1].tolist() == [[0, 0, 0, 0, 1, 0]] * 2
    assert dense[group == 7].tolist() == [[0, 0, 0, 0, 0, 1]] * 3
    assert routing.counts()[E:].tolist() == [2, 3]
    torch.testing.assert_close(routing.probs_NE.sum(-1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(routing.probs_NE[rest][:, :E], plain.probs_NE[rest])
    torch.testing.assert_close(routing.logits_NE.softmax(-1), routing.probs_NE)
    assert torch.logsumexp(routing.logits_NE, -1)[~rest].abs().max() == 0
    masked = split(x, group=group, token_mask=group != 7)
    assert masked.counts()[E:].tolist() == [2, 0]


def test_conditional_split_over_expert_choice_per_sample() -> None:
    inner = Router(PrototypeScore(D, E), ExpertChoice(1.0, per="group", weighing="identity")).double()
    x, group = features(16), torch.tensor([0] * 8 + [-1] * 4 + [5] * 4)
    routing = ConditionalSplit(inner)(x, group=group)
    assert routing.counts().tolist() == [2 + 1] * E + [4]


def test_conditional_split_says_what_it_needs() -> None:
    router = Router(LinearScore(D, E), TopK(2))
    with pytest.raises(ValueError, match="pass group=ids"):
        ConditionalSplit(router)(torch.randn(3, D))
    with pytest.raises(ValueError, match="at least one group id"):
        ConditionalSplit(router, ())
    with pytest.raises(ValueError, match="pass group=ids"):
        ConditionalSplit(router, None)(torch.randn(3, D))
    with pytest.raises(ValueError, match="needs a sparse router"):
        ConditionalSplit(Router(LinearScore(D, E), Dense()))
    slots = ConditionalSplit(Router(LinearScore(D, 2 * E), Slots(2)))
    with pytest.raises(ValueError, match="not of slots"):
        slots(torch.randn(3, D), group=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "choose",
    [
        TopK(2),
        TopP(0.6),
        ExpertChoice(1.0),
        ExpertChoice(1.0, per="group"),
        Threshold(1.0),
        Threshold(2.0, scope="pairs", weighing="identity"),
    ],
    ids=lambda choose: type(choose).__name__,
)
def test_conditional_split_fits_every_sparse_chooser(choose: nn.Module) -> None:
    split = ConditionalSplit(Router(LinearScore(D, E), choose).double(), None)
    x, group = features(12), torch.tensor([0, 0, -1, 3, -4, 3, 7, 7, 7, -1, 0, 0])
    routing = split(x, group=group)
    dense, fixed = routing.assignment(), group < 0
    assert dense[fixed].tolist() == [[0.0] * E + [1.0]] * 3
    assert (dense[~fixed][:, E] == 0).all()
    assert dense[~fixed][:, :E].abs().sum() > 0
    assert split.pool == choose.pool
    torch.testing.assert_close(routing.probs_NE[~fixed][:, :E], split.conditional(x, group=group).probs_NE[~fixed])


def test_shared_experts_that_the_router_weighs_work_fully_on_fixed_rows() -> None:
    """Experts of a constant output: a fixed row gives its own expert's plus all shared ones', a masked row nothing."""
    router = Router(LinearScore(D, E + 2), GatedShared(TopK(2), 2)).double()
    experts = MLPExperts(E + 1 + 2, D, 3, bias=True).double()
    with torch.no_grad():
        experts.feed_forward().w_out.zero_()
        experts.feed_forward().b_out.copy_(torch.arange(E + 3.0).unsqueeze(1).expand(-1, D))
    layer, x = MoELayer(ConditionalSplit(router), experts, num_shared=2), features(5)
    group, mask = torch.tensor([0, -1, -1, 2, -1]), torch.tensor([True, True, False, True, True])
    y = layer(x, group=group, token_mask=mask)
    inner = router(x)
    weight = torch.cat([inner.assignment(), inner.shared_weight_NS], 1)
    gated = weight @ torch.tensor([0.0, 1.0, 2.0, 3.0, E + 1, E + 2], dtype=x.dtype)
    expected = torch.where(group < 0, E + (E + 1) + (E + 2), gated).where(mask, 0)

    torch.testing.assert_close(y, expected.unsqueeze(1).expand(-1, D))


# --- gates and sums -------------------------------------------------------------------------------------------------


def test_gates_equal_separate_dense_routers() -> None:
    scores = [LinearScore(D, 3).double() for _ in range(2)]
    allowed = torch.tensor([[True, True, False], [False, True, True]])
    x = torch.randn(2, 8, D, dtype=torch.float64)
    gates = MultiGate(scores, allowed=allowed, weighing=["softmax", "sigmoid"])
    together = gates(x)
    for g, kind in enumerate(("softmax", "sigmoid")):
        alone = Router(scores[g], Dense(kind, allowed[g]))(x[g])
        torch.testing.assert_close(together.weight[g], alone.weight)
        assert not together.weight[g][:, ~allowed[g]].any()
    torch.testing.assert_close(gates((x[0], x[1])).weight, together.weight)
    torch.testing.assert_close(gates(x[0]).weight, gates(torch.stack([x[0], x[0]])).weight)
    mask = torch.arange(8) < 5
    assert not gates(x, token_mask=mask).weight[:, 5:].any()
    assert gates(x, token_mask=mask).counts().tolist() == [5, 5, 5]


def test_gates_may_read_widths_of_their_own() -> None:
    gates = MultiGate([LinearScore(2, 3), LinearScore(6, 3)])
    assert gates((torch.randn(5, 2), torch.randn(5, 6))).weight.shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"scores": []}, "at least one gate"),
        ({"scores": [LinearScore(D, 3), LinearScore(D, 4)]}, "one column per expert"),
        ({"scores": [LinearScore(D, 2)], "allowed": [[False, False]]}, "every row"),
        ({"scores": [LinearScore(D, 2)], "allowed": [[True, True], [True, True]]}, r"must be \[1, 2\]"),
        ({"scores": [LinearScore(D, 2)], "weighing": ["softmax", "softmax"]}, "one per gate"),
    ],
)
def test_gates_are_checked(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MultiGate(**arguments)


def test_gates_count_their_features() -> None:
    gates = MultiGate([LinearScore(D, 2), LinearScore(D, 2)])
    with pytest.raises(ValueError, match="features for 3 gates"):
        gates(torch.randn(3, 4, D))


def test_a_sum_of_routers_gives_the_sum_of_their_outputs() -> None:
    x = features()
    for make in (lambda: TopK(2), lambda: TopP(0.6), lambda: Dense("sigmoid")):
        parts = [Router(LinearScore(D, E), make()).double() for _ in range(2)]
        layer = MoELayer(SumRouters(parts), MLPExperts(E, D, 6).double())
        alone = [MoELayer(part, layer.experts) for part in parts]
        torch.testing.assert_close(layer(x), sum(one(x) for one in alone))


def test_a_sum_of_routers_needs_routers_that_agree() -> None:
    dense, sparse = Router(LinearScore(D, E), Dense()), Router(LinearScore(D, E), TopK(2))
    with pytest.raises(ValueError, match="at least two that agree"):
        SumRouters([dense, sparse])
    with pytest.raises(ValueError, match="at least two"):
        SumRouters([dense])
    batch = [Router(LinearScore(D, E), ExpertChoice(1.0)) for _ in range(2)]
    with pytest.raises(ValueError, match="these are neither"):
        SumRouters(batch)(torch.randn(4, D))


def test_a_sum_with_several_nulls_knows_the_column_of_every_assignment() -> None:
    """Row by row the columns of the first router, then those of the second; the nulls are columns 4 and 5."""
    parts = [Router(LinearScore(D, E + 2), TopK(2, num_null=2)).double() for _ in range(2)]
    x = features()
    record = Record("sum", SumRouters(parts)(x), nn.Identity())
    columns = [part(x).logits_NE.topk(2, -1).indices for part in parts]
    routing = record.routing
    assert routing.column_M.view(12, 4).tolist() == torch.cat(columns, -1).tolist()
    assert routing.null_M.tolist() == (routing.column_M >= E).tolist()
    assert torch.equal(routing.expert_M, routing.column_M.clamp(max=E))
    assert routing.repeat_rows(3).column_M.view(12, 3, 4)[:, 2].tolist() == routing.column_M.view(12, 4).tolist()
    assert chosen_balance(record).isfinite()


@pytest.mark.parametrize(
    ("pools", "widest"),
    [(("row", "row"), "row"), (("row", "group"), "group"), (("batch", "group"), "batch"), (("row", "batch"), "batch")],
)
def test_what_is_made_of_parts_depends_on_all_that_a_part_depends_on(pools: tuple[str, str], widest: str) -> None:
    def router(pool: str) -> Router:
        per_group = Router(LinearScore(D, E), ExpertChoice(1.0, per="group"))
        return {"row": Router(LinearScore(D, E), TopK(2)), "group": per_group}.get(pool) or Router(
            RandomScore(E, per="batch"), TopK(2)
        )

    assert SumRouters([router(pool) for pool in pools]).pool == widest
    scores = [LinearScore(D, E), RandomScore(E, per="batch")]
    assert MultiGate(scores[:1] * 2).pool == "row"
    assert MultiGate(scores).pool == "batch"
