# SPDX-License-Identifier: Apache-2.0
"""``torch.func`` through layers: a sample at a time, an ensemble at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vjp, vmap

from moeapps.moe import Backend, Capacity, NormalisedExperts, TopK
from moeapps.moe.reference import reference_layer
from moeapps.moe.view_linear import view_linear
from tests.moe.chooser_common import CHOOSERS
from tests.moe.derivatives_common import BANKS, D, apart, layer_of

SAMPLES, N = 3, 9
GROUP = torch.arange(N) // 3
BATCHABLE = [name for name in CHOOSERS if name not in ("dense_to_sparse", "expert_choice_group", "expert_choice_rows")]


def samples() -> Tensor:
    return torch.randn(SAMPLES, N, D, dtype=torch.float64)


def per_sample(function: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """The outputs of a function that is called sample by sample, stacked."""
    found = [function(sample) for sample in x]
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("backend", ["loop", "auto"])
@pytest.mark.parametrize("choose", BATCHABLE)
def test_vmap_is_one_sample_after_the_other(choose: str, backend: Backend) -> None:
    for bank in BANKS:
        layer, x = layer_of(CHOOSERS[choose](), bank, backend=backend).double().eval(), samples()
        weights = {name: p.detach() for name, p in layer.named_parameters()}

        def loss(w: dict[str, Tensor], x: Tensor, layer: Any = layer) -> Tensor:
            return functional_call(layer, w, (x,)).square().sum()

        def naive(x: Tensor, layer: Any = layer) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            y = reference_layer(layer, x)
            inputs = [x, *layer.parameters()]
            return y, *torch.autograd.grad(y.square().sum(), inputs, materialize_grads=True)

        y = vmap(layer)(x)
        dw, dx = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(weights, x)

        assert apart([y, dx, *dw.values()], per_sample(naive, x)) < 1e-9, bank


@pytest.mark.parametrize("options", [{"weight_at": "input"}, {"num_shared": 2}, {"capacity": Capacity(1.0, minimum=1)}])
def test_vmap_with_weights_at_the_input_shared_experts_and_drops(options: dict[str, Any]) -> None:
    layer, x = layer_of(TopK(2), "mlp_bias", backend="loop", **options).double(), samples()

    assert apart([vmap(layer)(x)], per_sample(lambda s: (reference_layer(layer, s),), x)) < 1e-12


def test_vmap_under_one_routing_for_all_samples() -> None:
    layer, x = layer_of(TopK(2), "swiglu").double(), samples()
    routing = layer.route(x[0])

    y = vmap(lambda s: layer(s, routing=routing))(x)

    assert apart([y], per_sample(lambda s: (layer(s, routing=routing),), x)) < 1e-12


def test_vmap_over_an_ensemble_of_layers() -> None:
    layers = [layer_of(TopK(2), "swiglu").double() for _ in range(4)]
    weights, buffers = stack_module_state(layers)
    x = samples()[0]

    y = vmap(lambda w, b: functional_call(layers[0], (w, b), (x,)))(weights, buffers)

    assert apart([y], [torch.stack([reference_layer(layer, x) for layer in layers])]) < 1e-12


@pytest.mark.parametrize("backend", ["loop", "auto"])
@pytest.mark.parametrize("choose", CHOOSERS)
def test_jvp_vjp_and_hessian_agree_with_autograd(choose: str, backend: Backend) -> None:
    layer, x = layer_of(CHOOSERS[choose](), "swiglu", backend=backend).double().eval(), samples()[0].requires_grad_()

    def forward(x: Tensor) -> Tensor:
        return layer(x, group=GROUP)

    y = reference_layer(layer, x, GROUP)
    t, u = torch.randn_like(x), torch.randn_like(y)
    (back,) = torch.autograd.grad((y * u).sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad((back * t).sum(), x)

    tangent = jvp(forward, (x.detach(),), (t,))[1]
    (cotangent,) = vjp(forward, x.detach())[1](u)
    second: Any = hessian(lambda x: (forward(x) * u).sum())(x.detach())

    assert apart([cotangent], [back]) < 1e-10
    torch.testing.assert_close((tangent * u).sum(), (back * t).sum().detach())
    assert apart([torch.einsum("abcd,cd->ab", second, t)], [curve]) < 1e-9


@pytest.mark.parametrize("backend", ["segments", "grouped_mm", "onehot"])
def test_other_backends_say_that_they_cannot(backend: Backend) -> None:
    layer = layer_of(TopK(2), "swiglu", backend=backend)

    with pytest.raises(ValueError, match=r"a routing of its own.*use backend='auto' or 'loop'"):
        vmap(layer)(samples().float())
    if backend == "segments":
        with pytest.raises(ValueError, match=r"hand-written backward; use backend='auto'"):
            grad(lambda x: layer(x).sum())(samples()[0].float())


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_dense_normalised_experts(norm: Any) -> None:
    bank, x = NormalisedExperts(4, D, 5, hidden_dim=6, norm=norm).double(), samples()
    t = torch.randn_like(x[0])

    tangent = jvp(bank.every, (x[0],), (t,))[1]
    step = 1e-6

    assert apart([vmap(bank.every)(x)], per_sample(lambda s: (bank.every(s),), x)) < 1e-12
    assert apart([tangent], [(bank.every(x[0] + step * t) - bank.every(x[0] - step * t)) / (2 * step)]) < 1e-7


def test_view_linear_forward_mode_is_exact() -> None:
    x, t = torch.randn(2, 3, 4, 5, dtype=torch.float64)[:, :2]
    weight = torch.randn(3, 5, 6, dtype=torch.float64)

    tangent = jvp(lambda v: view_linear(v, weight, (0, 1, 1)), (x,), (t,))[1]

    torch.testing.assert_close(tangent, torch.stack([t[v] @ weight[b] for b, v in enumerate((0, 1, 1))], 1))
