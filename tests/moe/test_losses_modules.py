# SPDX-License-Identifier: Apache-2.0
"""Laws of the loss modules: sums and means over layers, weights, counts of a whole step, errors that say what to do."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moeapps.moe import losses, objectives
from moeapps.moe.record import Record
from moeapps.moe.routers import (
    Capped,
    ConditionalSplit,
    DenseToSparse,
    ExpertChoice,
    GatedShared,
    GroupLimitedTopK,
    LinearScore,
    Router,
    SparseMixer,
    SumRouters,
    Threshold,
    TopK,
    TopP,
)
from moeapps.moe.routing import DenseRouting, Routing, SlotRouting
from tests.moe.losses_common import E, K, N, cyclic_record, logits, record_of, topk_record

# --- the modules


MODULES = [
    losses.SwitchBalance,
    losses.GlobalBatchBalance,
    losses.ChosenBalance,
    losses.ImportanceLoss,
    losses.LoadLoss,
    losses.ZLoss,
    losses.EntropyLoss,
    losses.BatchEntropyLoss,
    losses.MutualInformationLoss,
]


@pytest.mark.parametrize("kind", MODULES)
def test_value_is_the_sum_or_mean_over_layers_without_the_weight(kind) -> None:
    layers = [topk_record(logits(seed=seed), K, name=f"layer{seed}") for seed in (1, 2, 3)]
    alone = [kind(weight=0.0).eval().value([layer]) for layer in layers]
    for weight in (0.0, 100.0):
        added, mean = kind(weight=weight, reduction="sum").eval(), kind(weight=weight, reduction="mean").eval()
        torch.testing.assert_close(added.value(layers), alone[0] + alone[1] + alone[2])
        torch.testing.assert_close(mean.value(layers), (alone[0] + alone[1] + alone[2]) / 3)
        assert mean.value(layers).ndim == 0
        assert mean.value(layers).requires_grad
        torch.testing.assert_close(list(added.per_layer.values()), [value.detach() for value in alone])
        torch.testing.assert_close(copy.deepcopy(added).value(layers), added.value(layers))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", MODULES)
def test_a_loss_called_by_hand_has_its_weight_in_value_and_gradient(kind, reduction: str) -> None:
    heavy, gradients = kind(weight=-0.25, reduction=reduction).eval(), []
    for call in (heavy, heavy.value):
        s = logits(scale=0.5)
        result = call([topk_record(s, K, name="a"), topk_record(s * 2, K, name="b")])
        gradients.append((result.detach(), *torch.autograd.grad(result, s)))
    for weighted, bare in zip(*gradients, strict=True):
        torch.testing.assert_close(weighted, -0.25 * bare)


def test_at_balance_the_sum_over_n_layers_is_n_times_the_weight() -> None:
    layers = [replace(cyclic_record(1, 3.0), name=f"layer{i}") for i in range(12)]
    assert losses.SwitchBalance(0.01)(layers).item() == pytest.approx(0.12)
    assert losses.SwitchBalance(0.01, reduction="mean")(layers).item() == pytest.approx(0.01)


def test_names_are_distinct() -> None:
    kinds = [kind() for kind in MODULES]
    apart = [losses.ZLoss(layers="enc.*"), losses.ZLoss(layers="dec.*")]
    assert len({loss.name for loss in [*kinds, *apart]}) == len(MODULES) + 2
    assert apart[0].name == "z.enc"


def test_layers_pattern_chooses_records() -> None:
    encoder, decoder = (
        topk_record(logits(seed=1), K, name="enc.0.moe"),
        topk_record(logits(seed=2), K, name="dec.0.moe"),
    )
    torch.testing.assert_close(losses.ZLoss(layers="enc.*").value([encoder, decoder]), objectives.z_loss(encoder))


def test_module_without_matching_record_says_what_was_recorded() -> None:
    with pytest.raises(ValueError, match=r"meets no recorded MoE layer \(recorded: \['dec'\]\)"):
        losses.SwitchBalance(layers="enc*")([topk_record(logits(), K, name="dec")])
    with pytest.raises(ValueError, match="recorded: none"):
        losses.SwitchBalance()([])


def test_global_balance_uses_the_counts_so_far_and_forgets_at_the_step() -> None:
    s = logits()
    halves = [topk_record(part, K) for part in s.split(N // 2)]
    counts = sum(objectives.column_counts(half) for half in halves)
    module = losses.GlobalBatchBalance()

    first = module.value(halves[:1])
    second = module.value(halves[1:])
    module.on_optimizer_step()
    again = module.value(halves[:1])

    torch.testing.assert_close(first, objectives.switch_balance(halves[0]))
    torch.testing.assert_close(second, objectives.switch_balance(halves[1], counts_E=counts))
    torch.testing.assert_close(again, first)


def test_global_balance_gathers_nothing_in_evaluation() -> None:
    first, second = (topk_record(part, K) for part in logits().split(N // 2))
    module = losses.GlobalBatchBalance().eval()
    module.value([first])
    torch.testing.assert_close(module.value([second]), objectives.switch_balance(second))


def test_global_balance_keeps_layers_apart() -> None:
    a, b = topk_record(logits(seed=1), K, name="a"), topk_record(logits(seed=2), K, name="b")
    expected = objectives.switch_balance(a) + objectives.switch_balance(b)
    torch.testing.assert_close(losses.GlobalBatchBalance().value([a, b]), expected)


def test_global_balance_lets_one_sided_micro_batches_be_when_the_step_is_balanced() -> None:
    one_sided = [torch.zeros(8, 2, dtype=torch.float64), torch.zeros(8, 2, dtype=torch.float64)]
    one_sided[0][:, 0] = one_sided[1][:, 1] = 1000.0
    first, second = (topk_record(s, 1) for s in one_sided)
    module = losses.GlobalBatchBalance()
    module.value([first])
    assert objectives.switch_balance(second).item() == pytest.approx(2.0)
    assert module.value([second]).item() == pytest.approx(1.0)


def test_no_rows_give_zero_with_a_graph() -> None:
    empty = topk_record(logits(n=0), K, group=torch.zeros(0, dtype=torch.int64))
    for kind in MODULES:
        value = kind().value([empty])
        assert value.item() == 0.0, kind
        assert value.requires_grad, kind
    assert objectives.switch_balance(empty, per_group=True).item() == 0.0


# --- errors


def dense_record(**extra: Tensor) -> Record:
    return Record("gate", DenseRouting(torch.full((3, 2), 0.5), 2, **extra), nn.Identity())


def slot_record() -> Record:
    return Record("soft", SlotRouting(torch.full((3, 2, 1), 1 / 3), torch.full((3, 2, 1), 0.5)), nn.Identity())


def bare_record() -> Record:
    return Record(
        "random", Routing(torch.arange(3), torch.tensor([0, 1, 0]), torch.ones(3), 3, 2, top_k=1), nn.Identity()
    )


def unmarked_nulls() -> Record:
    record = record_of(TopK(2, num_null=1), logits())
    return replace(record, routing=replace(record.routing, null_M=None))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: objectives.switch_balance(dense_record()), "DenseRouting, which selects no experts.*ImportanceLoss"),
        (lambda: objectives.switch_balance(slot_record()), "SlotRouting"),
        (lambda: objectives.load_cv2(dense_record()), "DenseRouting"),
        (lambda: objectives.switch_balance(bare_record()), "without probabilities"),
        (lambda: objectives.z_loss(bare_record()), "without logits"),
        (lambda: objectives.switch_balance(topk_record(logits(), K), per_group=True), "without group"),
        (
            lambda: objectives.switch_balance(topk_record(logits(), K), per_group=True, counts_E=torch.ones(E)),
            "leave counts_E out",
        ),
        (lambda: objectives.switch_balance(unmarked_nulls()), "set it in your router"),
        (lambda: objectives.load_cv2(record_of(TopP(0.5), logits())), "no fixed k"),
        (lambda: objectives.load_cv2(topk_record(logits(), K), noise_std=0.0), "noise above 0"),
        (lambda: losses.SwitchBalance(weight=math.nan), "finite number"),
        (lambda: losses.ZLoss(reduction="max"), "'max' of 'z' is unknown; use sum or mean"),
    ],
)
def test_errors_say_what_to_do(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- the load, which needs a fixed k


@pytest.mark.parametrize(
    "choose",
    [
        lambda: TopP(0.6),
        lambda: SparseMixer(p=0.6),
        lambda: Capped(TopP(0.6), 0.5),
        lambda: Capped(SparseMixer(p=0.6), 0.5),
        lambda: GatedShared(Capped(TopP(0.6), 0.5), 1),
        lambda: DenseToSparse(0.1),
        lambda: Threshold(2.0),
        lambda: ExpertChoice(2.0),
        lambda: ExpertChoice(2.0, per="group"),
    ],
)
def test_rows_that_take_as_many_as_they_need_have_no_smooth_load(choose) -> None:
    made, group = choose(), torch.zeros(N, dtype=torch.int64)
    made.bind(E)
    record = replace(record_of(TopK(2), logits()), routing=made(logits(), group=group))
    record.layer.router.choose = made
    with pytest.raises(ValueError, match="no fixed k"):
        objectives.load_cv2(record)


def test_summed_routers_have_no_smooth_load() -> None:
    router = SumRouters([Router(LinearScore(3, E), TopK(1)) for _ in range(2)])
    layer = nn.Module()
    layer.router = router
    with pytest.raises(ValueError, match="no fixed k"):
        objectives.load_cv2(Record("moe", router(torch.randn(N, 3)), layer))


@pytest.mark.parametrize(
    "choose",
    [
        lambda: TopK(K, weighing="sigmoid"),
        lambda: GroupLimitedTopK(K, num_groups=2, keep_groups=2),
        lambda: SparseMixer(K, draws=False),
        lambda: Capped(TopK(K), 0.5),
        lambda: GatedShared(Capped(SparseMixer(K), 0.5), 1),
    ],
)
def test_every_row_that_takes_its_k_best_has_the_load_of_k(choose) -> None:
    made, s = choose(), logits(e=E + 1)
    experts = made.bind(E + 1 if isinstance(made, GatedShared) else E)
    record = replace(record_of(TopK(2), logits()), routing=made(s[:, : experts + made.num_shared]))
    for split in (False, True):
        record.layer.router = nn.Module()
        record.layer.router.choose = made
        if split:
            record.layer.router = ConditionalSplit(Router(LinearScore(3, E + made.num_shared), made))
        found = objectives.load_cv2(record)
        torch.testing.assert_close(found, objectives.load_cv2(topk_record(s[:, :E], K)))
