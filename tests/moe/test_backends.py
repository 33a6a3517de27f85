# SPDX-License-Identifier: Apache-2.0
"""Every backend computes the same function: outputs and all gradients against a naive loop over assignments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeapps.moe.activation import ActivationName
from moeapps.moe.backends import Backend, choose_backend, run, sort_assignments
from moeapps.moe.backends.dense import is_dense
from moeapps.moe.backends.segments import segments
from moeapps.moe.experts import Experts, GLUExperts, MLPExperts
from moeapps.moe.module_experts import ModuleExperts
from moeapps.moe.routing import Routing

N, D, F, E, K = 11, 8, 16, 5, 2
WeightAt = Literal["output", "input"]


def random_routing(
    num_rows: int = N, num_experts: int = E, top_k: int = K, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> Routing:
    expert_M = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_rows)] or [torch.zeros(0).long()])
    row_M = torch.arange(num_rows).repeat_interleave(top_k)
    weight_M = torch.rand(num_rows * top_k, dtype=dtype, requires_grad=True)
    return Routing(row_M, expert_M.flatten(), weight_M, num_rows, num_experts, top_k=top_k, **kwargs)


def with_experts(expert_M: Tensor, dtype: torch.dtype, num_rows: int = N, **kwargs: Any) -> Routing:
    per_row = expert_M.numel() // max(num_rows, 1)
    row_M = torch.arange(num_rows).repeat_interleave(per_row)
    weight_M = torch.rand(expert_M.numel(), dtype=dtype, requires_grad=True)
    return Routing(row_M, expert_M, weight_M, num_rows, E, **kwargs)


def sentinels(dtype: torch.dtype) -> Routing:
    expert_M = torch.randint(0, E + 1, (N * 3,))
    return with_experts(expert_M, dtype, top_k=3)


def elsewhere(dtype: torch.dtype) -> Routing:
    """Targets that repeat, rows that are read several times or never, sentinels in between."""
    M = 20
    weight_M = torch.rand(M, dtype=dtype, requires_grad=True)
    return Routing(
        torch.randint(0, N, (M,)),
        torch.randint(0, E + 1, (M,)),
        weight_M,
        N,
        E,
        target_M=torch.randint(0, 7, (M,)),
        num_targets=7,
    )


ROUTINGS: dict[str, Callable[[torch.dtype], Routing]] = {
    "top_k": lambda dtype: random_routing(dtype=dtype),
    "sentinels": sentinels,
    "all_sentinels": lambda dtype: with_experts(torch.full((N,), E), dtype, top_k=1),
    "all_on_one": lambda dtype: with_experts(torch.full((N,), 3), dtype, top_k=1),
    "empty_experts": lambda dtype: with_experts(torch.randint(1, 3, (N * 2,)), dtype, top_k=2),
    "same_expert_twice": lambda dtype: with_experts(torch.ones(N * 2).long(), dtype, top_k=2),
    "elsewhere": elsewhere,
    "no_rows": lambda dtype: random_routing(0, dtype=dtype),
    "one_row": lambda dtype: random_routing(1, dtype=dtype),
    "every_expert": lambda dtype: random_routing(top_k=E, dtype=dtype),
}

BANKS: dict[str, Callable[[], Experts]] = {
    "mlp": lambda: MLPExperts(E, D, F, activation="silu", bias=False),
    "mlp_bias": lambda: MLPExperts(E, D, F, activation="gelu", out_dim=4),
    "reglu": lambda: GLUExperts(E, D, F, activation="relu"),
    "swiglu_bias": lambda: GLUExperts(E, D, F, activation="silu", bias=True, out_dim=12),
}


def naive(experts: Experts, x_ND: Tensor, routing: Routing, weight_at: WeightAt) -> Tensor:
    """One assignment at a time, straight from the definition."""
    ffn = experts.feed_forward()
    assert ffn is not None
    rows = [x_ND.new_zeros(experts.out_dim)] * routing.num_outputs
    for row, e, w, target in zip(
        routing.row_M.tolist(), routing.expert_M.tolist(), routing.weight_M, routing.output_M.tolist(), strict=True
    ):
        if e == E:
            continue
        h = (x_ND[row] * w if weight_at == "input" else x_ND[row]) @ ffn.w_in[e]
        h = h if ffn.b_in is None else h + ffn.b_in[e]
        a = ffn.activation.function(h[:F]) * h[F:] if ffn.gated else ffn.activation.function(h)
        y = a @ ffn.w_out[e]
        y = y if ffn.b_out is None else y + ffn.b_out[e]
        rows[target] = rows[target] + (y if weight_at == "input" else y * w)
    connected = [x_ND, routing.weight_M, *experts.parameters()]
    zero = sum((0 * t.sum() for t in connected), start=x_ND.new_zeros(()))
    return (torch.stack(rows) if rows else x_ND.new_zeros(0, experts.out_dim)) + zero


def value_and_gradients(
    compute: Callable[[Experts, Tensor, Routing], Tensor], experts: Experts, x_ND: Tensor, routing: Routing
) -> tuple[Tensor, ...]:
    y = compute(experts, x_ND, routing)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    inputs = [x_ND, routing.weight_M, *experts.parameters()]
    return y.detach(), *torch.autograd.grad(y, inputs, cotangent)


def by_backend(backend: Backend, weight_at: WeightAt) -> Callable[[Experts, Tensor, Routing], Tensor]:
    return lambda experts, x, routing: run(experts, x, sort_assignments(routing), backend=backend, weight_at=weight_at)


def case(bank: str, routing: str, dtype: torch.dtype) -> tuple[Any, Tensor, Routing]:
    experts = BANKS[bank]().to(dtype)
    made = ROUTINGS[routing](dtype)
    return experts, torch.randn(made.num_rows, D, dtype=dtype, requires_grad=True), made


@pytest.mark.parametrize("weight_at", ["output", "input"])
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("backend", ["loop", "segments", "grouped_mm", "onehot"])
def test_backend_equals_the_naive_sum(backend: Backend, routing: str, bank: str, weight_at: WeightAt) -> None:
    dtype = torch.float32 if backend == "grouped_mm" else torch.float64
    experts, x_ND, made = case(bank, routing, dtype)

    expected = value_and_gradients(lambda e, x, r: naive(e, x, r, weight_at), experts, x_ND, made)
    actual = value_and_gradients(by_backend(backend, weight_at), experts, x_ND, made)

    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Calls(TorchDispatchMode):
    """Records what the dispatcher runs: name, arguments and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.overloadpacket.__name__, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def count(self, *names: str) -> int:
        return sum(name in names for name, _, _ in self.calls)


