# SPDX-License-Identifier: Apache-2.0
"""Other people's modules as MoE layers: dense networks upcycled, Mixtral blocks taken over, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeapps.moe.convert import from_dense, from_mixtral
from moeapps.moe.presets import top_k_router, top_p_router

D, WIDE, E, N = 6, 10, 4, 9


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Llama(nn.Module):
    """A gated network with the usual names."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, WIDE, bias=False), nn.Linear(D, WIDE, bias=False)
        self.down_proj, self.act_fn, self.scale = nn.Linear(WIDE, D, bias=False), nn.SiLU(), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


DENSE: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: nn.Sequential(nn.Linear(D, WIDE), nn.GELU(), nn.Dropout(0.5), nn.Linear(WIDE, 5), nn.Dropout(0.5)),
    "tanh-gelu": lambda: nn.Sequential(nn.Linear(D, WIDE), nn.GELU("tanh"), nn.Linear(WIDE, D)),
    "no-bias": lambda: nn.Sequential(nn.Linear(D, WIDE, bias=False), nn.ReLU(), nn.Linear(WIDE, D, bias=False)),
    "own-activation": lambda: nn.Sequential(nn.Linear(D, WIDE), nn.Hardswish(), nn.Linear(WIDE, D)),
    "sharp-elu": lambda: nn.Sequential(nn.Linear(D, WIDE), nn.ELU(0.3), nn.Linear(WIDE, D)),
    "timm": lambda: timm.layers.Mlp(D, WIDE, drop=0.1),
    "llama": Llama,
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("router", [None, top_k_router(num_experts=E, top_k=3)], ids=["top-2", "top-3"])
def test_a_fresh_mixture_is_the_dense_network_it_was_made_from(name: str, router: Callable[[int], nn.Module]) -> None:
    mlp, x_ND = DENSE[name](), torch.randn(2, N, D)
    layer = from_dense(mlp, E, router=router)

    assert mlp.training  # the check of the conversion put it back
    torch.testing.assert_close(layer(x_ND), mlp.eval()(x_ND), rtol=1e-5, atol=1e-6)


def test_the_copies_are_weights_of_their_own_and_the_router_learns_once_they_differ() -> None:
    mlp = DENSE["gelu"]()
    layer, x_ND = from_dense(mlp, E), torch.randn(N, D)
    before = mlp.eval()(x_ND)
    with torch.no_grad():
        layer.experts.w_in.add_(torch.randn_like(layer.experts.w_in))
    layer(x_ND).square().sum().backward()

    assert torch.equal(mlp(x_ND), before)
    assert layer.router.score.weight.grad.abs().sum() > 0


def test_dtype_goes_with_the_network() -> None:
    layer = from_dense(DENSE["no-bias"]().double(), E)

    assert {p.dtype for p in layer.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    "mlp",
    [
        nn.Linear(D, D),
        nn.Sequential(nn.Linear(D, WIDE), nn.ReLU(), nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, D)),
        nn.Sequential(nn.Linear(D, WIDE), nn.ReLU(), nn.Linear(WIDE, D, bias=False)),
        nn.Sequential(nn.Linear(D, WIDE), nn.LayerNorm(WIDE), nn.ReLU(), nn.Linear(WIDE, D)),
        Llama(scale=2.0),
    ],
    ids=["one-layer", "three-layers", "half-a-bias", "a-norm", "a-scale"],
)
def test_a_network_that_is_not_two_layers_is_refused(mlp: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"form that is read|all or none|computes something else"):
        from_dense(mlp, E)


def test_one_copy_and_a_router_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        from_dense(Llama(), 1)
    with pytest.raises(ValueError, match="bank has 4 experts"):
        from_dense(Llama(), E, router=top_p_router(num_experts=3))


# Mixtral: p = softmax(W_g x); the two largest p, divided by their sum, weigh W2 (silu(W1 x) * W3 x).
# (Jiang et al. 2024, section 2.1: Softmax(TopK(x W_g)), SwiGLU experts.)


