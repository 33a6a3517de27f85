# SPDX-License-Identifier: Apache-2.0
"""Masked rows do not exist: what rows get, losses, gradients and statistics are those of the rows alone.

The expected values come from the same layer without any padding, whatever stands in the padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from moeapps.moe import (
    AttentionScore,
    Capacity,
    ConditionalSplit,
    CosineScore,
    Dense,
    ExpertChoice,
    Experts,
    FittedRouter,
    GaussianNoise,
    GumbelNoise,
    Jitter,
    LinearScore,
    LowestLoss,
    MLPExperts,
    MLPScore,
    ModuleExperts,
    MoELayer,
    MoERecorder,
    MultiGate,
    Noise,
    NormalisedExperts,
    PrototypeScore,
    Record,
    RecurrentScore,
    Router,
    RouterBase,
    Routing,
    Score,
    Stack,
    Sum,
    SumRouters,
    Threshold,
    TopK,
    TopP,
    objectives,
)
from moeapps.moe import losses as aux
from moeapps.moe.balance import CountAccumulator
from moeapps.moe.metrics import mean_k
from moeapps.training.callbacks.routing import expert_work, routing_entropy
from moeapps.training.cost import work_per_row
from tests.moe.chooser_common import CHOOSERS
from tests.moe.chooser_common import E as WIDE

D, E, N = 6, 4, 20
PADDING = {"zeros": 0.0, "large": 1e30, "infinite": float("inf"), "nan": float("nan")}


def by_chooser(name: str) -> Router:
    """A router of the columns for which the chooser was listed."""
    return Router(LinearScore(D, WIDE), CHOOSERS[name]())


def split(choose: nn.Module, columns: int = E) -> ConditionalSplit:
    return ConditionalSplit(Router(LinearScore(D, columns), choose), (2,))


ROUTERS: dict[str, Callable[[], RouterBase]] = {
    **{name: lambda name=name: by_chooser(name) for name in CHOOSERS},
    "budget": lambda: Router(LinearScore(D, E), TopP(0.6, budget=1.5, decay=0.5)),
    "capacity_position": lambda: Router(LinearScore(D, E), TopK(2), capacity=Capacity(0.8, minimum=1)),
    "capacity_probability": lambda: Router(
        LinearScore(D, E), TopK(2, num_null=1), capacity=Capacity(0.7, policy="probability", minimum=1)
    ),
    "capacity_top_p": lambda: Router(LinearScore(D, E), TopP(0.6), capacity=Capacity(0.7, minimum=1)),
    "race_of_many": lambda: Router(LinearScore(D, E), Threshold(3.0, scope="pairs")),
    "split": lambda: split(TopK(2)),
    "split_expert_choice": lambda: split(ExpertChoice(1.0)),
    "split_expert_choice_group": lambda: split(ExpertChoice(1.0, per="group")),
    "split_threshold": lambda: split(Threshold(1.0)),
    "split_race": lambda: split(Threshold(1.0, scope="pairs", weighing="identity")),
    "split_budget": lambda: split(TopP(0.6, budget=1.5, decay=0.5)),
    "multi_gate": lambda: MultiGate([LinearScore(D, E), LinearScore(D, E)], allowed=[[1, 1, 0, 1], [1, 1, 1, 0]]),
    "sum": lambda: SumRouters([Router(LinearScore(D, E), TopK(1)), Router(LinearScore(D, E), TopP(0.6))]),
    "sum_dense": lambda: SumRouters([Router(LinearScore(D, E), Dense()), Router(LinearScore(D, E), Dense("sigmoid"))]),
    "fitted": lambda: FittedRouter(D, E, LowestLoss()),
}


def padded(x: Tensor, place: Tensor, size: int, value: float, at: int = 0) -> Tensor:
    """The rows of x, dimension ``at``, at their places among ``size`` rows full of ``value``."""
    shape = list(x.shape)
    shape[at] = size
    filled = torch.full(shape, value, dtype=x.dtype) if x.is_floating_point() else torch.zeros(shape, dtype=x.dtype)
    return filled.index_copy(at, place, x)


def places(share: float, num: int = N) -> tuple[Tensor, int]:
    """Where the rows stand among rows of which ``share`` are padding, in order but not side by side."""
    size = round(num / (1 - share))
    return torch.randperm(size)[:num].sort().values, size


@contextmanager
def recorded(layer: MoELayer) -> Iterator[list[Record]]:
    with MoERecorder(layer) as recorder:
        yield recorder.records


LOSSES: dict[str, Callable[[Record], Tensor]] = {
    "switch_balance": objectives.switch_balance,
    "per_group": lambda record: objectives.switch_balance(record, per_group=True),
    "importance": objectives.importance_cv2,
    "load": objectives.load_cv2,
    "z": objectives.z_loss,
    "entropy": objectives.token_entropy,
    "batch_entropy": objectives.batch_entropy_gap,
    "mutual_information": objectives.mutual_information,
    "global": lambda record: aux.GlobalBatchBalance().compute(record),
}


def defined_losses(record: Record) -> dict[str, Tensor]:
    found = {}
    for name, loss in LOSSES.items():
        try:
            found[name] = loss(record)
        except ValueError:  # not defined for this kind of routing, with or without padding
            continue
    return found


def statistics(record: Record) -> dict[str, Tensor]:
    """All that is counted of a call."""
    found = {"work": expert_work(record), "cost": work_per_row(record, record.layer.experts.num_experts)}
    entropy, rows = routing_entropy(record)
    found["entropy"], found["rows"] = torch.as_tensor(entropy), torch.tensor(rows)
    found["counts"] = record.routing.counts()
    if isinstance(record.routing, Routing):
        found["mean_k"] = mean_k(record.routing, record.token_mask)
        counts = CountAccumulator()
        counts.add([record])
        found["balance"] = counts.totals()[record.name]
    return found


def results(layer: MoELayer, x: Tensor, place: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
    """Outputs, losses, gradients, statistics and buffers after one step in training; rows at ``place`` are real."""
    x = x.clone().requires_grad_()
    with recorded(layer) as records:
        y = layer(x, **inputs)
    (record,) = records
    real = torch.arange(len(x)) if place is None else place
    at = y.ndim - 2
    if place is not None:
        absent = torch.ones(len(x), dtype=torch.bool).index_fill(0, place, False)
        assert not y.index_select(at, absent.nonzero()[:, 0]).any()
    y = y.index_select(at, real)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    found = {f"loss {name}": value for name, value in defined_losses(record).items()}
    total = (y * probe).sum() + sum(value for value in found.values() if value.requires_grad)
    leaves = {name: p for name, p in layer.named_parameters() if p.requires_grad} | {"x": x}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found |= {f"gradient {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    if place is not None:
        assert not found["gradient x"][absent].any()
    found["gradient x"] = found["gradient x"][real]
    found["assignment"] = record.routing.assignment()[real]
    found |= {f"statistic {name}": value for name, value in statistics(record).items()}
    return found | {"y": y} | {f"buffer {name}": b.clone() for name, b in layer.named_buffers()}


def same(alone: dict[str, Tensor], within: dict[str, Tensor]) -> None:
    assert alone.keys() == within.keys()
    for name, value in alone.items():
        torch.testing.assert_close(within[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
    assert all(value.isfinite().all() for value in within.values() if value.is_floating_point())


def layer_of(router: RouterBase, bank: Callable[[int], Experts] | None = None, **options: object) -> MoELayer:
    size = router.num_experts + int(options.get("num_shared", 0))
    experts = MLPExperts(size, D, 8, activation="tanh") if bank is None else bank(size)
    return MoELayer(router, experts, **options).double()


def check(layer: MoELayer, share: float, value: float, **inputs: Tensor) -> None:
    """Compare a layer on rows alone with its twin on the same rows among padding."""
    x, twin = torch.randn(N, D, dtype=torch.float64), copy.deepcopy(layer)
    place, size = places(share)
    mask = torch.zeros(size, dtype=torch.bool).index_fill(0, place, True)
    alone = results(layer, x, **inputs)
    moved = {name: padded(given, place, size, value) for name, given in inputs.items()}
    same(alone, results(twin, padded(x, place, size, value), place, token_mask=mask, **moved))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("share", "value"), [(0.0, 0.0), *((0.75, value) for value in PADDING.values())])
@pytest.mark.parametrize("name", ROUTERS)
def test_padding_changes_nothing_whatever_stands_in_it(name: str, share: float, value: float, training: bool) -> None:
    layer = layer_of(router := ROUTERS[name](), num_shared=router.num_shared)
    check(layer.train(training), share, value, group=torch.arange(N) % 3)


@pytest.mark.parametrize("num_shared", [0, 1])
@pytest.mark.parametrize("combiner", [Sum(), Sum(shared="apart")])
@pytest.mark.parametrize("backend", ["auto", "loop", "segments", "grouped_mm", "onehot"])
def test_padding_changes_nothing_in_any_backend(backend: str, combiner: Sum, num_shared: int) -> None:
    if backend == "grouped_mm":
        backend = "auto"  # which takes it where there is one: bfloat16 on a GPU
    layer = layer_of(Router(LinearScore(D, E), TopK(2)), combiner=combiner, num_shared=num_shared, backend=backend)
    check(layer, 0.75, float("nan"))


class Halves(nn.Module):
    """An expert that reads a side input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * D, D)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        return self.inner(torch.cat([x, side], -1)).tanh()


