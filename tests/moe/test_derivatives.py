# SPDX-License-Identifier: Apache-2.0
"""Gradients that are to be differentiated again are the gradients; what is asked of them is right to second order.

The router of every layer reads the rows that its experts read, so that the weights of an assignment depend on x, and
every layer is applied to its own output, so that all stacks are used twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from moeapps.moe import (
    Backend,
    Capacity,
    Chain,
    GLUExperts,
    LinearScore,
    MLPExperts,
    MoELayer,
    Router,
    Routing,
    TopK,
    TopP,
)
from moeapps.moe.backends import auto
from moeapps.moe.fast.static import segments_static
from moeapps.moe.reference import reference_layer
from tests.moe.chooser_common import CHOOSERS
from tests.moe.derivatives_common import (
    BANKS,
    COLUMNS,
    STACKED,
    D,
    apart,
    both_gradients,
    derivatives,
    layer_of,
)

BACKENDS: tuple[Backend, ...] = ("loop", "segments", "grouped_mm", "onehot", "auto")
GROUP = torch.arange(24) // 8


def rows(num: int = 24, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(num, D, dtype=dtype, requires_grad=True)


@pytest.fixture
def _auto_takes_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "THRESHOLDS", auto.Thresholds(dense_work=0, shared_work=0, stack_bytes=0))


@pytest.mark.usefixtures("_auto_takes_segments")
@pytest.mark.parametrize("choose", CHOOSERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_derivatives_do_not_depend_on_whether_they_are_differentiated_again(
    backend: Backend, choose: str
) -> None:
    for bank in BANKS if backend in ("loop", "onehot", "auto") else STACKED:
        layer, x = layer_of(CHOOSERS[choose](), bank, backend=backend), rows(dtype=torch.float32)

        plain, graph = both_gradients(layer(layer(x, group=GROUP), group=GROUP), [x, *layer.parameters()])

        assert apart(graph, plain) < 1e-6, bank


def check(layer: MoELayer, x: Tensor, backend: Backend, tolerance: float = 1e-9) -> None:
    """The layer applied twice against its definition: both gradients, and the derivatives of the second."""
    layer.backend = backend
    inputs = [x, *layer.parameters()]
    group = GROUP if len(x) == len(GROUP) else None

    found = derivatives(layer(layer(x, group=group), group=group), inputs)
    wanted = derivatives(reference_layer(layer, reference_layer(layer, x, group), group), inputs)

    assert [apart(some, expected) < tolerance for some, expected in zip(found, wanted, strict=True)] == [True] * 3


@pytest.mark.parametrize("choose", CHOOSERS)
@pytest.mark.parametrize("bank", STACKED)
def test_segments_is_the_definition_to_second_order(bank: str, choose: str) -> None:
    check(layer_of(CHOOSERS[choose](), bank).double(), rows(), "segments")


@pytest.mark.parametrize("choose", CHOOSERS)
def test_the_loop_is_the_definition_to_second_order(choose: str) -> None:
    check(layer_of(CHOOSERS[choose](), "modules").double(), rows(), "loop")


@pytest.mark.parametrize(
    "options",
    [{"weight_at": "input"}, {"num_shared": 2}, {"capacity": Capacity(1.0, minimum=1)}],
    ids=["weight_at_input", "shared", "capacity"],
)
@pytest.mark.parametrize("bank", STACKED)
def test_weights_at_the_input_shared_experts_and_drops_too(bank: str, options: dict[str, Any]) -> None:
    check(layer_of(TopK(2), bank, **options).double(), rows(), "segments")


def test_a_bank_shared_by_the_steps_of_a_chain() -> None:
    chain = Chain([Router(LinearScore(D, COLUMNS), TopK(2)) for _ in range(3)], GLUExperts(COLUMNS, D, 8)).double()
    x = rows()
    inputs = [x, *chain.parameters()]

    y = x
    for step in chain.steps:
        step.backend = "segments"
        y = y + reference_layer(step, y)

    for found, wanted in zip(derivatives(chain(x), inputs), derivatives(y, inputs), strict=True):
        assert apart(found, wanted) < 1e-9


@pytest.mark.parametrize("bank", STACKED)
def test_many_chunks_on_two_threads(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeapps.moe.fast.chunks.MIN_CHUNK_ROWS", 32)
    monkeypatch.setattr("moeapps.moe.fast.chunks.CHUNK_ELEMENTS", 32)
    torch.set_num_threads(2)

    check(layer_of(TopK(2), bank).double(), rows(150), "segments", tolerance=1e-10)


@pytest.mark.parametrize("weight_at", ["output", "input"])
@pytest.mark.parametrize("choose", [TopK(2), TopP(0.6)], ids=["top_k", "top_p"])
def test_the_operator_of_the_compiler(choose: Any, weight_at: Any) -> None:
    layer, x = layer_of(choose, "geglu_bias", weight_at=weight_at).double(), rows()
    inputs = [x, *layer.parameters()]

    def static(x: Tensor) -> Tensor:
        ffn = layer.experts.feed_forward()
        return segments_static(ffn, x, layer.route(x), at_input=weight_at == "input")

    found = derivatives(static(static(x)), inputs)
    wanted = derivatives(reference_layer(layer, reference_layer(layer, x)), inputs)

    assert [apart(some, expected) < 1e-9 for some, expected in zip(found, wanted, strict=True)] == [True] * 3


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_a_compiled_layer_gives_the_same_under_create_graph() -> None:
    layer, x = layer_of(TopK(2), "swiglu"), rows(dtype=torch.float32)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = [x, *layer.parameters()]

    # torch asks for this switch where a compiled layer is differentiated under create_graph=True.
    with torch._functorch.config.patch(donated_buffer=False):
        found = torch.autograd.grad(compiled(compiled(x)).square().sum(), inputs, create_graph=True)
    wanted = torch.autograd.grad(reference_layer(layer, reference_layer(layer, x)).square().sum(), inputs)

    assert apart(found, wanted) < 1e-5


def test_the_whole_layer_against_finite_differences() -> None:
    layer = layer_of(TopK(2), "mlp", backend="segments").double()
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def adapted(layer: MoELayer, run: Callable[[dict[str, Tensor], Tensor], Tensor], data: tuple[Tensor, ...]) -> Tensor:
    """The outer loss of MAML: one step of descent on one half of the data, the error on the other."""
    weights: dict[str, Tensor] = dict(layer.named_parameters())
    x, target, new_x, new_target = data
    for _ in range(2):
        inner = (run(weights, x) - target).square().mean()
        steps = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        weights = {name: w - 0.3 * step for (name, w), step in zip(weights.items(), steps, strict=True)}
    return (run(weights, new_x) - new_target).square().mean()


class Definition(nn.Module):
    """A layer computed from the definition."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return reference_layer(self.layer, x)


