# SPDX-License-Identifier: Apache-2.0
"""No backend works for nothing: what is sorted, gathered, multiplied and stored, and which backend auto picks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeapps.moe.backends import Backend, apply, choose_backend, run, sort_assignments, table
from moeapps.moe.backends.dense import is_dense
from moeapps.moe.experts import Experts, GLUExperts, MLPExperts
from moeapps.moe.module_experts import ModuleExperts
from moeapps.moe.routing import Routing
from tests.moe.backends_common import D, E, F, K, N, case, elsewhere, random_routing, sentinels


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
    assert calls.count("mm", "addmm", "addmm_") == 6 * busy


def test_segments_stores_nothing_when_gradients_are_off() -> None:
    experts, x_ND, routing = case("mlp", "top_k", torch.float32)

    with torch.no_grad(), Calls() as calls:
        run(experts, x_ND, sort_assignments(routing), backend="segments")

    assert calls.count("mm", "addmm") == 2 * sum(c > 0 for c in routing.counts())


def choice(experts: Experts, num_rows: int, top_k: int, dtype: torch.dtype = torch.float32) -> str:
    routing = random_routing(num_rows, experts.num_experts, top_k, dtype)
    x_ND = torch.zeros(num_rows, experts.in_dim, dtype=dtype)
    return choose_backend(experts.to(dtype).feed_forward(), x_ND, sort_assignments(routing))


@pytest.fixture
def _known_table(monkeypatch: pytest.MonkeyPatch) -> None:
    known = table.Table((64, 512, 2048), (16, 128), ("gg", "gg", "ss"))
    monkeypatch.setattr(table, "table_of", lambda *_: known)


@pytest.mark.usefixtures("_known_table")
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


@pytest.mark.parametrize("capability", ["AMX", "AVX512", "AVX2", "DEFAULT", "of a processor to come"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_committed_table_has_an_answer_for_every_place_on_every_processor(
    capability: str, dtype: torch.dtype
) -> None:
    known = table.table_of(capability, dtype)

    found = {known.choice(rows=r, width=w) for r in (0.0, 1.0, 7.5, 300.0, 1e9) for w in (1.0, 45.0, 1e6)}

    assert found <= {"segments", "grouped_mm"}
    places = list(itertools.product(enumerate(known.rows), enumerate(known.widths)))
    words = [known.choices[i][j] for (i, _), (j, _) in places]
    assert [known.choice(rows=r, width=w)[0] for (_, r), (_, w) in places] == words


def test_a_place_between_two_has_the_answer_of_the_nearer_by_ratio() -> None:
    known = table.Table((16, 256), (32, 128), ("gg", "gs"))

    assert known.choice(rows=63, width=128) == "grouped_mm"  # 64 is as many times 16 as 256 is times 64
    assert known.choice(rows=65, width=128) == "segments"
    assert known.choice(rows=256, width=63) == "grouped_mm"


@pytest.mark.parametrize(
    ("rows", "widths", "choices"),
    [((), (16,), ()), ((16, 4), (16,), ("g", "g")), ((4, 16), (16,), ("g",)), ((4,), (16, 32), ("gx",))],
)
def test_a_table_with_holes_is_refused(
    rows: tuple[int, ...], widths: tuple[int, ...], choices: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"backend_table writes the table anew"):
        table.Table(rows, widths, choices)


@pytest.mark.parametrize("kind", ["mlp", "glu", "bias"])
@pytest.mark.parametrize("at", ["output", "input"])
def test_a_handful_of_rows_without_gradients_gives_what_the_plan_gives_and_makes_none(kind: str, at: Any) -> None:
    experts = {"mlp": MLPExperts(5, 8, 16), "glu": GLUExperts(5, 8, 16), "bias": MLPExperts(5, 8, 16, bias=True)}[kind]
    x_ND = torch.randn(3, 8)
    expert_M = torch.tensor([4, 5, 1, 1, 5, 5])  # 5 is the sentinel; the last row has no expert
    routing = Routing(torch.arange(6) // 2, expert_M, torch.rand(6), 3, 5, top_k=2)

    with torch.no_grad(), Calls() as calls:
        few = apply(experts, x_ND, routing, weight_at=at)
    planned = run(experts, x_ND, sort_assignments(routing), backend="loop", weight_at=at)

    torch.testing.assert_close(few, planned)
    assert torch.equal(few[2], torch.zeros(8))
    assert calls.count("sort", "index_add", "index_select") == 0
    assert calls.count("mm", "addmm", "addmm_") == 6


def test_a_handful_of_rows_to_an_expert_that_is_not_there_is_refused() -> None:
    routing = Routing(torch.tensor([0]), torch.tensor([7]), torch.ones(1), 1, 5, top_k=1)

    with torch.no_grad(), pytest.raises(ValueError, match="names expert 7"):
        apply(MLPExperts(5, 8, 16), torch.randn(1, 8), routing)