@pytest.mark.parametrize("weight_at", ["output", "input"])
@pytest.mark.parametrize("bank", BANKS)
def test_segments_derivatives_are_right_to_second_order(bank: str, weight_at: WeightAt) -> None:
    torch.manual_seed(1)
    x_ND = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    small: dict[str, Callable[[], Experts]] = {
        "mlp": lambda: MLPExperts(3, 2, 3, activation="silu", bias=False),
        "mlp_bias": lambda: MLPExperts(3, 2, 3, activation="gelu", out_dim=1),
        "reglu": lambda: GLUExperts(3, 2, 3, activation="tanh"),
        "swiglu_bias": lambda: GLUExperts(3, 2, 3, bias=True, out_dim=1),
    }
    experts: Any = small[bank]().double()
    routing = random_routing(3, 3, 2)
    names, parameters = zip(*experts.named_parameters(), strict=True)

    def compute(x: Tensor, weight: Tensor, *values: Tensor) -> Tensor:
        plan = sort_assignments(replace(routing, weight_M=weight))
        ffn = replace(experts.feed_forward(), **dict(zip(names, values, strict=True)))
        return segments(ffn, x, plan, at_input=weight_at == "input")

    inputs = (x_ND, routing.weight_M, *parameters)
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs)


@pytest.mark.parametrize("backend", ["loop", "segments", "grouped_mm"])
def test_gradient_of_an_unchosen_expert_is_exactly_zero(backend: Backend) -> None:
    experts, x_ND, routing = case("mlp_bias", "empty_experts", torch.float32)

    run(experts, x_ND, sort_assignments(routing), backend=backend).square().sum().backward()

    for parameter in experts.parameters():
        assert not parameter.grad[[0, 3, 4]].any()
        assert parameter.grad[[1, 2]].any()


