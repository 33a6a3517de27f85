# SPDX-License-Identifier: Apache-2.0
"""What a backend keeps for backward and what its backward allocates, counted in bytes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeapps.moe.backends import Backend, run, sort_assignments
from moeapps.moe.experts import Experts, GLUExperts, MLPExperts
from moeapps.moe.fast import memory as memory_module
from moeapps.moe.fast.memory import empty, scratch
from moeapps.moe.routing import Routing


def top_k_routing(num_rows: int, num_experts: int, top_k: int) -> Routing:
    weight, expert = torch.randn(num_rows, num_experts).softmax(-1).topk(top_k)
    row_M = torch.arange(num_rows).repeat_interleave(top_k)
    return Routing(row_M, expert.flatten(), weight.flatten().requires_grad_(), num_rows, num_experts, top_k=top_k)


class Bytes(TorchDispatchMode):
    """Adds up the bytes of every fresh tensor that an operation returns, and notes the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if isinstance(result, Tensor) and returns[0].alias_info is None:  # neither a view nor written in place
            self.total += result.nbytes
            self.largest = max(self.largest, result.nbytes)
        return result


def saved_bytes(x_ND: Tensor, experts: Experts, routing: Routing, backend: Backend) -> int:
    """Bytes of all distinct storages kept for backward, without the input and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x_ND, *experts.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(experts, x_ND, sort_assignments(routing), backend=backend)
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in known)


def to_one_expert(num_rows: int) -> Routing:
    rows = torch.arange(num_rows)
    return Routing(rows, torch.zeros_like(rows), torch.ones(num_rows), num_rows, 1, top_k=1)


def dense_twin(experts: MLPExperts | GLUExperts, top_k: int) -> Experts:
    """One expert of the same active width."""
    arguments: dict[str, Any] = {"activation": experts.activation, "bias": experts.b_in is not None}
    return type(experts)(1, experts.in_dim, top_k * experts.hidden_dim, **arguments)


@pytest.mark.parametrize(("bank", "top_k"), [(MLPExperts, 1), (MLPExperts, 2), (GLUExperts, 2)])
def test_segments_keeps_at_most_six_tenths_of_what_a_dense_layer_keeps(bank: type[Any], top_k: int) -> None:
    num_rows, num_experts = 512, 8
    experts = bank(num_experts, 32, 128, activation="silu", bias=False)
    x_ND = torch.randn(num_rows, 32, requires_grad=True)
    routing = top_k_routing(num_rows, num_experts, top_k)

    ours = saved_bytes(x_ND, experts, routing, "segments")
    dense = saved_bytes(x_ND, dense_twin(experts, top_k), to_one_expert(num_rows), "auto")

    assert ours <= 0.6 * dense


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_other_backends_keep_at_most_half_more_than_a_dense_layer(backend: Backend) -> None:
    experts = MLPExperts(8, 32, 128, activation="silu", bias=False)
    x_ND = torch.randn(512, 32, requires_grad=True)

    ours = saved_bytes(x_ND, experts, top_k_routing(512, 8, 2), backend)
    dense = saved_bytes(x_ND, dense_twin(experts, 2), to_one_expert(512), "auto")

    assert ours <= 1.5 * dense


@pytest.mark.parametrize("backend", ["loop", "segments", "grouped_mm"])
def test_backward_allocates_linearly_in_the_number_of_experts(backend: Backend) -> None:
    """Indexing a stack in a loop allocates a gradient of the whole stack per expert: 16 times the bytes, not 4."""

    def backward_bytes(num_experts: int) -> int:
        experts = MLPExperts(num_experts, 16, 64)
        x_ND = torch.randn(64, 16, requires_grad=True)
        y = run(experts, x_ND, sort_assignments(top_k_routing(64, num_experts, 2)), backend=backend)
        with Bytes() as counter:
            torch.autograd.grad(y.sum(), [x_ND, *experts.parameters()])
        total: int = counter.total
        return total

    assert backward_bytes(128) <= 4.5 * backward_bytes(32)


@pytest.mark.parametrize("backend", ["loop", "segments", "grouped_mm"])
def test_no_tensor_is_as_large_as_rows_times_experts(backend: Backend) -> None:
    num_rows, num_experts, dim = 256, 64, 16
    experts = MLPExperts(num_experts, dim, 4)
    x_ND = torch.randn(num_rows, dim, requires_grad=True)
    routing = top_k_routing(num_rows, num_experts, 2)

    with Bytes() as counter:
        run(experts, x_ND, sort_assignments(routing), backend=backend).sum().backward()

    assert counter.largest < num_rows * num_experts * dim * 4 / 8


def test_large_buffers_are_plain_tensors_on_huge_pages_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(1, dtype=torch.float32)
    asked: list[tuple[int, int]] = []

    def advise(start: int, size: int, _: int) -> int:
        asked.append((start, size))
        return -1  # a kernel that refuses

    monkeypatch.setattr(memory_module, "_madvise", lambda: advise)
    small, large = empty(like, (4, 5)), empty(like, (9, 1 << 20))

    assert small.shape == (4, 5)
    assert large.shape == (9, 1 << 20)
    ((start, size),) = asked
    assert start % (2 << 20) == 0
    assert size % (2 << 20) == 0
    assert large.data_ptr() <= start
    assert start + size <= large.data_ptr() + large.nbytes
    assert empty(like.to("meta"), (9, 1 << 20)).is_meta
    monkeypatch.setattr(memory_module, "_madvise", lambda: None)
    assert empty(like, (9, 1 << 20)).fill_(1).sum() > 0


def test_rows_of_idle_experts_in_a_fresh_gradient_are_zero_whatever_the_memory_held() -> None:
    experts = MLPExperts(6, 8, 16)
    garbage = torch.full((6 * 8 * 16,), float("nan"))
    del garbage
    routing = Routing(torch.arange(5), torch.full((5,), 4), torch.ones(5), 5, 6, top_k=1)

    run(experts, torch.randn(5, 8), sort_assignments(routing), backend="segments").sum().backward()

    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[[0, 1, 2, 3, 5]].any()


def test_scratch_is_used_again_per_thread_use_and_dtype_and_grows() -> None:
    like = torch.zeros(1)
    first, second = scratch("test", like, [(3, 5), (2, 7)])
    first.fill_(1)
    second.fill_(2)

    assert first.eq(1).all()  # the two do not overlap
    assert scratch("test", like, [(3, 5)])[0].data_ptr() == first.data_ptr()
    assert scratch("other", like, [(3, 5)])[0].data_ptr() != first.data_ptr()
    assert scratch("test", like.double(), [(3, 5)])[0].dtype == torch.float64
    (larger,) = scratch("test", like, [(300, 500)])
    assert larger.shape == (300, 500)
    elsewhere: list[int] = []
    thread = threading.Thread(target=lambda: elsewhere.append(scratch("test", like, [(3, 5)])[0].data_ptr()))
    thread.start()
    thread.join()
    assert elsewhere[0] != larger.data_ptr()


def test_scratch_larger_than_its_bound_is_not_kept() -> None:
    like = torch.zeros(1)
    shape = (9 << 10, 1 << 10)

    kept, fresh = scratch("bound", like, [(4, 4)])[0], scratch("bound", like, [shape])[0]

    assert fresh.shape == shape
    assert scratch("bound", like, [(4, 4)])[0].data_ptr() == kept.data_ptr()


def test_scratch_of_inference_serves_training_later() -> None:
    experts = MLPExperts(4, 8, 16)
    x_ND, routing = torch.randn(6, 8), top_k_routing(6, 4, 2)

    with torch.inference_mode():
        first = run(experts, x_ND, sort_assignments(routing), backend="segments")
    trained = run(experts, x_ND, sort_assignments(routing), backend="segments")
    trained.sum().backward()
    with torch.inference_mode():
        again = run(experts, x_ND, sort_assignments(routing), backend="segments")

    torch.testing.assert_close(trained.detach(), first.clone())
    assert torch.equal(first, again)


def test_outputs_and_stored_tensors_do_not_live_in_scratch() -> None:
    """Two forward passes before two backward passes: nothing of the first may be overwritten by the second."""
    experts = GLUExperts(4, 8, 16, bias=True)
    routing = top_k_routing(6, 4, 2)
    inputs = [torch.randn(6, 8, requires_grad=True) for _ in range(2)]

    def gradients(backend: Backend) -> list[Tensor]:
        ys = [run(experts, x, sort_assignments(routing), backend=backend) for x in inputs]
        return [*ys, *torch.autograd.grad(ys[0].square().sum() + ys[1].square().sum(), [*inputs, experts.w_in])]

    torch.testing.assert_close(gradients("segments"), gradients("loop"), rtol=1e-4, atol=1e-5)
