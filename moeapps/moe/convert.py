# SPDX-License-Identifier: Apache-2.0
"""Make MoE layers out of other people's modules: a dense feed-forward network, a Mixtral block.

Shape legend: E experts, D width, F hidden width, O output width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeapps.moe.activation import ActivationName
from moeapps.moe.experts import GLUExperts, MLPExperts
from moeapps.moe.layer import MoELayer, RouterFactory
from moeapps.moe.presets.basic import top_k_router
from moeapps.moe.routers import LinearScore, Router, TopK
from moeapps.moe.surgery import upcycle

__all__ = ["from_dense", "from_mixtral"]

# Names of the three matrices of a gated network: gate, up, down.
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_READ = (
    "Sequential(Linear, activation, Linear) with or without dropout; fc1, act, fc2; or without bias gate_proj, "
    "up_proj, down_proj or w1, w3, w2, with act_fn"
)


def from_dense(mlp: nn.Module, num_experts: int, *, router: RouterFactory | None = None) -> MoELayer:
    """Upcycle a dense network: every expert starts as a copy of it, so under weights that sum to 1 nothing changes.

    Dropout is left out. What was read is compared with the network itself on random rows before it is returned.

    Args:
        mlp: two linear layers with an activation between them, gated or not; see the error for the forms.
        num_experts: copies, 2 or more.
        router: width -> router; None is a linear top-2 router whose weights sum to 1.

    Raises:
        ValueError: a network of another form, or one that computes something else besides; too few copies.

    Source: Sparse Upcycling (Komatsuzaki et al. 2022); see :func:`moeapps.moe.surgery.upcycle`.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> x = torch.randn(5, 8)
        >>> torch.allclose(from_dense(mlp, 4)(x), mlp(x), atol=1e-5)
        True
    """
    if num_experts < 2:
        raise ValueError(f"num_experts={num_experts}, but a mixture needs at least 2 copies of the network.")
    bank = _bank(mlp)
    weight = bank.w_in.detach()
    make = top_k_router(num_experts=num_experts, top_k=2) if router is None else router
    return MoELayer(make(bank.in_dim).to(weight.device, weight.dtype), upcycle(bank, num_experts))


def from_mixtral(
    block: nn.Module | Mapping[str, Tensor],
    *,
    prefix: str = "",
    top_k: int | None = None,
    activation: ActivationName = "silu",
) -> MoELayer:
    """Take over a Mixtral block: the same outputs and gradients, from this core's backends.

    Both layouts of transformers are read: one module per expert (``experts.0.w1.weight``, up to version 4) and stacked
    weights (``experts.gate_up_proj``, from version 5). Noise on the hidden states in training (``router_jitter_noise``,
    0 in the published models) is not taken over: there it reaches the experts too.

    Args:
        block: transformers' ``MixtralSparseMoeBlock``, or its state, or that of a whole model.
        prefix: where the block is in that state, for instance ``model.layers.0.block_sparse_moe.``.
        top_k: experts per row; None reads ``block.top_k``, and means 2 where there is only a state.
        activation: of the gate.

    Raises:
        ValueError: weights that are missing or do not fit each other.

    Source: layouts as in huggingface/transformers ``src/transformers/models/mixtral/modeling_mixtral.py``
        (MixtralBlockSparseTop2MLP at commit 00d4b3d; MixtralExperts in version 5.24.0).

    Example:
        >>> state = {"gate.weight": torch.randn(4, 8), "experts.gate_up_proj": torch.randn(4, 12, 8)}
        >>> from_mixtral(state | {"experts.down_proj": torch.randn(4, 8, 6)})(torch.zeros(3, 8)).shape
        torch.Size([3, 8])
    """
    state: Mapping[str, Tensor] = block.state_dict() if isinstance(block, nn.Module) else block
    gate_ED = _weight(state, f"{prefix}gate.weight")
    w_in_EDH, w_out_EFD = _stacked(state, prefix, gate_ED.shape[0])
    (num, dim), hidden = gate_ED.shape, w_out_EFD.shape[1]
    wanted = ((num, dim, 2 * hidden), (num, hidden, dim))
    if (tuple(w_in_EDH.shape), tuple(w_out_EFD.shape)) != wanted:
        raise ValueError(
            f"{prefix}experts: gate and up are {tuple(w_in_EDH.mT.shape)} and down is {tuple(w_out_EFD.mT.shape)}, but "
            f"the router knows {num} experts of width {dim}: give the weights of one Mixtral block."
        )
    k = int(getattr(block, "top_k", 2)) if top_k is None else top_k
    # A renormalised weight of one expert is 1: the router of such a block learns nothing, and neither does ours.
    choose = TopK(k) if k > 1 else TopK(1, weighing="ones")
    with torch.device("meta"):  # the weights are replaced: neither memory nor random numbers
        score, bank = LinearScore(dim, num), GLUExperts(num, dim, hidden, activation=activation)
    score.weight = nn.Parameter(gate_ED.clone())
    bank.w_in, bank.w_out = nn.Parameter(w_in_EDH.contiguous()), nn.Parameter(w_out_EFD.contiguous())
    return MoELayer(Router(score, choose), bank)


def _stacked(state: Mapping[str, Tensor], prefix: str, num: int) -> tuple[Tensor, Tensor]:
    """Gate | up (E, D, 2F) and down (E, F, D) of either layout, copied."""
    if f"{prefix}experts.gate_up_proj" in state:
        wide, narrow = _weight(state, f"{prefix}experts.gate_up_proj"), _weight(state, f"{prefix}experts.down_proj")
        return wide.mT.clone(), narrow.mT.clone()
    parts = [[_weight(state, f"{prefix}experts.{e}.{name}.weight") for e in range(num)] for name in ("w1", "w3", "w2")]
    extra = f"{prefix}experts.{num}.w1.weight"
    if extra in state:
        raise ValueError(f"the state has {extra}, but its router knows {num} experts; give the whole block.")
    gate, up, down = (torch.stack(stack).mT for stack in parts)
    return torch.cat([gate, up], -1), down.clone()


def _weight(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        near = ", ".join(sorted(key for key in state if "gate" in key or "experts" in key)[:4])
        raise ValueError(
            f"the state has no {name} (it has {near or 'nothing of a Mixtral block'}); give a MixtralSparseMoeBlock, "
            "or the state of a model with prefix='model.layers.0.block_sparse_moe.' or the like."
        )
    return state[name].detach()


def _bank(mlp: nn.Module) -> GLUExperts | MLPExperts:
    """One dense network as a bank of one expert, checked against the network."""
    found = _plain_parts(mlp) or _gated_parts(mlp)
    if found is None:
        raise ValueError(f"{type(mlp).__name__} is not of a form that is read, which are: {_READ}.")
    linears, activation = found
    first, last = linears[0], linears[-1]
    kind: type[GLUExperts] | type[MLPExperts] = GLUExperts if len(linears) == 3 else MLPExperts
    bias = first.bias is not None
    with torch.device("meta"):
        bank = kind(
            1, first.in_features, first.out_features, out_dim=last.out_features, activation=activation, bias=bias
        )
    bank.w_in = nn.Parameter(torch.cat([layer.weight.detach().mT for layer in linears[:-1]], -1)[None].clone())
    bank.w_out = nn.Parameter(last.weight.detach().mT[None].clone(memory_format=torch.contiguous_format))
    if bias:
        bank.b_in = nn.Parameter(torch.cat([layer.bias.detach() for layer in linears[:-1]])[None])
        bank.b_out = nn.Parameter(last.bias.detach()[None].clone())
    _check_same(mlp, bank)
    return bank


def _plain_parts(mlp: nn.Module) -> tuple[list[nn.Linear], ActivationName | nn.Module] | None:
    """Linear, activation, Linear of a Sequential or of fc1, act, fc2."""
    layers: list[Any]
    if isinstance(mlp, nn.Sequential):
        layers = [layer for layer in mlp if not isinstance(layer, nn.Dropout | nn.Identity)]
    else:
        layers = [getattr(mlp, name, None) for name in ("fc1", "act", "fc2")]
    if len(layers) != 3 or not (isinstance(layers[0], nn.Linear) and isinstance(layers[2], nn.Linear)):
        return None
    return _same_bias([layers[0], layers[2]]), _activation(layers[1])


def _gated_parts(mlp: nn.Module) -> tuple[list[nn.Linear], ActivationName | nn.Module] | None:
    """Gate, up, down and the activation of a gated network."""
    for names in _GATED:
        linears = [getattr(mlp, name, None) for name in names]
        if all(isinstance(layer, nn.Linear) for layer in linears):
            return _same_bias(cast(list[nn.Linear], linears)), _activation(getattr(mlp, "act_fn", nn.SiLU()))
    return None


def _same_bias(linears: list[nn.Linear]) -> list[nn.Linear]:
    if len({layer.bias is None for layer in linears}) > 1:
        raise ValueError("some linear layers of the network have a bias and some have none; experts have all or none.")
    return linears


def _activation(given: object) -> ActivationName | nn.Module:
    """The name of an activation that the core knows, or the module itself."""
    if isinstance(given, nn.GELU):
        return "gelu_tanh" if given.approximate == "tanh" else "gelu"
    if isinstance(given, nn.ELU) and given.alpha == 1.0:
        return "elu"
    known: dict[object, ActivationName] = {
        nn.ReLU: "relu",
        nn.SiLU: "silu",
        nn.Tanh: "tanh",
        nn.Identity: "identity",
        F.relu: "relu",
        F.gelu: "gelu",
        F.silu: "silu",
        torch.tanh: "tanh",
    }
    name = known.get(type(given)) or known.get(given)
    if name is not None:
        return name
    if isinstance(given, nn.Module):
        return copy.deepcopy(given)
    raise ValueError(f"activation {given!r} is not known; make it a module.")


@torch.no_grad()
def _check_same(mlp: nn.Module, bank: GLUExperts | MLPExperts) -> None:
    """Refuse a network that computes more than was read (a norm between, a residual, a scale)."""
    like = bank.w_in
    x_ND = torch.randn(16, bank.in_dim, generator=torch.Generator().manual_seed(0)).to(like)
    training = [module for module in mlp.modules() if module.training]
    mlp.eval()
    wanted = mlp(x_ND)
    for module in training:
        module.training = True
    found = bank.every(x_ND)[:, 0]
    close = 1e-4 if like.dtype in (torch.float32, torch.float64) else 5e-2
    if not isinstance(wanted, Tensor) or wanted.shape != found.shape or not _near(wanted, found, close):
        raise ValueError(
            f"{type(mlp).__name__} computes something else than its two linear layers with the activation between them "
            f"(a norm, a scale, a residual?); pass the plain network, one of: {_READ}."
        )


def _near(wanted: Tensor, found: Tensor, tolerance: float) -> bool:
    size = wanted.float().abs().max().clamp(min=1e-6)
    return bool((wanted.float() - found.float()).abs().max() <= tolerance * size)
