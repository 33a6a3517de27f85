# SPDX-License-Identifier: Apache-2.0
"""Laws of routers: scores, noise, capacity, the order of the stages, precision, and combinators."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeapps.moe import (
    AttentionScore,
    Capacity,
    ConditionalSplit,
    ConstantScore,
    CosineScore,
    Dense,
    ExpertChoice,
    GaussianNoise,
    GumbelNoise,
    Jitter,
    LinearScore,
    MLPExperts,
    MLPScore,
    MoELayer,
    MultiGate,
    PrototypeScore,
    RandomScore,
    RecurrentScore,
    Router,
    RouterBase,
    Routing,
    Score,
    Slots,
    SumRouters,
    TableScore,
    Threshold,
    TopK,
    TopP,
)

D, E = 5, 4


def features(num_rows: int = 12) -> Tensor:
    return torch.randn(num_rows, D, dtype=torch.float64)


# --- scores -----------------------------------------------------------------------------------------------------------

SCORES: dict[str, Callable[[], Score]] = {
    "linear": lambda: LinearScore(D, E),
    "linear_bias": lambda: LinearScore(D, E, bias=True),
    "mlp": lambda: MLPScore(D, 7, E),
    "cosine": lambda: CosineScore(D, E),
    "cosine_projected": lambda: CosineScore(D, E, proj_dim=3),
    "prototype": lambda: PrototypeScore(D, E),
    "table": lambda: TableScore(3, E),
    "constant": lambda: ConstantScore(E),
    "random": lambda: RandomScore(E),
    "recurrent": lambda: RecurrentScore(D, E, state_dim=6),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_every_score_gives_a_logit_per_row_and_column(name: str, num_rows: int) -> None:
    score = SCORES[name]()
    out = score(torch.randn(num_rows, D), group=torch.zeros(num_rows, dtype=torch.int64))
    logits = out[0] if isinstance(out, tuple) else out
    assert logits.shape == (num_rows, E)
    assert score.num_outputs == E
    with pytest.raises(ValueError, match="at least one column"):
        Score(0)


@pytest.mark.parametrize("name", ["linear", "mlp", "cosine", "prototype", "recurrent"])
def test_a_score_of_one_tensor_refuses_a_tuple(name: str) -> None:
    with pytest.raises(ValueError, match="reads one tensor"):
        SCORES[name]()((torch.randn(3, D), torch.randn(3, D)))


def test_linear_score_starts_like_a_linear_layer_or_as_told() -> None:
    bound = 1 / math.sqrt(400)
    score = LinearScore(400, 50)
    assert score.weight.abs().max() <= bound
    assert score.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert LinearScore(400, 50, init_std=0.006).weight.std().item() == pytest.approx(0.006, rel=0.05)
    assert not LinearScore(400, 50, init_std=0.0).weight.any()


def test_least_squares_fit_sorts_separable_contexts() -> None:
    label = torch.arange(40) % E
    x = torch.eye(E, D)[label] * 3 + 0.1 * torch.randn(40, D)
    score = LinearScore(D, E, bias=True)
    score.fit(x, F.one_hot(label, E).float(), noise=1e-4)
    assert torch.equal(score(x).argmax(-1), label)
    augmented = torch.cat([x, torch.ones(40, 1)], -1).double()
    wanted = torch.linalg.lstsq(augmented, F.one_hot(label, E).double()).solution
    score.fit(x, F.one_hot(label, E).float())
    torch.testing.assert_close(torch.cat([score.weight.T, score.bias[None]]).double(), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must be"):
        score.fit(x, torch.zeros(40, E + 1))


def test_cosine_scores_ignore_length_and_are_bounded() -> None:
    x = features()
    for score in (CosineScore(D, E, temperature=0.5), PrototypeScore(D, E, alpha=2.0)):
        score = score.double()
        torch.testing.assert_close(score(x), score(3.7 * x))
        assert score(x).abs().max() <= 2.0 + 1e-9
    with torch.no_grad():
        cosine = CosineScore(D, E).double()
        cosine.log_scale.fill_(50.0)
    assert cosine(x).abs().max() <= 100 + 1e-6
    with pytest.raises(ValueError, match="must be above"):
        CosineScore(D, E, temperature=0.01)


def test_rows_along_orthonormal_prototypes_are_routed_there_with_weight_one() -> None:
    router = Router(PrototypeScore(D, 2), TopK(1, weighing="identity"))
    with torch.no_grad():
        router.score.prototypes.copy_(torch.eye(2, D))
    routing = router(torch.tensor([[0.0, 4.0, 0, 0, 0], [0.5, 0, 0, 0, 0]]))
    assert routing.expert_M.tolist() == [1, 0]
    torch.testing.assert_close(routing.weight_M, torch.ones(2))


def test_table_wraps_around_and_says_what_it_needs() -> None:
    score = TableScore(torch.eye(3))
    ids = torch.tensor([0, 2, 5, -1])
    assert score(torch.zeros(4, 1), group=ids).argmax(-1).tolist() == [0, 2, 2, 2]
    assert not list(score.parameters())
    assert [p.shape for p in TableScore(7, E).parameters()] == [(7, E)]
    with pytest.raises(ValueError, match="pass group=ids"):
        score(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="needs both sizes"):
        TableScore(7)
    with pytest.raises(ValueError, match="num_ids"):
        TableScore([[0.0, 1.0]], 3)


def test_random_scores_differ_in_training_and_repeat_in_evaluation() -> None:
    score, x = RandomScore(E, seed=3), torch.zeros(500, D)
    assert not torch.equal(score(x), score(x))
    score.eval()
    assert torch.equal(score(x), score(x))
    counts = Router(RandomScore(E), TopK(1, weighing="ones"))(x).counts()
    assert counts.min() > 80
    batch = RandomScore(E, per="batch")
    assert Router(batch, TopK(1, weighing="ones"))(x).counts().max() == 500
    with pytest.raises(ValueError, match="'row' or 'batch'"):
        RandomScore(E, per="layer")


def test_attention_score_checks_its_features_and_gives_the_prior_to_the_empty_history() -> None:
    score = AttentionScore(3, E)
    with torch.no_grad():
        score.prior.copy_(torch.arange(E))
    empty = (torch.randn(2, 5, 3), torch.randn(2, 3), torch.zeros(2, 5))
    torch.testing.assert_close(score(empty), score.prior.expand(2, -1))
    none = (torch.randn(2, 0, 3), torch.randn(2, 3), torch.zeros(2, 0))
    torch.testing.assert_close(score(none), score.prior.expand(2, -1))
    with pytest.raises(ValueError, match="three tensors"):
        score(torch.randn(2, 3))


def test_recurrent_score_carries_a_state_and_forgets_it_when_its_gates_say_so() -> None:
    cell = nn.GRUCell(6, 6)
    first, second = (Router(RecurrentScore(D, E, state_dim=6, cell=cell), TopK(2)).double() for _ in range(2))
    assert first.score.cell is second.score.cell
    x = features()
    memory = first(x).state
    assert memory.shape == (12, 6)
    assert memory.requires_grad
    assert not torch.allclose(second(x, state=memory).logits_NE, second(x).logits_NE)
    with torch.no_grad():  # update gate "take the new", candidate blind to the past: a memoryless router
        cell.bias_ih[6:12] = -1e4
        cell.weight_hh.zero_()
    torch.testing.assert_close(second(x, state=memory).logits_NE, second(x).logits_NE)
    with pytest.raises(ValueError, match="GRUCell"):
        RecurrentScore(D, E, state_dim=7, cell=cell)


# --- the router -------------------------------------------------------------------------------------------------------


def test_a_routing_carries_what_losses_need() -> None:
    x = features().requires_grad_()
    routing = Router(LinearScore(D, E), TopK(2)).double()(x)
    assert routing.features_ND is x
    assert routing.logits_NE.requires_grad
    torch.testing.assert_close(routing.probs_NE, routing.logits_NE.softmax(-1))
    assert (
        Router(AttentionScore(3, E), Dense())((torch.randn(2, 5, 3), torch.randn(2, 3), torch.ones(2, 5))).features_ND
        is None
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", sorted(set(SCORES) - {"table"}))
def test_routing_is_full_precision_under_autocast(name: str, dtype: torch.dtype) -> None:
    router, x = Router(SCORES[name](), TopK(2)).eval(), torch.randn(6, D)
    plain = router(x.to(dtype).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x.to(dtype))
    assert routing.logits_NE.dtype == routing.weight_M.dtype == routing.probs_NE.dtype == torch.float32
    assert torch.equal(routing.logits_NE, plain.logits_NE)


def test_double_precision_stays_and_a_cast_model_still_routes_in_single() -> None:
    assert Router(LinearScore(D, E), TopK(2)).double()(features()).weight_M.dtype == torch.float64
    low = Router(LinearScore(D, E), TopK(2)).bfloat16()
    assert low(torch.randn(3, D).bfloat16()).weight_M.dtype == torch.float32
    gates = MultiGate([LinearScore(D, E)] * 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gates(torch.randn(3, D)).weight.dtype == torch.float32


def test_adjusting_by_nothing_is_bit_identical_and_only_the_adjustment_learns() -> None:
    router, x = Router(LinearScore(D, E), TopK(2)).requires_grad_(False), torch.randn(9, D)
    plain = router(x)
    delta = torch.zeros(E, requires_grad=True)
    router.adjust = lambda logits, _: logits + delta
    adjusted = router(x)
    assert torch.equal(adjusted.weight_M, plain.weight_M)
    assert torch.equal(adjusted.expert_M, plain.expert_M)
    (adjusted.weight_M * torch.arange(18)).sum().backward()
    assert delta.grad.any()
    assert all(p.grad is None for p in router.parameters())


@pytest.mark.parametrize(
    "choose", [ExpertChoice(1.0), Threshold(1.0), Dense(), Slots(1)], ids=lambda c: type(c).__name__
)
def test_capacity_is_for_choosers_by_row(choose: nn.Module) -> None:
    with pytest.raises(ValueError, match="leave capacity out"):
        Router(LinearScore(D, E), choose, capacity=Capacity(1.0))


def test_mean_k_is_known_where_it_can_be() -> None:
    def mean_k(choose: nn.Module, columns: int = E) -> float | None:
        return Router(LinearScore(D, columns), choose).mean_k()

    assert mean_k(TopK(2)) == 2.0
    assert mean_k(TopK(2, num_null=1)) is None
    assert mean_k(TopP(0.5)) is None
    assert mean_k(ExpertChoice(1.5)) == 1.5
    assert mean_k(Dense()) == 4.0
    router = Router(LinearScore(D, E), TopK(2))
    assert SumRouters([router, copy.deepcopy(router)]).mean_k() == 4.0
    assert ConditionalSplit(router).mean_k() == 2.0
    assert RouterBase().mean_k() is None


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [Jitter(0.1), GaussianNoise(D, E)], ids=lambda n: type(n).__name__)
def test_noise_acts_in_training_only_and_follows_the_seed(noise: nn.Module) -> None:
    router = Router(LinearScore(D, E), TopK(2), noise=noise)
    x = torch.randn(50, D)
    clean = x @ router.score.weight.T
    torch.manual_seed(1)
    a = router(x).logits_NE
    torch.manual_seed(1)
    assert torch.equal(a, router(x).logits_NE)
    assert not torch.equal(a, router(x).logits_NE)
    assert not torch.equal(a, clean)
    torch.testing.assert_close(router.eval()(x).logits_NE, clean)


def test_jitter_stays_within_its_width_and_out_of_the_experts() -> None:
    jittered = Jitter(0.1).on_features(torch.ones(2000, 3))
    assert jittered.min() >= 0.9
    assert jittered.max() <= 1.1
    assert jittered.mean().item() == pytest.approx(1.0, abs=0.01)
    history, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(Jitter(0.1).on_features((history, mask))[1], mask)
    layer = MoELayer(Router(LinearScore(D, E), TopK(1, weighing="ones"), noise=Jitter(0.5)), MLPExperts(E, D, 6))
    x = torch.randn(8, D)
    before = x.clone()
    with torch.no_grad():
        layer.experts.w_in.copy_(layer.experts.w_in[:1].expand_as(layer.experts.w_in))
        layer.experts.b_in.zero_()
        layer.experts.w_out.copy_(layer.experts.w_out[:1].expand_as(layer.experts.w_out))
        layer.experts.b_out.zero_()
        assert torch.equal(layer(x), layer(x))
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="eps"):
        Jitter(1.0)


def test_gaussian_noise_starts_with_one_scale_for_all() -> None:
    noisy = GaussianNoise(D, E).on_logits(torch.zeros(4000, E), torch.randn(4000, D))
    assert noisy.std().item() == pytest.approx(math.log(2), rel=0.03)


def test_gumbel_noise_samples_from_the_softmax() -> None:
    s = torch.tensor([1.0, 0.0, -1.0])
    drawn = GumbelNoise(0.7).on_logits(s.expand(20_000, -1), torch.zeros(0)).argmax(-1)
    share = torch.bincount(drawn, minlength=3) / 20_000
    torch.testing.assert_close(share, s.softmax(-1), atol=0.015, rtol=0)
    with pytest.raises(ValueError, match="tau"):
        GumbelNoise(0.0)


# --- capacity ---------------------------------------------------------------------------------------------------------


def top(k: int, num_rows: int, weighing: str = "softmax", shift: float = 0.0) -> Routing:
    choose = TopK(k, weighing=weighing)
    choose.bind(E)
    s = torch.randn(num_rows, E, dtype=torch.float64) + shift
    return choose(s.requires_grad_())


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("weighing", ["softmax", "identity"])
def test_nothing_is_dropped_while_no_expert_overflows(policy: str, weighing: str) -> None:
    for shift in (0.0, -50.0):  # negative logits once made a released router drop nearly everything
        routing = top(2, 40, weighing, shift)
        room = int(routing.counts().max())
        kept = Capacity(room * E / 80 - 1e-9, policy=policy, minimum=1)(routing)
        assert torch.equal(kept.expert_M, routing.expert_M)
        assert torch.equal(kept.weight_M, routing.weight_M)


def test_room_for_every_row_is_dropless() -> None:
    routing = top(2, 10)
    assert Capacity(100.0)(routing) is routing
    assert Capacity(0.01, minimum=10)(routing) is routing


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_capacity_equals_a_loop(policy: str) -> None:
    routing = top(2, 37)
    limit = math.ceil(0.6 * 2 * 37 / E)
    kept = Capacity(0.6, policy=policy)(routing)
    ids, w = routing.expert_M.view(37, 2), routing.weight_M.detach().view(37, 2)
    order = [(n, j) for j in range(2) for n in range(37)]
    if policy == "probability":
        order = sorted(((n, j) for n in range(37) for j in range(2)), key=lambda nj: -float(w[nj]))
    used, expected = [0] * E, torch.full((37, 2), E)
    for n, j in order:
        e = int(ids[n, j])
        if used[e] < limit:
            used[e], expected[n, j] = used[e] + 1, e
    assert torch.equal(kept.expert_M, expected.flatten())
    assert kept.counts().max() == limit
    assert torch.equal(kept.weight_M != 0, kept.expert_M < E)


def test_sentinels_take_no_room_and_evaluation_has_its_own_factor() -> None:
    row = torch.arange(12)
    expert = torch.tensor([E] * 6 + [0] * 6)
    routing = Routing(row, expert, torch.ones(12), 12, E, top_k=1)
    capacity = Capacity(1.0, minimum=1, eval_factor=2.0)  # 3 in training, 6 in evaluation
    assert capacity(routing).expert_M.tolist() == [E] * 6 + [0] * 3 + [E] * 3
    assert capacity.eval()(routing).counts().tolist() == [6, 0, 0, 0]


def test_capacity_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="'position' or 'probability'"):
        Capacity(1.0, policy="random")
    with pytest.raises(ValueError, match="factors above 0"):
        Capacity(0.0)
    with pytest.raises(ValueError, match="k assignments per row"):
        Capacity(1.0)(
            Routing(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.ones(1), 1, E)
        )


# --- combinators ------------------------------------------------------------------------------------------------------


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


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Router(LinearScore(D, E), TopK(2, weighing="sigmoid", balance_bias=True)),
        lambda: Router(PrototypeScore(D, E), TopK(1, weighing="identity")),
        lambda: Router(LinearScore(D, E), Threshold(1.0)),
        lambda: Router(TableScore(3, E), TopK(1)),
        lambda: ConditionalSplit(Router(CosineScore(D, E, proj_dim=3), TopK(2))),
    ],
)
def test_state_dict_round_trip(make: Callable[[], RouterBase]) -> None:
    source, target, x = make(), make(), torch.randn(20, D)
    group = torch.arange(20) % 3 - 1
    with torch.no_grad():
        for values in (*source.parameters(), *source.buffers()):
            values.add_(torch.rand_like(values))
    target.load_state_dict(source.state_dict())
    a, b = source.eval()(x, group=group), target.eval()(x, group=group)
    assert torch.equal(a.expert_M, b.expert_M)
    assert torch.equal(a.weight_M, b.weight_M)
    clone = copy.deepcopy(source)
    assert torch.equal(clone(x, group=group).weight_M, a.weight_M)


def test_a_fitted_gate_is_saved() -> None:
    router = Router(LinearScore(D, E, bias=True), TopK(1, weighing="ones"))
    label = torch.arange(20) % E
    x = torch.eye(E, D)[label]
    router.score.fit(x, F.one_hot(label, E).float())
    other = Router(LinearScore(D, E, bias=True), TopK(1, weighing="ones"))
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(x).expert_M, label)
