# SPDX-License-Identifier: Apache-2.0
"""One table of the activations an expert may use, each with its derivative.

The fast backend writes activations and their derivatives into buffers of its own, so every named activation has three
forms: a differentiable function, the same written into ``out``, and the product of its derivative with a gradient. A
module of the user's own gets the third form from autograd.

Shape legend: R rows of one segment, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ActivationName = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "elu", "identity"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise function ``a = f(h)`` with what a hand-written backward needs.

    Attributes:
        name: What error texts and ``repr`` show.
        function: ``f(h) -> a``, differentiable any number of times.
        forward_out: ``(h, out)`` writes ``f(h)`` into ``out``; both (R, F).
        backward_out: ``(grad, h, a, out)`` writes ``grad * f'(h)`` into ``out``, which may be ``grad``; ``a`` is
            ``f(h)``.
        recomputable: Whether calling it twice gives the same values and no parameter hides inside it. Where this is
            false (dropout, PReLU) the backend that recomputes activations is not used.
        tabulated: Whether it is one of the table, hence safe to call on several threads at once.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    forward_out: Callable[[Tensor, Tensor], object]
    backward_out: Callable[[Tensor, Tensor, Tensor, Tensor], object]
    recomputable: bool = True
    tabulated: bool = True


def _by_aten(name: str, function: Callable[[Tensor], Tensor], operator: str, **options: str) -> Activation:
    """An activation of which torch has the form into ``out``, and that of its derivative, under the usual names."""
    forward, backward = getattr(_aten, operator).out, getattr(_aten, f"{operator}_backward").grad_input
    return Activation(
        name,
        function,
        lambda h, out: forward(h, out=out, **options),
        lambda grad, h, a, out: backward(grad, h, grad_input=out, **options),
    )


_KNOWN = (
    Activation(
        "relu",
        F.relu,
        lambda h, out: _aten.relu.out(h, out=out),
        lambda grad, h, a, out: _aten.threshold_backward.grad_input(grad, h, 0, grad_input=out),
    ),
    _by_aten("gelu", F.gelu, "gelu"),
    _by_aten("gelu_tanh", lambda h: F.gelu(h, approximate="tanh"), "gelu", approximate="tanh"),
    _by_aten("silu", F.silu, "silu"),
    Activation(
        "tanh",
        torch.tanh,
        lambda h, out: torch.tanh(h, out=out),
        lambda grad, h, a, out: _aten.tanh_backward.grad_input(grad, a, grad_input=out),
    ),
    Activation(
        "elu",
        F.elu,
        lambda h, out: _aten.elu.out(h, out=out),
        lambda grad, h, a, out: _aten.elu_backward.grad_input(grad, 1.0, 1.0, 1.0, False, h, grad_input=out),
    ),
    Activation("identity", lambda h: h, lambda h, out: out.copy_(h), lambda grad, h, a, out: out.copy_(grad)),
)
_TABLE = {activation.name: activation for activation in _KNOWN}


def resolve_activation(activation: ActivationName | nn.Module) -> Activation:
    """Look an activation up by name, or wrap an elementwise module.

    Args:
        activation: One of ``relu, gelu, gelu_tanh, silu, tanh, elu, identity``, or a module that maps (R, F) to (R, F)
            row by row.

    Raises:
        ValueError: If the name is not in the table.
    """
    if isinstance(activation, nn.Module):
        return _from_module(activation)
    if activation not in _TABLE:
        allowed = ", ".join(get_args(ActivationName))
        raise ValueError(f"activation={activation!r} is unknown; use one of {allowed}, or pass an nn.Module.")
    return _TABLE[activation]


def _from_module(module: nn.Module) -> Activation:
    stateful = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    random = any(isinstance(m, nn.RReLU | nn.modules.dropout._DropoutNd) for m in module.modules())

    def forward_out(h_RF: Tensor, out: Tensor) -> Tensor:
        return out.copy_(module(h_RF))

    def backward_out(grad_RF: Tensor, h_RF: Tensor, _: Tensor, out: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = h_RF.detach().requires_grad_()
            value = module(leaf)
        return out.copy_(torch.autograd.grad(value, leaf, grad_RF)[0])

    return Activation(
        type(module).__name__, module, forward_out, backward_out, not (stateful or random), tabulated=False
    )
