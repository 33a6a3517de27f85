# SPDX-License-Identifier: Apache-2.0
"""Second derivatives of functions whose backward is written by hand, and which transforms such functions cannot serve.

A backward gives the gradient with respect to each input as if the inputs were independent. They seldom are: a router's
weights depend on the rows, one stack is used twice, the rows come from an earlier call. Asked for the gradient of the
output with respect to such an input, autograd would follow the paths between the inputs as well, and count them once
more when the engine follows them. Here gradients therefore stop at a view of each input, a node of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def first_gradients(
    by_hand: Callable[[], Gradients],
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor,
) -> Gradients:
    """Give what ``by_hand`` computes, so that it can be differentiated again where that is asked for.

    For the backward of an ``autograd.Function``. Under ``create_graph=True`` the numbers are the same to the bit; their
    own derivatives, of any order, come from ``function``.

    Args:
        by_hand: The gradients of the inputs, None where not needed.
        function: The forward pass from ordinary operations.
        inputs: Its arguments, with the graphs they came with.
        needs: For each whether its gradient is needed.
        grad: Gradient of the output.

    Returns:
        One gradient per input.

    Example:
        >>> x, y = torch.ones(1, requires_grad=True), torch.full((1,), 3.0)
        >>> dx, _ = first_gradients(lambda: (2 * x * y, None), lambda x, y: x.square() * y, (x, y), (True, False), y)
        >>> torch.autograd.grad(dx, x)
        (tensor([18.]),)
    """
    if not torch.is_grad_enabled():
        return by_hand()
    found: Gradients = _ByHand.apply(by_hand, function, tuple(needs), grad, *inputs)
    return found


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        by_hand: Callable[[], Gradients],
        function: Callable[..., Tensor],
        needs: tuple[bool, ...],
        grad: Tensor,
        *inputs: Tensor | None,
    ) -> Gradients:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, *inputs)
        ctx.function, ctx.needs = function, needs
        return by_hand()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        def first(grad: Tensor, *inputs: Tensor | None) -> Gradients:
            return _partial(lambda *same: (ctx.function(*same),), inputs, ctx.needs, (grad,), True)

        again = torch.is_grad_enabled()
        return None, None, None, *_partial(first, ctx.saved_tensors, ctx.needs_input_grad[3:], grads, again)


def _partial(
    function: Callable[..., Gradients],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Gradients,
    create_graph: bool,
) -> Gradients:
    """Gradients of the outputs of ``function`` along ``grads``, each input taken as independent of the others."""
    device = next(t.device.type for t in inputs if t is not None)
    with torch.enable_grad(), torch.autocast(device, enabled=False):  # dtypes are those of the forward pass already
        apart = [None if t is None else t.view_as(t) for t in inputs]
        outputs = function(*apart)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y is not None and g is not None]
        pairs = [(y, g) for y, g in pairs if y.requires_grad]
        wanted = [t for t, need in zip(apart, needs, strict=True) if t is not None and need]
        if pairs:
            ys, gs = zip(*pairs, strict=True)
            found = torch.autograd.grad(ys, wanted, gs, create_graph=create_graph, materialize_grads=True)
        else:  # linear in what is asked about
            found = tuple(torch.zeros_like(t) for t in wanted)
    left = iter(found)
    return tuple(next(left) if t is not None and need else None for t, need in zip(apart, needs, strict=True))


def is_transformed() -> bool:
    """Whether a ``torch.func`` transform or a forward-mode level is active, which no hand-written backward serves."""
    functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return functorch or torch.autograd.forward_ad._current_level >= 0


def needs_operations() -> bool:
    """Whether a compiler or a transform differentiates here by itself, and must see ordinary operations."""
    return torch.compiler.is_compiling() or is_transformed()


def is_batched(values: Tensor) -> bool:
    """Whether ``torch.func.vmap`` runs over the tensor, whose values the host then cannot read."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(values):
        if functorch.is_batchedtensor(values):
            return True
        values = functorch.get_unwrapped(values)
    return False
