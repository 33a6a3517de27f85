# SPDX-License-Identifier: Apache-2.0
"""Experts shared out among threads: same bits as on one, every expert once, errors and thread counts come back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeapps.moe.backends import run, sort_assignments
from moeapps.moe.experts import Experts, GLUExperts, MLPExperts
from moeapps.moe.fast import segments as segments_module
from moeapps.moe.fast.threads import expert_shares, run_shares
from moeapps.moe.routing import Routing


@pytest.fixture
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("counts", [[100] * 8, [0, 300, 0, 0, 310, 0], [500, 3, 3, 500], [64] * 7, [256, 256]])
@pytest.mark.parametrize("num_shares", [1, 2, 3])
def test_shares_cover_all_experts_once_in_order_and_are_even(counts: list[int], num_shares: int) -> None:
    shares = expert_shares(counts, num_shares)

    assert [e for share in shares for e in share] == list(range(len(counts)))
    assert len(shares) in (1, num_shares)
    if len(shares) > 1:
        assert max(sum(counts[e] for e in share) for share in shares) <= 1.25 * sum(counts) / num_shares


@pytest.mark.parametrize(
    ("counts", "num_shares", "expected"),
    [([100] * 8, 2, 2), ([1000, 10, 10], 2, 1), ([10] * 8, 2, 1), ([], 2, 1), ([0, 0], 2, 1), ([600, 600], 2, 2)],
)
def test_work_is_shared_only_where_it_is_large_and_even(counts: list[int], num_shares: int, expected: int) -> None:
    assert len(expert_shares(counts, num_shares)) == expected


def problem(bank: type[Any]) -> tuple[Experts, Tensor, Routing]:
    torch.manual_seed(0)
    experts = bank(6, 16, 32, bias=True)
    weight, expert = torch.randn(400, 6).softmax(-1).topk(2)
    row_M = torch.arange(400).repeat_interleave(2)
    routing = Routing(row_M, expert.flatten(), weight.flatten().requires_grad_(), 400, 6, top_k=2)
    return experts, torch.randn(400, 16, requires_grad=True), routing


def results(bank: type[Any]) -> list[Tensor]:
    experts, x_ND, routing = problem(bank)
    y = run(experts, x_ND, sort_assignments(routing), backend="segments")
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x_ND, routing.weight_M, *experts.parameters()])]


@pytest.mark.parametrize("bank", [MLPExperts, GLUExperts])
def test_two_threads_give_the_bits_of_one(bank: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = results(bank)
    seen: set[str] = set()
    activate = segments_module._activate

    def spy(*args: Any) -> None:
        seen.add(threading.current_thread().name)
        activate(*args)

    monkeypatch.setattr(segments_module, "_activate", spy)
    torch.set_num_threads(2)
    shared = results(bank)

    assert len(seen) == 2
    assert torch.get_num_threads() == 2
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.usefixtures("_two_threads")
def test_inference_mode_reaches_the_other_thread() -> None:
    experts, x_ND, routing = problem(MLPExperts)

    with torch.inference_mode():
        y = run(experts, x_ND, sort_assignments(routing), backend="segments")

    torch.testing.assert_close(y.clone(), run(experts, x_ND, sort_assignments(routing), backend="loop").detach())


@pytest.mark.usefixtures("_two_threads")
def test_a_dispatch_mode_sees_all_work() -> None:
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket.__name__ == "mm"
            return func(*args, **(kwargs or {}))

    experts = MLPExperts(6, 16, 32, bias=False)
    _, x_ND, routing = problem(MLPExperts)
    with torch.no_grad(), Products() as products:
        run(experts, x_ND, sort_assignments(routing), backend="segments")

    assert products.count == 12


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_any_thread_is_raised_after_all_have_finished(failing: int) -> None:
    finished: list[int] = []

    def work(share: range) -> None:
        if share.start == failing:
            raise ArithmeticError(f"share {share.start}")
        finished.append(share.start)

    with pytest.raises(ArithmeticError, match=f"share {failing}"):
        run_shares(work, [range(1), range(1, 2)])

    assert finished == [1 - failing]
    assert torch.get_num_threads() == 2