@pytest.mark.usefixtures("_auto_takes_segments")
@pytest.mark.parametrize("backend", BACKENDS)
def test_descent_through_two_steps_of_descent_equals_a_naive_layer(backend: Backend) -> None:
    dtype = torch.float32 if backend in ("grouped_mm", "auto") else torch.float64
    layer = layer_of(TopK(2), "swiglu", backend=backend).to(dtype)
    data = tuple(torch.randn(16, D, dtype=dtype) for _ in range(4))
    naive = Definition(layer)

    fast = adapted(layer, lambda w, x: functional_call(layer, w, x), data)
    slow = adapted(layer, lambda w, x: functional_call(naive, {f"layer.{n}": v for n, v in w.items()}, x), data)

    found, wanted = (torch.autograd.grad(loss, list(layer.parameters())) for loss in (fast, slow))
    assert apart(found, wanted) < (1e-10 if dtype == torch.float64 else 1e-4)


def test_a_gradient_that_is_linear_has_derivatives_of_zero() -> None:
    experts = MLPExperts(3, D, 4, activation="identity").double().requires_grad_(False)
    router = Router(LinearScore(D, 3), TopK(2, weighing="ones")).double().requires_grad_(False)
    x = rows()

    (slope,) = torch.autograd.grad(MoELayer(router, experts, backend="segments")(x).sum(), x, create_graph=True)

    assert not torch.autograd.grad(slope.sum(), x)[0].any()


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_routing_that_was_applied_without_gradients_still_teaches_its_router(without: Callable[[], Any]) -> None:
    layer, x = layer_of(TopK(2), "swiglu", backend="segments"), rows(dtype=torch.float32)
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])

    routing = layer.route(x)
    assert isinstance(routing, Routing)
    with without():
        layer(x, routing=routing)
    found = torch.autograd.grad(layer(x, routing=routing).square().sum(), [x, *layer.parameters()])

    torch.testing.assert_close(found, wanted)