@pytest.mark.parametrize("backend", ["loop", "segments", "grouped_mm"])
def test_permuting_the_rows_permutes_the_output(backend: Backend) -> None:
    experts, x_ND, routing = case("swiglu_bias", "top_k", torch.float32)
    order_N = torch.randperm(N)
    permuted = Routing(
        routing.row_M,
        routing.expert_M.view(N, K)[order_N].flatten(),
        routing.weight_M.view(N, K)[order_N].flatten(),
        N,
        E,
        top_k=K,
    )

    y = run(experts, x_ND, sort_assignments(routing), backend=backend)
    y_permuted = run(experts, x_ND[order_N], sort_assignments(permuted), backend=backend)

    torch.testing.assert_close(y_permuted, y[order_N], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["loop", "segments", "grouped_mm"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_sentinels_are_dropped_before_any_row_is_gathered(backend: Backend, top_k: int | None) -> None:
    experts, x_ND, routing = case("mlp", "sentinels", torch.float32)
    routing = replace(routing, top_k=top_k)
    real = int((routing.expert_M < E).sum())

    with Calls() as calls:
        run(experts, x_ND, sort_assignments(routing), backend=backend).sum().backward()

    gathered = [args[2].numel() for name, args, _ in calls.calls if name == "index_select" and args[0].dim() == 2]
    assert sum(gathered) in (real, 2 * real, 3 * real)  # forward, and x and g again where backward gathers too
    rows = [args[0].shape[0] for name, args, _ in calls.calls if name in ("mm", "_grouped_mm")]
    assert max(rows) <= max(real, D, F)


@pytest.mark.parametrize(("num_experts", "dtype"), [(4, torch.uint8), (255, torch.uint8), (256, torch.int16)])
def test_sort_keys_are_the_smallest_integers_and_the_sort_is_stable(num_experts: int, dtype: torch.dtype) -> None:
    expert_M = torch.randint(0, num_experts + 1, (600,))
    routing = Routing(torch.arange(600), expert_M, torch.rand(600), 600, num_experts)

    with Calls() as calls:
        plan = sort_assignments(routing)

    keys = [args[0].dtype for name, args, _ in calls.calls if name == "sort"]
    assert keys == [dtype]
    ids = expert_M.tolist()
    assert plan.row_M.tolist() == [m for _, m in sorted((e, m) for m, e in enumerate(ids) if e < num_experts)]
    assert plan.counts == routing.counts().tolist()


def test_plan_knows_the_inverse_order_only_where_every_row_gets_all_its_outputs_back() -> None:
    full, holes = random_routing(), sentinels(torch.float64)
    plan = sort_assignments(full)

    assert plan.inverse_NK is not None
    assert torch.equal(plan.row_M[plan.inverse_NK], torch.arange(N)[:, None].expand(N, K))
    assert sort_assignments(holes).inverse_NK is None
    assert sort_assignments(elsewhere(torch.float64)).inverse_NK is None


@pytest.mark.parametrize(
    ("frozen", "fixed_x", "products"),
    [
        ((), False, 6),
        (("w_in", "w_out"), False, 4),  # two of backward's four products are gradients of weights
        ((), True, 5),
        (("w_out",), False, 5),
        (("w_in",), True, 4),  # the weight's gradient still needs <da, a>
    ],
)
def test_segments_skips_products_nobody_asked_for(frozen: tuple[str, ...], fixed_x: bool, products: int) -> None:
    experts, x_ND, routing = case("mlp", "all_on_one", torch.float32)
    for name in frozen:
        experts.get_parameter(name).requires_grad_(False)

    with Calls() as calls:
        x_ND = x_ND.detach() if fixed_x else x_ND
        run(experts, x_ND, sort_assignments(routing), backend="segments").sum().backward()

    assert calls.count("mm", "addmm") == products
    assert all((p.grad is None) == (name in frozen) for name, p in experts.named_parameters())


@pytest.mark.parametrize("backend", ["segments", "loop"])
def test_experts_without_rows_cost_no_product(backend: Backend) -> None:
    experts, x_ND, routing = case("mlp", "empty_experts", torch.float32)
    busy = int((routing.counts() > 0).sum())

    with Calls() as calls:
        run(experts, x_ND, sort_assignments(routing), backend=backend).sum().backward()

    assert 0 < busy < E
    assert calls.count("mm", "addmm") == 6 * busy


@pytest.mark.parametrize("activation", [*get_args(ActivationName), nn.Softplus()])
@pytest.mark.parametrize("bank", [MLPExperts, GLUExperts])
@pytest.mark.parametrize("weight_at", ["output", "input"])
def test_segments_gives_the_same_when_it_overwrites_what_nobody_keeps(
    bank: type[Any], activation: Any, weight_at: WeightAt
) -> None:
    experts, x_ND = bank(E, D, F, activation=activation).double(), torch.randn(N, D, dtype=torch.float64)
    routing = random_routing(dtype=torch.float64)

    with torch.no_grad():
        found = run(experts, x_ND, sort_assignments(routing), backend="segments", weight_at=weight_at)

    torch.testing.assert_close(found, naive(experts, x_ND, routing, weight_at))


def test_segments_stores_nothing_when_gradients_are_off() -> None:
    experts, x_ND, routing = case("mlp", "top_k", torch.float32)

    with torch.no_grad(), Calls() as calls:
        run(experts, x_ND, sort_assignments(routing), backend="segments")

    assert calls.count("mm", "addmm") == 2 * sum(c > 0 for c in routing.counts())


@pytest.mark.parametrize("activation", [*get_args(ActivationName), nn.Softplus()])
@pytest.mark.parametrize("bank", [MLPExperts, GLUExperts])
def test_every_activation_has_the_right_derivative(bank: type[Any], activation: Any) -> None:
    experts = bank(E, D, F, activation=activation).double()
    x_ND = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    routing = random_routing()

    fast = value_and_gradients(by_backend("segments", "output"), experts, x_ND, routing)
    reference = value_and_gradients(by_backend("loop", "output"), experts, x_ND, routing)

    torch.testing.assert_close(fast, reference, rtol=1e-10, atol=1e-12)


def test_segments_in_many_chunks_equals_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeapps.moe.backends.chunks.MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr("moeapps.moe.backends.chunks.CHUNK_ELEMENTS", 4)
    for bank in BANKS:
        experts, x_ND, routing = case(bank, "sentinels", torch.float64)
        fast = value_and_gradients(by_backend("segments", "output"), experts, x_ND, routing)
        reference = value_and_gradients(by_backend("loop", "output"), experts, x_ND, routing)
        torch.testing.assert_close(fast, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "loop", "segments", "grouped_mm"])
@pytest.mark.parametrize("bank", BANKS)
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters_dtype(
    bank: str, backend: Backend
) -> None:
    experts, x_ND, routing = case(bank, "top_k", torch.float32)
    if backend == "grouped_mm" and experts.out_dim % 8:  # bfloat16 needs multiples of 8
        experts = GLUExperts(E, D, F, bias=True, out_dim=16)

    with torch.autocast("cpu", torch.bfloat16):
        y = run(experts, x_ND, sort_assignments(routing), backend=backend)
    y.float().square().sum().backward()

    reference = run(experts, x_ND, sort_assignments(routing), backend="loop")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference, rtol=0.05, atol=0.05)
    assert {p.grad.dtype for p in [x_ND, *experts.parameters()] if p.grad is not None} == {torch.float32}