BANKS: dict[str, Callable[[int], Experts]] = {
    "batch_norm": lambda size: NormalisedExperts(size, D, D, norm="batch"),
    "batch_norm_hidden": lambda size: NormalisedExperts(size, D, D, norm="batch", hidden_dim=7),
    "layer_norm": lambda size: NormalisedExperts(size, D, D, norm="layer"),
    "mlp": lambda size: MLPExperts(size, D, 8),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("name", ["dense", "dense_sigmoid", "multi_gate", "sum_dense"])
def test_padding_is_in_no_batch_statistic_of_dense_experts(name: str, bank: str, training: bool) -> None:
    check(layer_of(ROUTERS[name](), BANKS[bank]).train(training), 0.75, float("nan"))


@pytest.mark.parametrize("name", ["softmax", "dense", "expert_choice"])
def test_padding_of_side_inputs_changes_nothing(name: str) -> None:
    layer = layer_of(by_chooser(name), lambda size: ModuleExperts([Halves() for _ in range(size)], in_dim=D))
    x, side = torch.randn(N, D, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)
    place, size = places(0.75)
    mask = torch.zeros(size, dtype=torch.bool).index_fill(0, place, True)
    nan = float("nan")
    y = layer(padded(x, place, size, nan), side=(padded(side, place, size, nan),), token_mask=mask)
    torch.testing.assert_close(y[place], layer(x, side=(side,)))
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


SCORES: dict[str, Callable[[], Score]] = {
    "linear": lambda: LinearScore(D, E, bias=True),
    "mlp": lambda: MLPScore(D, 7, E),
    "cosine": lambda: CosineScore(D, E),
    "cosine_projected": lambda: CosineScore(D, E, proj_dim=3),
    "prototype": lambda: PrototypeScore(D, E),
    "recurrent": lambda: RecurrentScore(D, E, state_dim=5),
}


@pytest.mark.parametrize("score", SCORES)
def test_padding_reaches_no_score_and_no_gradient_penalty(score: str) -> None:
    layer, nan = layer_of(Router(SCORES[score](), TopK(2)), backend="loop"), float("nan")
    x = torch.randn(N, D, dtype=torch.float64)
    place, size = places(0.75)
    mask = torch.zeros(size, dtype=torch.bool).index_fill(0, place, True)
    penalties = []
    for rows, inputs in ((x, {}), (padded(x, place, size, nan), {"token_mask": mask})):
        rows = rows.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(rows, **inputs).square().sum(), rows, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), list(layer.parameters()), allow_unused=True))
    for one, other in zip(*penalties, strict=True):
        torch.testing.assert_close(other, one)
        assert one is None or other.isfinite().all()