class NaiveMixtral(nn.Module):
    """The block by its published equations, with the names of the state of transformers' version 4."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k, self.gate = top_k, nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(*size, bias=False) for name, size in zip(("w1", "w2", "w3"), SIZES, strict=True)}
            )
            for _ in range(E)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        out = []
        for x_D in x_BTD.flatten(0, -2):
            logit, y_D = self.gate(x_D), torch.zeros(D)
            best = logit.topk(self.top_k)
            for weight, e in zip(best.values.softmax(-1), best.indices.tolist(), strict=True):
                own = self.experts[e]
                y_D = y_D + weight * own["w2"](F.silu(own["w1"](x_D)) * own["w3"](x_D))
            out.append(y_D)
        return torch.stack(out).view_as(x_BTD)


SIZES = ((D, WIDE), (WIDE, D), (D, WIDE))


def version_5(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a block as version 5 stacks it."""

    def stack(name: str) -> Tensor:
        return torch.stack([state[f"experts.{e}.{name}.weight"] for e in range(E)])

    return {
        "gate.weight": state["gate.weight"],
        "experts.gate_up_proj": torch.cat([stack("w1"), stack("w3")], 1),
        "experts.down_proj": stack("w2"),
    }


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("stacked", [False, True], ids=["version-4", "version-5"])
def test_a_mixtral_block_gives_the_same_outputs_and_gradients(top_k: int, stacked: bool) -> None:
    block, x = NaiveMixtral(top_k), torch.randn(2, N, D, requires_grad=True)
    state = version_5(block.state_dict()) if stacked else block.state_dict()
    layer = from_mixtral(state, top_k=top_k)
    cotangent = torch.randn(2, N, D)
    wanted, found = block(x), layer(x)
    (wanted_dx,) = torch.autograd.grad(wanted, x, cotangent, retain_graph=True)
    wanted.backward(cotangent)
    x.grad = None
    found.backward(cotangent)

    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, wanted_dx, rtol=1e-4, atol=1e-6)
    grads = {name: p.grad for name, p in block.named_parameters()}
    for e in range(E):
        gate_up = torch.cat([grads[f"experts.{e}.{name}.weight"] for name in ("w1", "w3")]).T
        torch.testing.assert_close(layer.experts.w_in.grad[e], gate_up, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.experts.w_out.grad[e], grads[f"experts.{e}.w2.weight"].T, rtol=1e-4, atol=1e-6)
    if top_k > 1:
        torch.testing.assert_close(layer.router.score.weight.grad, grads["gate.weight"], rtol=1e-4, atol=1e-6)


def test_a_block_itself_says_how_many_experts_a_row_has_and_keeps_its_weights() -> None:
    block, x = NaiveMixtral(3), torch.randn(1, N, D)
    layer = from_mixtral(block)
    before = block(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()

    assert layer.router.choose.k == 3
    assert torch.equal(block(x), before)


def test_a_block_is_found_in_the_state_of_a_whole_model() -> None:
    block, x = NaiveMixtral(2), torch.randn(1, N, D)
    where = "model.layers.3.block_sparse_moe."
    state = {f"{where}{name}": value for name, value in block.state_dict().items()}

    torch.testing.assert_close(from_mixtral(state, prefix=where)(x), block(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no gate\.weight \(it has model.*prefix="):
        from_mixtral(state)


def test_weights_that_are_missing_or_do_not_fit_are_named() -> None:
    state = dict(NaiveMixtral(2).state_dict())
    with pytest.raises(ValueError, match=r"no experts\.2\.w3\.weight"):
        from_mixtral({name: value for name, value in state.items() if name != "experts.2.w3.weight"})
    with pytest.raises(ValueError, match=r"has experts\.3\.w1\.weight, but its router knows 3"):
        from_mixtral(state | {"gate.weight": torch.zeros(3, D)})
    with pytest.raises(ValueError, match=r"4 experts of width 6"):
        from_mixtral(version_5(state) | {"experts.down_proj": torch.zeros(E, D, WIDE + 1)})