def test_double_backward_through_auto_equals_the_loop() -> None:
    experts = MLPExperts(E, D, F).requires_grad_()
    x_ND = torch.randn(N, D, requires_grad=True)
    routing = random_routing(dtype=torch.float32)

    def penalty(backend: Backend) -> tuple[Tensor, ...]:
        y = run(experts, x_ND, sort_assignments(routing), backend=backend)
        (slope,) = torch.autograd.grad(y.square().sum(), x_ND, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x_ND, routing.weight_M, *experts.parameters()][:-1])

    reference = penalty("loop")
    for backend in ("auto", "segments", "grouped_mm"):
        torch.testing.assert_close(penalty(backend), reference, rtol=1e-4, atol=1e-5)


def test_auto_runs_under_torch_func_and_forward_mode() -> None:
    experts = MLPExperts(E, D, F)
    routing = random_routing(dtype=torch.float32)
    x_ND, t_ND = torch.randn(N, D), torch.randn(N, D)

    def compute(x: Tensor) -> Tensor:
        return run(experts, x, sort_assignments(routing))

    y, jvp = torch.func.jvp(compute, (x_ND,), (t_ND,))[:2]
    gradient = torch.func.grad(lambda x: compute(x).square().sum())(x_ND)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x_ND, t_ND)
        tangent = torch.autograd.forward_ad.unpack_dual(compute(dual)).tangent

    torch.testing.assert_close(tangent, jvp)
    (expected,) = torch.autograd.grad(compute(x_ND.requires_grad_()).square().sum(), x_ND)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, compute(x_ND), rtol=1e-4, atol=1e-5)


def choice(experts: Experts, num_rows: int, top_k: int, dtype: torch.dtype = torch.float32) -> str:
    routing = random_routing(num_rows, experts.num_experts, top_k, dtype)
    x_ND = torch.zeros(num_rows, experts.in_dim, dtype=dtype)
    return choose_backend(experts.to(dtype).feed_forward(), x_ND, sort_assignments(routing))