@pytest.mark.parametrize("noise", [Jitter(0.1), GaussianNoise(D, E), GumbelNoise(0.7)], ids=lambda n: type(n).__name__)
def test_padding_reaches_no_noise(noise: Noise) -> None:
    layer = layer_of(Router(LinearScore(D, E), ExpertChoice(1.0), noise=noise)).train()
    place, size = places(0.75)
    mask = torch.zeros(size, dtype=torch.bool).index_fill(0, place, True)
    wide = padded(torch.randn(N, D, dtype=torch.float64), place, size, float("nan"))
    with recorded(layer) as records:
        y = layer(wide, token_mask=mask)
    assert records[0].routing.counts().tolist() == [N // E] * E
    assert not y[~mask].any()
    (y.square().sum() + sum(defined_losses(records[0]).values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_padding_of_features_of_their_own_changes_nothing() -> None:
    nan, (place, size) = float("nan"), places(0.75)
    mask = torch.zeros(size, dtype=torch.bool).index_fill(0, place, True)
    x = torch.randn(N, D, dtype=torch.float64)
    behaviours = (torch.randn(N, 3, D).double(), torch.randn(N, D).double(), torch.rand(N, 3) < 0.5)
    gates = torch.randn(2, N, D, dtype=torch.float64)
    cases = [
        (layer_of(Router(AttentionScore(D, E), TopK(2))), behaviours, 0),
        (layer_of(MultiGate([LinearScore(D, E), LinearScore(D, E)])), (gates[0], gates[1]), 0),
        (layer_of(MultiGate([LinearScore(D, E), LinearScore(D, E)])), gates, 1),
        (layer_of(Router(LinearScore(D, E), ExpertChoice(1.0))), gates[0], 0),
    ]
    for layer, features, at in cases:
        many = isinstance(features, tuple)
        wide = tuple(padded(f, place, size, nan) for f in features) if many else padded(features, place, size, nan, at)
        y = layer(padded(x, place, size, nan), wide, token_mask=mask)
        torch.testing.assert_close(y.index_select(y.ndim - 2, place), layer(x, features))
        y.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_a_routing_applied_later_and_a_stack_leave_padding_out() -> None:
    x, nan, (place, size) = torch.randn(N, D, dtype=torch.float64), float("nan"), places(0.75)
    mask, wide = torch.zeros(size, dtype=torch.bool).index_fill(0, place, True), padded(x, place, size, nan)
    for name in ("softmax", "gated_shared", "dense", "slots"):
        router = by_chooser(name)
        layer = layer_of(router, num_shared=max(1, router.num_shared))
        routing = layer.route(wide, token_mask=mask)
        y = layer(wide, routing=routing, token_mask=mask)
        torch.testing.assert_close(y[place], layer(x))
        assert y.isfinite().all()
        assert y.count_nonzero(-1).bool().sum() == N
    stacked = layer_of(Router(LinearScore(D, E), Dense()), combiner=Stack())
    y, present = stacked(wide, token_mask=mask)
    torch.testing.assert_close(y[place], stacked(x)[0])
    assert torch.equal(present, mask.unsqueeze(-1).expand_as(present))
    assert y.isfinite().all()


@pytest.mark.parametrize("name", ["expert_choice", "expert_choice_group", "threshold", "race"])
def test_rows_given_to_a_fixed_expert_do_not_compete(name: str) -> None:
    """Three rows in four have no condition: the others get what they get without them, by count and by weight."""
    inner = by_chooser(name).double()
    layer = layer_of(ConditionalSplit(copy.deepcopy(inner), None))
    x, group = torch.randn(4 * N, D, dtype=torch.float64), torch.arange(4 * N)
    group = group.where(group % 4 == 0, -1 - group) if name != "expert_choice_group" else -(group % 4 > 0).long()
    routed = group >= 0
    routing, alone = layer.route(x, group=group), inner(x[routed], group=group[routed])
    torch.testing.assert_close(routing.assignment()[routed, :WIDE], alone.assignment())
    assert torch.equal(routing.counts()[:WIDE], alone.counts())
    assert int(routing.counts()[WIDE]) == 3 * N
    for key, value in inner.state_dict().items():
        assert torch.equal(layer.router.conditional.state_dict()[key], value)


def test_an_expert_per_conditional_row_is_one_expert_per_conditional_row() -> None:
    for choose in (ExpertChoice(1.0), Threshold(1.0), Threshold(1.0, scope="pairs")):
        layer = layer_of(split(choose))
        group = torch.tensor([0, 2]).repeat(40)  # half of 80 rows have no condition
        assert int(layer.route(torch.randn(80, D).double(), group=group).counts()[:E].sum()) == 40


@pytest.mark.parametrize(
    "name", ["top_p", "expert_choice", "threshold", "race", "dense", "slots", "budget", "multi_gate"]
)
def test_a_batch_of_padding_alone_gives_nothing_and_leaves_every_statistic(name: str) -> None:
    layer = layer_of(ROUTERS[name]())
    before = copy.deepcopy(layer.state_dict())
    x = torch.full((9, D), float("nan"), dtype=torch.float64, requires_grad=True)
    with recorded(layer) as records:
        y = layer(x, token_mask=torch.zeros(9, dtype=torch.bool))
    assert not y.any()
    losses = defined_losses(records[0])
    assert all(value.isfinite() for value in losses.values())
    (y.sum() + sum(losses.values())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in (x, *layer.parameters()))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_mask_that_does_not_fit_is_refused_with_both_shapes() -> None:
    layer, x = layer_of(Router(LinearScore(D, E), TopK(2))), torch.randn(3, 4, D, dtype=torch.float64)
    routing = layer.route(x)
    for call in (layer, layer.route, lambda x, **given: layer(x, routing=routing, **given)):
        for wrong in (torch.ones(12), torch.ones(4, 3), torch.ones(3), torch.ones(3, 4, 1)):
            with pytest.raises(ValueError, match=rf"token_mask is {wrong.shape}.*rows are \(3, 4\)".replace(
                "torch.Size([", r"\(").replace("])", r",?\)")):  # fmt: skip
                call(x, token_mask=wrong.bool())
        for dtype in (torch.int64, torch.float32, torch.uint8):
            with pytest.raises(ValueError, match=r"token_mask is \(3, 4\) of torch.*of torch.bool"):
                call(x, token_mask=torch.ones(3, 4, dtype=dtype))
    for call in (layer, layer.route):
        with pytest.raises(ValueError, match=r"group is \(4, 3\) .*rows are \(3, 4\)"):
            call(x, group=torch.zeros(4, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"group is \(4,\) .*rows are \(12,\)"):
            call(x, group=torch.zeros(4, dtype=torch.int64))
        call(x, group=torch.zeros(12, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token_mask is \(5,\) .*rows are \(12,\)"):
        layer.router(x.reshape(12, D), token_mask=torch.ones(5, dtype=torch.bool))
    gates = layer_of(MultiGate([LinearScore(D, E), LinearScore(D, E)]))
    with pytest.raises(ValueError, match=r"token_mask is \(2, 4\) .*rows are \(4,\)"):
        gates.route(torch.randn(2, 4, D), token_mask=torch.ones(2, 4, dtype=torch.bool))
