# SPDX-License-Identifier: Apache-2.0
"""AW-MoE's network: its equations pair by pair, its invariances, options, rivals and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aw_moe_common import FACTS, GROUPS, make_lists, naive_logits, randomised
from torch import Tensor, nn

from moeapps.moe import AttentionScore, MoERecorder
from moeapps.moe.routers.pairs import PairUnit, attention_weights
from tasks.recommendation.data.lists import Lists
from tasks.recommendation.model import ListRanker, aw_moe
from tasks.recommendation.nets.activation_unit import ActivationUnit, PlainSum
from tasks.recommendation.nets.behaviours import ListEncoder
from tasks.recommendation.nets.dice import Dice
from tasks.recommendation.nets.list_banks import BankFactory, GatedBank
from tasks.recommendation.rivals.list_banks import averaged_experts, category_gate, dense_bank, input_gate
from tasks.recommendation.rivals.popularity import Popularity


def net(bank: BankFactory | None = None, **options: Any) -> ListRanker:
    """A small network with every parameter at random."""
    encoder = partial(ListEncoder, dim=6, embedding_dim=3, hidden=5)
    interest = partial(ActivationUnit, hidden=(7, 4))
    made = ListRanker(FACTS, **{"encoder": encoder, "interest": interest, "bank": bank or small(), **options})
    return randomised(made).eval()  # type: ignore[return-value]


def small(**options: Any) -> BankFactory:
    sizes = {"num_experts": 3, "hidden_dim": 4, "gate_hidden": (7, 5), "attention_hidden": (6, 4), "key": "target"}
    return aw_moe(**{**sizes, **options})


def permuted(batch: Lists, order: Tensor) -> Lists:
    return replace(batch, history=batch.history[:, order], history_mask=batch.history_mask[:, order])


def longer(batch: Lists, places: int = 3) -> Lists:
    """The same lists with padding behind the histories, with ids that are not 0."""
    more = torch.ones(len(batch), places, batch.history.shape[2], dtype=torch.int64)
    mask = torch.cat([batch.history_mask, torch.zeros(len(batch), places, dtype=torch.bool)], 1)
    return replace(batch, history=torch.cat([batch.history, more], 1), history_mask=mask)


# --- the equations ---


@pytest.mark.parametrize("key", ["target", "query", "none"])
@pytest.mark.parametrize("pooling", ["sqrtn", "sum"])
def test_the_network_is_its_equations_pair_by_pair(key: str, pooling: str) -> None:
    made, batch = net(small(key=key, pooling=pooling)), make_lists()

    found = made(batch)
    logits, gates = naive_logits(made, batch, key, root=pooling == "sqrtn")

    torch.testing.assert_close(found.logits.double(), logits, atol=1e-5, rtol=1e-5)
    shown = gates if key == "target" else gates[:, :1]
    torch.testing.assert_close(found.gate.double(), shown, atol=1e-5, rtol=1e-5)


PARTS = [p for k in range(1, 5) for p in itertools.permutations(("own", "product", "difference", "key"), k)]


@pytest.mark.parametrize("parts", PARTS[::5], ids="-".join)
def test_a_unit_that_splits_its_first_layer_gives_what_the_joined_parts_give(parts: tuple[Any, ...]) -> None:
    unit = PairUnit(3, 2, hidden=(5, 4), parts=parts).double()
    h, q = torch.randn(2, 4, 3).double(), torch.randn(2, 3, 3).double()

    h4, q4 = (x.double() for x in torch.broadcast_tensors(h[:, :, None], q[:, None]))
    named = {"own": h4, "product": h4 * q4, "difference": h4 - q4, "key": q4}
    torch.testing.assert_close(unit.pairs(h, q), unit(torch.cat([named[part] for part in parts], -1)))


def test_attention_weights_by_hand() -> None:
    score = torch.tensor([[[1.0], [2.0], [9.0]], [[4.0], [4.0], [4.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    zeros = torch.zeros(3)

    def weights(**options: Any) -> Tensor:
        return attention_weights(score, mask, **options)[..., 0]

    torch.testing.assert_close(weights()[0], torch.tensor([1.0, 2.0, 0.0]))
    torch.testing.assert_close(weights(pooling="sqrtn")[0], torch.tensor([1.0, 2.0, 0.0]) / 2**0.5)
    torch.testing.assert_close(weights(pooling="mean")[0], torch.tensor([0.5, 1.0, 0.0]))
    share = 1 / (1 + torch.tensor(1.0).exp())
    torch.testing.assert_close(weights(norm="softmax")[0], torch.stack([share, 1 - share, torch.tensor(0.0)]))
    for options in ({}, {"pooling": "sqrtn"}, {"norm": "softmax"}):
        assert torch.equal(weights(**options)[1], zeros)


# --- invariances ---


OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "query": {"key": "query"},
    "none": {"key": "none"},
    "softmax_attention": {"attention_norm": "softmax", "pooling": "sum"},
    "dice": {"unit_activation": Dice},
    "din_parts": {"attention_parts": ("own", "product", "difference", "key")},
    "gate_unit_only": {"attention_hidden": None, "pooling": "mean"},
    "activation_unit_only": {"gate_hidden": None},
    "vector": {"expert_output": "vector"},
    "softmax_gate": {"gate_norm": "softmax"},
    "sigmoid_gate": {"gate_norm": "sigmoid"},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_padding_and_order_of_the_history_change_nothing(name: str, training: bool) -> None:
    made, batch = net(small(**OPTIONS[name])).train(training), make_lists()
    order = torch.tensor([4, 0, 5, 2, 1, 3])

    found = made(batch)
    for other in (longer(batch), permuted(batch, order)):
        again = made(other)
        for part in ("logits", "gate", "interest"):
            torch.testing.assert_close(getattr(again, part), getattr(found, part), atol=2e-6, rtol=1e-5)


def test_with_positions_the_order_counts() -> None:
    made = net(encoder=partial(ListEncoder, dim=6, embedding_dim=3, hidden=5, positions=True))
    batch = make_lists()
    again = made(permuted(batch, torch.tensor([1, 0, 2, 3, 4, 5])))

    moved = (again.gate - made(batch).gate).abs().amax((1, 2))
    assert moved[0] < 1e-6  # no history
    assert (moved[2:] > 1e-4).all()


def test_an_empty_history_leaves_prior_and_equal_experts_score_as_one() -> None:
    made, batch = net(), make_lists()
    with torch.no_grad():
        made.moe.router.score.prior.fill_(1 / 3)
        for weights in made.moe.experts.parameters():
            weights.copy_(weights[:1].expand_as(weights).clone())
    found = made(batch)

    assert not found.interest[0].any()
    torch.testing.assert_close(found.gate[0], torch.full((4, 3), 1 / 3))
    _, x = made.read(found.encoded)
    one = made.moe.experts.every(x[0])[:, 0, 0]
    torch.testing.assert_close(found.logits[0], one)


def test_the_gate_is_linear_in_its_behaviours() -> None:
    score = randomised(AttentionScore(4, 3, attention_hidden=None)).double()
    h, q, mask = torch.randn(5, 6, 4).double(), torch.randn(5, 4).double(), torch.rand(5, 6) < 0.6
    sums = torch.stack(
        [
            sum((score.gate_unit(torch.cat([h[n, j], q[n]])) for j in range(6) if mask[n, j]), score.prior)
            for n in range(5)
        ]
    )
    torch.testing.assert_close(score((h, q, mask)), sums)

    whole = randomised(AttentionScore(4, 3)).double()
    before = whole((h, q, mask))
    with torch.no_grad():
        whole.attention_unit[-1].weight.mul_(0.5)
        whole.attention_unit[-1].bias.mul_(0.5)
    torch.testing.assert_close(whole((h.repeat(1, 2, 1), q, mask.repeat(1, 2))), before)


def test_what_past_items_add_sums_to_the_gate() -> None:
    score = randomised(AttentionScore(4, 3, pooling="sqrtn")).double()
    features = (torch.randn(5, 6, 4).double(), torch.randn(5, 4).double(), torch.rand(5, 6) < 0.6)
    parts = score.contributions(features)

    torch.testing.assert_close(score.prior + parts.sum(1), score(features))
    assert not parts[~features[2]].any()


def test_the_key_is_the_request_where_requests_have_fields_else_the_candidate() -> None:
    assert net(aw_moe()).reads == "query"
    assert ListRanker({**FACTS, "query_fields": {}}, bank=aw_moe()).reads == "target"


@pytest.mark.parametrize(("key", "gates"), [("query", 1), ("none", 1), ("target", 4)])
def test_candidates_share_a_gate_unless_it_reads_them(key: str, gates: int) -> None:
    made, batch = net(small(key=key)), make_lists()
    with MoERecorder(made) as recorder:
        found = made(batch)

    assert found.gate.shape == (8, gates, 3)
    (record,) = recorder.records
    assert record.routing.num_rows == 8 * gates
    if gates == 1:  # other candidates, the same gate
        other = make_lists(seed=5)
        swapped = replace(batch, candidates=other.candidates, candidate_item=other.candidate_item)
        torch.testing.assert_close(made(swapped).gate, found.gate, atol=0, rtol=0)


def test_one_expert_is_din_with_a_learned_scale_that_the_history_gives() -> None:
    made, batch = net(small(num_experts=1)), make_lists()
    din = net(averaged_experts(num_experts=1, hidden_dim=4))
    din.load_state_dict({n: v for n, v in made.state_dict().items() if "router" not in n})

    found = made(batch)
    torch.testing.assert_close(found.logits, found.gate[..., 0] * din(batch).logits)


# --- Dice ---


def test_dice_by_hand_and_without_what_is_masked() -> None:
    layer, x = Dice(3).double().train(), torch.randn(8, 3).double()
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor([0.1, -0.2, 0.3]))
    mask = torch.arange(8) < 5
    real = x[:5]
    p = torch.sigmoid((real - real.mean(0)) / (real.var(0, correction=0) + 1e-8).sqrt())

    torch.testing.assert_close(layer(x, mask)[:5], p * real + (1 - p) * layer.alpha * real)
    torch.testing.assert_close(layer.mean, 0.1 * real.mean(0))
    torch.testing.assert_close(layer.variance, 0.9 + 0.1 * real.var(0, correction=0))
    before = layer.eval().mean.clone()
    layer(x)
    assert torch.equal(layer.mean, before)


# --- rivals ---


def test_gates_of_the_rivals_read_what_they_say() -> None:
    batch = make_lists()
    torch.testing.assert_close(net(averaged_experts(num_experts=3)).forward(batch).gate, torch.full((8, 1, 3), 1 / 3))

    made = net(category_gate(num_experts=3, hidden_dim=4))
    table = made.moe.router.score.table.detach()
    torch.testing.assert_close(made(batch).gate[:, 0], table[batch.query[:, 0]].softmax(-1))
    made = ListRanker({**FACTS, "query_fields": {}}, bank=category_gate(num_experts=3, hidden_dim=4))
    randomised(made)
    table = made.moe.router.score.table.detach()
    unasked = replace(batch, query=batch.query[:, :0])
    torch.testing.assert_close(made(unasked).gate, table[batch.candidates[..., 1]].softmax(-1))

    made = net(input_gate(num_experts=3, hidden_dim=4))
    found = made(batch)
    score, (_, x) = made.moe.router.score, made.read(found.encoded)
    torch.testing.assert_close(found.gate, F.linear(x, score.weight, score.bias).softmax(-1))

    made, plain = net(small(mixing="shuffled", key="query")), net(small(key="query"))
    torch.testing.assert_close(made(batch).gate, plain(batch).gate.roll(4, 0), atol=0, rtol=0)


def test_a_plain_sum_does_not_look_at_the_candidate() -> None:
    h, mask, target = torch.randn(2, 4, 3), torch.tensor([[True] * 4, [False] * 4]), torch.randn(2, 5, 3)
    found = PlainSum(3)(h, mask, target)
    torch.testing.assert_close(found[0], (h[0].sum(0) / 2).expand(5, 3))
    assert not found[1].any()


def test_the_dense_twin_is_as_wide_as_all_experts_and_costs_as_much() -> None:
    twin, made = net(dense_bank(of=small())), net()
    assert (twin.moe.experts.num_experts, twin.moe.experts.hidden_dim) == (1, 12)
    assert twin.moe.experts.flops_per_row == 3 * made.moe.experts.flops_per_row
    assert twin(make_lists()).logits.shape == (8, 4)


def test_popularity_counts_what_was_taken() -> None:
    made, batch = Popularity(FACTS).train(), make_lists()
    for _ in range(2):
        made(batch)
    taken = batch.candidates[..., 0][batch.label > 0].tolist()
    assert made.counts.tolist() == [2 * taken.count(i) for i in range(len(made.counts))]
    scores = made.eval()(batch).logits
    counts = made.counts[batch.candidates[..., 0]]
    torch.testing.assert_close(scores, torch.log1p(counts.float()))
    assert made.counts.sum() == 16


# --- bad input ---


def test_one_candidate_short_lists_and_no_query_or_profile() -> None:
    made, batch = net(), make_lists()
    alone = make_lists(candidates=1)
    assert made(alone).logits.shape == (8, 1)

    short = replace(batch, candidate_mask=torch.arange(4).expand(8, 4) < 2)
    found, whole = made(short), made(batch)
    torch.testing.assert_close(found.logits[:, :2], whole.logits[:, :2])
    assert not found.logits[:, 2:].any()

    bare = ListRanker({**FACTS, "query_fields": {}, "profile_fields": {}})
    assert bare(replace(batch, query=batch.query[:, :0], profile=batch.profile[:, :0])).logits.isfinite().all()


def test_a_history_of_no_place_at_all() -> None:
    batch = make_lists()
    empty = replace(batch, history=batch.history[:, :0], history_mask=batch.history_mask[:, :0])
    none = replace(batch, history_mask=torch.zeros_like(batch.history_mask))
    for bank in (small(), small(key="query", attention_norm="softmax"), averaged_experts(num_experts=2)):
        made = net(bank)
        torch.testing.assert_close(made(empty).logits, made(none).logits)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_finite_with_an_empty_history_and_reach_every_parameter(name: str) -> None:
    made = net(small(**OPTIONS[name])).train()
    made(make_lists()).logits.square().sum().backward()
    without = [n for n, p in made.named_parameters() if p.grad is None]
    assert without == []
    assert all(bool(p.grad.isfinite().all()) for p in made.parameters())


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: ListRanker({**FACTS, "query_fields": {}}, bank=aw_moe(key="query")), "use target or none"),
    (lambda: ListRanker(FACTS, bank=category_gate(), category="brand"), "category='brand'"),
    (lambda: ListRanker({"item_fields": {"item": 3}}), "facts lacks"),
    (lambda: ListRanker({**FACTS, "item_fields": {}}), "at least one field"),
    (lambda: aw_moe(key="user"), "key is auto, target, query or none"),  # type: ignore[arg-type]
    (lambda: aw_moe(mixing="uniform"), "attention or shuffled"),  # type: ignore[arg-type]
    (lambda: net(small(gate_norm="max")), "gate_norm='max'"),
    (lambda: net(small(expert_output="list")), "'score' or 'vector'"),
    (lambda: net(small(attention_norm="l1")), "norm='l1'"),
    (lambda: net(small(attention_parts=("sum",))), "at most once"),
    (lambda: net(category_gate(gate_norm="max")), "gate_norm='max'"),  # type: ignore[arg-type]
    (lambda: ActivationUnit(3, pooling="max"), "pooling='max'"),  # type: ignore[arg-type]
    (lambda: PairUnit(3, 1, hidden=()), "at least one hidden width"),
    (lambda: Popularity({}), "item_fields"),
]


@pytest.mark.parametrize(("make", "text"), WRONG, ids=[text for _, text in WRONG])
def test_what_cannot_be_built_says_why(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        make()


@pytest.mark.parametrize("field", ["candidates", "history", "profile"])
def test_an_id_beyond_its_table_is_named(field: str) -> None:
    batch = make_lists()
    wrong = getattr(batch, field).clone()
    wrong[2, ..., 0] = 1 + max(GROUPS, 40)
    with pytest.raises(ValueError, match="its table has rows for 0 to"):
        net()(replace(batch, **{field: wrong}))


def test_a_bank_is_made_of_sizes_and_says_what_it_reads() -> None:
    made = net(small(key="none"))
    assert made.reads == "history"
    assert isinstance(made.tower, nn.Identity)
    assert isinstance(net(small(expert_output="vector")).tower, nn.Sequential)
    assert GatedBank(made.moe, "history").layer is made.moe
