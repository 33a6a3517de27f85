# SPDX-License-Identifier: Apache-2.0
"""Traced layers: one graph whatever is routed, the same numbers, gradients and records as without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeapps.moe import (
    Capacity,
    Chooser,
    Dense,
    ExpertChoice,
    Experts,
    GLUExperts,
    LinearScore,
    MLPExperts,
    ModuleExperts,
    MoELayer,
    MoERecorder,
    NormalisedExperts,
    Router,
    SparseMixer,
    Stack,
    TopK,
    TopP,
    ZLoss,
    presets,
)
from tasks.dynamics.nets.experts import GEPSExperts

pytestmark = [
    pytest.mark.medium,
    # The compiler itself looks at .grad of the tensors that cross a graph break.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]

D, E, N = 8, 4, 16


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()  # forward of one class is one code object, however many layers were compiled before


@dataclass
class Case:
    """A layer and what it is called with."""

    layer: nn.Module
    inputs: dict[str, Any]

    def results(self, layer: nn.Module) -> list[Tensor]:
        """Output, and the gradients of x and of every parameter."""
        self.layer.zero_grad()
        x = self.inputs["x"].detach().requires_grad_()
        y = layer(**{**self.inputs, "x": x})
        y = y[0] if isinstance(y, tuple) else y
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in self.layer.parameters() if p.grad is not None)]


def layer_case(choose: Chooser, experts: Experts, **options: Any) -> Case:
    capacity = options.pop("capacity", None)
    layer = MoELayer(Router(LinearScore(D, E), choose, capacity=capacity), experts, **options)
    return Case(layer, {"x": torch.randn(N, D)})


def fields() -> Case:
    """MixER: stacked vector fields that read a context; routed on the context, not on the state."""
    case = layer_case(TopK(1), GEPSExperts(D, E, 4 * E, width=6))
    context = torch.randn(N, 4 * E)
    case.layer = MoELayer(Router(LinearScore(4 * E, E), TopK(1)), case.layer.experts)
    case.inputs |= {"features": context, "side": (context,)}
    return case


def split() -> Case:
    """ProMoE: unconditional rows to their own expert, prototypes for the others, one shared expert."""
    group = torch.arange(N) % 3 - 1
    return Case(presets.promoe(num_experts=E)(D), {"x": torch.randn(N, D), "group": group})


def split_masked() -> Case:
    """The same with two experts a row and two shared ones apart from the dispatch, weighed by a mask."""
    case, rows = split(), torch.arange(N)
    case.layer = presets.promoe(num_experts=E, top_k=2, num_shared=2)(D)
    case.inputs["token_mask"] = rows % 5 != 0
    return case


def split_by_expert() -> Case:
    """ProMoE-EC: in each sample of four rows each expert takes its best; the second sample is unconditional."""
    sample = torch.arange(N) // 4
    return Case(
        presets.promoe(num_experts=E, by_expert=True)(D),
        {"x": torch.randn(N, D), "group": sample.where(sample != 1, -2)},
    )


def unimoe() -> Case:
    """Top-p with null experts and shared experts of another width: two banks, sentinels in both."""
    return Case(presets.unimoe_audio(num_experts=E, jitter=0.0)(D), {"x": torch.randn(N, D)})


BANKS: dict[str, Callable[[], Case]] = {
    "reglu": lambda: layer_case(TopK(2), GLUExperts(E, D, 12, activation="relu")),
    "swiglu_bias": lambda: layer_case(TopK(2), GLUExperts(E, D, 12, bias=True), weight_at="input"),
    "gelu_bias": lambda: layer_case(TopK(2), MLPExperts(E, D, 12, out_dim=5)),
    "normalised": lambda: layer_case(Dense(), NormalisedExperts(E, D, 6, hidden_dim=5)),
    "fields": fields,
}
CHOOSERS: dict[str, Callable[[], Case]] = {
    "capacity": lambda: layer_case(TopK(2), MLPExperts(E, D, 12), capacity=Capacity(1.0, minimum=1)),
    "top_p": lambda: layer_case(TopP(0.6), MLPExperts(E, D, 12)),
    "budget": lambda: layer_case(TopP(0.6, budget=2.0, decay=0.0), MLPExperts(E, D, 12)),
    "sparse_mixer": lambda: layer_case(SparseMixer(p=0.6, draws=False), MLPExperts(E, D, 12)),
    "split": split,
    "split_masked": split_masked,
    "split_by_expert": split_by_expert,
    "expert_choice": lambda: layer_case(ExpertChoice(1.0), GLUExperts(E, D, 12)),
    "null_and_shared": unimoe,
    "stack": lambda: layer_case(TopK(2), MLPExperts(E, D, 12), combiner=Stack()),
}


@pytest.mark.parametrize("name", [*BANKS, *CHOOSERS])
def test_one_graph_gives_the_numbers_and_gradients_of_eager(name: str) -> None:
    case = {**BANKS, **CHOOSERS}[name]()
    state = {key: value.clone() for key, value in case.layer.state_dict().items()}
    eager = case.results(case.layer)
    after = {key: value.clone() for key, value in case.layer.state_dict().items()}
    case.layer.load_state_dict(state)

    traced = case.results(torch.compile(case.layer, backend="aot_eager", fullgraph=True))

    torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(case.layer.state_dict(), after)  # buffers with a memory moved alike


@pytest.mark.parametrize("name", [*BANKS, *CHOOSERS])
def test_an_exported_layer_gives_the_numbers_of_eager_for_rows_it_never_saw(name: str) -> None:
    case = {**BANKS, **CHOOSERS}[name]()
    layer = case.layer.eval()
    program = torch.export.export(layer, (), case.inputs)

    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(program.module()(**case.inputs), layer(**case.inputs), rtol=1e-5, atol=1e-6)
        case.inputs["x"] = 3 * torch.randn(N, D)  # routed otherwise


def test_modules_of_any_kind_break_the_graph_of_a_compiled_layer_and_export_all_the_same() -> None:
    case = layer_case(TopK(1), ModuleExperts([nn.Linear(D, D) for _ in range(E)]))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(case.layer, backend="eager", fullgraph=True)(**case.inputs)
    torch._dynamo.reset()

    torch.testing.assert_close(torch.compile(case.layer, backend="eager")(**case.inputs), case.layer(**case.inputs))
    program = torch.export.export(case.layer, (), case.inputs)
    torch.testing.assert_close(program.module()(**case.inputs), case.layer(**case.inputs))


def test_one_graph_serves_all_routings_and_one_more_all_numbers_of_rows() -> None:
    from torch._dynamo.utils import counters

    layer = MoELayer(Router(LinearScore(D, E), TopK(2)), MLPExperts(E, D, 12))
    counters.clear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)

    for num_rows in (16, 16, 24, 40, 56):
        x = torch.randn(num_rows, D)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)

    assert counters["stats"]["unique_graphs"] == 2


def test_a_compiled_layer_is_recorded_like_a_plain_one() -> None:
    layer, x = MoELayer(Router(LinearScore(D, E), TopK(2)), MLPExperts(E, D, 8)), torch.randn(16, D)
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        with MoERecorder(layer) as recorder:
            y = run(x)
        (y.square().mean() + ZLoss(weight=1.0)(recorder.records)).backward()
        assert [r.name for r in recorder.records] == ["MoELayer"]
        results.append([y, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(*results)