def test_auto_follows_its_table() -> None:
    assert choice(MLPExperts(4, 64, 256), 4096, 2) == "segments"
    assert choice(MLPExperts(4, 64, 256), 1024, 2) == "grouped_mm"
    assert choice(MLPExperts(64, 128, 1024), 64, 2) == "segments"  # 32 MiB of gradient in fresh pages
    assert choice(MLPExperts(4, 33, 65), 64, 2) == "segments"  # strides that are no multiple of 16 bytes
    assert choice(MLPExperts(1, 64, 256), 2048, 1) == "dense"
    assert choice(MLPExperts(4, 64, 256), 64, 4) == "dense"
    assert choice(MLPExperts(4, 64, 256), 2048, 4) == "segments"
    torch.set_num_threads(2)
    assert choice(MLPExperts(4, 64, 256), 1024, 2) == "segments"
    torch.set_num_threads(1)
    assert choice(MLPExperts(4, 64, 256), 2048, 2, torch.float64) == "loop"
    assert choice(MLPExperts(4, 64, 256, activation=nn.PReLU()), 64, 2) == "grouped_mm"
    assert choice(MLPExperts(4, 33, 65, activation=nn.Dropout(0.5)), 64, 2) == "loop"
    assert choice(ModuleExperts([nn.Linear(4, 4), nn.Linear(4, 4)]), 64, 1) == "loop"


def test_equal_counts_alone_are_not_taken_for_every_expert() -> None:
    expert_M = torch.tensor([0, 0, 1, 1])  # two rows, two experts, two each; but no row goes to both
    routing = Routing(torch.tensor([0, 0, 1, 1]), expert_M, torch.rand(4), 2, 2, top_k=2)
    experts = MLPExperts(2, 8, 16)
    x_ND = torch.randn(2, 8)

    assert not is_dense(sort_assignments(routing))
    torch.testing.assert_close(
        run(experts, x_ND, sort_assignments(routing)), run(experts, x_ND, sort_assignments(routing), backend="loop")
    )


def test_side_inputs_reach_the_modules_with_their_rows() -> None:
    class Shift(nn.Module):
        def __init__(self, sign: float) -> None:
            super().__init__()
            self.sign = nn.Parameter(torch.tensor(sign))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return x + self.sign * time

    experts = ModuleExperts([Shift(1.0), Shift(-1.0)], in_dim=3, out_dim=3)
    x_ND, time_N1 = torch.randn(4, 3), torch.randn(4, 1)
    expert_N = torch.tensor([1, 0, 1, 1])
    plan = sort_assignments(Routing(torch.arange(4), expert_N, torch.ones(4), 4, 2, top_k=1))

    for backend in ("auto", "loop", "onehot"):
        y = run(experts, x_ND, plan, side=(time_N1,), backend=backend)
        torch.testing.assert_close(y, x_ND + (1 - 2 * expert_N[:, None]) * time_N1)


def test_errors_say_what_to_do() -> None:
    experts, x_ND, routing = case("mlp", "top_k", torch.float32)
    plan = sort_assignments(routing)

    with pytest.raises(ValueError, match="rows, but the routing was made for 11"):
        run(experts, x_ND[:-1], plan)
    with pytest.raises(ValueError, match="the bank has 3 experts, but the routing names 5"):
        run(experts.select([0, 1, 2]), x_ND, plan)
    with pytest.raises(ValueError, match="use one of auto, loop"):
        run(experts, x_ND, plan, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use 'output' or 'input'"):
        run(experts, x_ND, plan, weight_at="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, not torch\.float64"):
        run(experts.double(), x_ND.double(), plan, backend="grouped_mm")
    with pytest.raises(ValueError, match="multiples of 4"):
        run(MLPExperts(E, D, 7), x_ND, plan, backend="grouped_mm")
    with pytest.raises(ValueError, match="not a stacked two-layer network"):
        run(ModuleExperts([nn.Linear(D, D) for _ in range(E)]), x_ND, plan, backend="segments")
    with pytest.raises(ValueError, match="computes it twice"):
        run(MLPExperts(E, D, F, activation=nn.PReLU()), x_ND, plan, backend="segments")
    with pytest.raises(ValueError, match=r"convert one of them, or use torch\.autocast"):
        run(MLPExperts(E, D, F), x_ND.bfloat16(), plan)
    with pytest.raises(ValueError, match="names expert 9, but there are 5 experts"):
        sort_assignments(replace(routing, expert_M=torch.full_like(routing.expert_M, 9)))
