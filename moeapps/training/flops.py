# SPDX-License-Identifier: Apache-2.0
"""Floating point operations of anything that runs under torch, two per multiply-add of a product.

Torch's counter knows dense products, convolutions and the fused attention of CUDA; an operation without a formula
counts 0 in silence. Here are formulas for the rest that our networks and usual ones are built of, so that a count does
not depend on device, kernel or mode: attention counts as its two products (four backward, however often a kernel
computes the scores again), a recurrent layer as its two products per step, a sparse product by what is stored.
Sums, activations, norms, sorting and gathering count 0 everywhere.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moeapps.moe import TableScore

Formula = Callable[..., int]
_WITHOUT_PRODUCTS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
    TableScore,
)


def count_flops(module: nn.Module, *inputs: Any, **options: Any) -> int:
    """Return the forward FLOPs of one call ``module(*inputs, **options)``, in the mode the module is in.

    Args:
        module: any module; a part of it that holds matrices and counted 0 is named in a warning.
        inputs: what it is called with.
        options: keyword arguments of the call.

    Example:
        >>> count_flops(nn.Linear(8, 4), torch.zeros(3, 8))
        192
    """
    with torch.no_grad(), counting(module) as flops:
        module(*inputs, **options)
    return int(flops.get_total_flops())


@contextmanager
def counting(module: nn.Module | None = None) -> Iterator[FlopCounterMode]:
    """Count what runs inside the block, backward passes included; ask what it yields for ``get_total_flops()``.

    Args:
        module: what is watched for parts that hold matrices, are called and count 0; they are named in one warning.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation for a whole attention layer
    mode = FlopCounterMode(display=False, custom_mapping=formulas())
    mode.mod_tracker = _Whole()  # type: ignore[assignment]
    watch = _Watch(module, mode)
    try:
        with mode:
            yield mode
    finally:
        watch.stop()
        torch.backends.mha.set_fastpath_enabled(fast)
    watch.warn()


class _Whole:
    """In place of torch's tracker of modules, whose hooks refuse a parameter as input where gradients are off."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _Whole:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Watch:
    """Which modules were called on at least one row, and what each counted, its parts included."""

    def __init__(self, root: nn.Module | None, mode: FlopCounterMode) -> None:
        self._names = {} if root is None else {module: name for name, module in root.named_modules()}
        self._counted: dict[nn.Module, int] = defaultdict(int)
        self._called: set[nn.Module] = set()
        self._open: list[int] = []
        self._mode = mode
        self._handles = []
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._open.append(self._mode.get_total_flops())

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not self._open:  # another hook has failed before ours
            return
        before = self._open.pop()
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        self._called.add(module)
        if not tensors or any(value.numel() for value in tensors):  # an expert that gets no row has nothing to count
            self._counted[module] += self._mode.get_total_flops() - before

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def warn(self) -> None:
        silent = [module for module, count in self._counted.items() if count == 0 and self._holds_matrix(module)]
        if silent:
            named = ((self._names[module] or "the module itself", type(module).__name__) for module in silent)
            names = ", ".join(f"{name} ({kind})" for name, kind in named)
            warnings.warn(
                f"0 FLOPs were counted in {names}, though they hold matrices: if they multiply, the count is too low. "
                "Write their products with operations of torch, or give moeapps.training.flops a formula",
                stacklevel=4,
            )

    def _holds_matrix(self, module: nn.Module) -> bool:
        """Whether a module has matrices itself or in parts that were not called; those of called parts are theirs."""
        if isinstance(module, _WITHOUT_PRODUCTS):
            return False
        own = any(sum(size > 1 for size in p.shape) > 1 for p in module.parameters(recurse=False))
        return own or any(self._holds_matrix(part) for part in module.children() if part not in self._called)


def formulas() -> dict[Any, Formula]:
    """Return operation -> formula, for the ``custom_mapping`` of torch's counter."""
    aten, own = torch.ops.aten, torch.ops.moeapps
    found: dict[str, Formula] = {
        "_grouped_mm": _by_shape(_grouped_mm),
        "mm": _raw(_product),
        "addmm": _raw(lambda bias, a, b, *rest, **options: _product(a, b)),
        "addmm_": _raw(lambda bias, a, b, *rest, **options: _product(a, b)),
        "_sparse_mm": _raw(_product),
        "_sparse_addmm": _raw(lambda bias, a, b, *rest, **options: _product(a, b)),
        "mv": _by_shape(lambda a, b: 2 * math.prod(a)),
        "addmv": _by_shape(lambda bias, a, b: 2 * math.prod(a)),
        "dot": _by_shape(lambda a, b: 2 * math.prod(a)),
        "vdot": _by_shape(lambda a, b: 2 * math.prod(a)),
        "addbmm": _by_shape(lambda bias, a, b: 2 * math.prod(a) * b[-1]),
        "_trilinear": _raw(_trilinear),
        "_cdist_forward": _by_shape(_cdist),
        "_euclidean_dist": _by_shape(_cdist),
        "mkldnn_rnn_layer": _raw(_mkldnn_rnn),
        "mkldnn_rnn_layer_backward": _raw(lambda *values, **options: 2 * _mkldnn_rnn(*values)),
        "_cudnn_rnn": _raw(_cudnn_rnn),
        "_cudnn_rnn_backward": _raw(lambda *values, **options: 2 * _cudnn_rnn(*values)),
    }
    for kernel in _FUSED_ATTENTION:
        found[kernel] = _by_shape(_attention)
        found[f"{kernel}_backward"] = _by_shape(lambda grad, q, k, v: 2 * _attention(q, k, v))
    table = {getattr(aten, name): formula for name, formula in found.items() if hasattr(aten, name)}
    for name, formula in (("segments", _segments), ("segments_backward", _segments_backward)):
        if hasattr(own, name):  # defined with the backend, at its first import
            table[getattr(own, name)] = _raw(formula)
    return table


_FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def _raw(formula: Formula) -> Formula:
    """A formula that reads the tensors themselves."""

    def call(*values: Any, out_val: Any = None, **options: Any) -> int:
        return formula(*values, **options)

    call._get_raw = True  # type: ignore[attr-defined]
    return call


def _by_shape(formula: Formula) -> Formula:
    """A formula of the shapes of the first tensors of a call, as many as it names."""
    count = formula.__code__.co_argcount

    def call(*values: Any, out_val: Any = None, **options: Any) -> int:
        return formula(*(value.shape for value in values[:count]))

    call._get_raw = True  # type: ignore[attr-defined]
    return call


def _grouped_mm(a: torch.Size, b: torch.Size) -> int:
    """Rows sorted by group (M, K) times (G, K, N): every row meets one matrix; (M, K) times (K, N) for gradients."""
    if len(a) == 3 and len(b) == 3:
        return 2 * math.prod(a) * b[-1]
    return 2 * a[-2] * a[-1] * b[-1]


def _product(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> int:
    """A matrix product; of a sparse matrix what is stored counts."""
    if a.layout is not torch.strided:
        return int(2 * a._nnz() * b.shape[-1])
    if b.layout is not torch.strided:
        return int(2 * b._nnz() * a.shape[-2])
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand_a: Sequence[int],
    expand_b: Sequence[int],
    expand_c: Sequence[int],
    *rest: Any,
    **options: Any,
) -> int:
    """Products of three tensors, summed: a bilinear map of R rows is ``2 R I J O`` (its first product is shared)."""
    shapes = []
    for tensor, dims in ((a, expand_a), (b, expand_b), (c, expand_c)):
        shape = list(tensor.shape)
        for dim in sorted(dims):
            shape.insert(dim, 1)
        shapes.append(shape)
    return int(2 * math.prod(max(sizes) for sizes in zip(*shapes, strict=True)))


def _cdist(a: torch.Size, b: torch.Size) -> int:
    """Distances of all pairs, as the one product they need."""
    return 2 * math.prod(a) * b[-2]


def _attention(q: torch.Size, k: torch.Size, v: torch.Size) -> int:
    """Scores and weighted sum over all pairs, masked or not."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _mkldnn_rnn(x: Tensor, w_input: Tensor, w_hidden: Tensor, *rest: Any, **options: Any) -> int:
    rows = x.numel() // x.shape[-1]
    return 2 * rows * (w_input.numel() + w_hidden.numel())


def _cudnn_rnn(x: Tensor, weights: Sequence[Tensor], *rest: Any, **options: Any) -> int:
    rows = x.numel() // x.shape[-1]
    return 2 * rows * sum(weight.numel() for weight in weights if weight.dim() > 1)


def _segments(x: Tensor, weight: Tensor, row: Tensor, expert: Tensor, *rest: Any, **options: Any) -> int:
    """``moeapps::segments``: both layers of the chosen expert for every assignment that is no sentinel."""
    w_in, w_out = rest[3], rest[5]
    real = int((expert < w_in.shape[0]).sum())
    return int(2 * real * (w_in[0].numel() + w_out[0].numel()))


def _segments_backward(grad: Tensor, h: Tensor, *rest: Any, **options: Any) -> int:
    """Gradients of the hidden layer, and of rows and of both weights where they are asked for."""
    expert, w_in, w_out, needs = rest[3], rest[7], rest[9], rest[14]
    real = int((expert < w_in.shape[0]).sum())
    wide, narrow = w_in[0].numel(), w_out[0].numel()
    return int(2 * real * (narrow + narrow * needs[4] + wide * needs[0] + wide * needs[2]))
