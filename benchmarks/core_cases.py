# SPDX-License-Identifier: Apache-2.0
"""Work that the core benchmark measures, and how it is measured: paired, in alternating order, by CPU time.

Shape legend: N rows, E experts, K chosen per row, M = N K assignments, D width, F hidden width (4 D unless said).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeapps.moe.backends import Backend, run, sort_assignments
from moeapps.moe.experts import Experts, GLUExperts, MLPExperts
from moeapps.moe.normalised import NormalisedExperts
from moeapps.moe.routing import Routing
from tasks.dynamics.nets.experts import GEPSExperts

Mode = Literal["forward", "fwd+bwd", "saved"]
Spread = Literal["uniform", "zipf", "top_p"]

# name -> (bank class, activation, bias)
EXPERT_KINDS: dict[str, tuple[Any, str, bool]] = {
    "silu-mlp": (MLPExperts, "silu", False),
    "reglu": (GLUExperts, "relu", False),
    "swiglu": (GLUExperts, "silu", False),
    "gelu-mlp-bias": (MLPExperts, "gelu", True),
}
FIELDS, NORMALISED = "geps-fields", "normalised-every"
CONTEXT, FIELD_WIDTH = 16, 24  # of configs/mixer.yaml
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class Size:
    """Rows N, experts E, chosen per row K, width D, hidden width F (None: 4 D)."""

    n: int
    e: int
    k: int
    d: int = 256
    f: int | None = None

    @property
    def hidden(self) -> int:
        """F."""
        return 4 * self.d if self.f is None else self.f

    @property
    def rows_per_expert(self) -> int:
        """R = N K / E."""
        return self.n * self.k // self.e


class DenseNetwork(nn.Module):
    """The roof: one feed-forward network of ordinary linear layers with the active width of K experts."""

    def __init__(self, kind: str, dim: int, hidden_dim: int) -> None:
        super().__init__()
        bank, self.activation, bias = EXPERT_KINDS[kind]
        self.gated = bank is GLUExperts
        self.first = nn.Linear(dim, 2 * hidden_dim if self.gated else hidden_dim, bias=bias)
        self.second = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Apply the network to (N, D)."""
        h_NH = self.first(x_ND)
        if not self.gated:
            a_NF = _FUNCTIONS[self.activation](h_NH)
        else:
            gate_NF, up_NF = h_NH.chunk(2, dim=1)
            a_NF = _FUNCTIONS[self.activation](gate_NF) * up_NF
        return F.linear(a_NF, self.second.weight, self.second.bias)


def make_routing(size: Size, spread: Spread = "uniform", dtype: torch.dtype = torch.float32) -> Routing:
    """Draw a routing with weights that sum to 1 per row.

    ``uniform`` chooses K experts of equal chance; ``zipf`` with chance proportional to 1 / rank; ``top_p`` has between
    1 and 2 K - 1 real assignments per row, K on average, padded by sentinels to 4 K.
    """
    generator = torch.Generator().manual_seed(0)
    logits_NE = -torch.empty(size.n, size.e).exponential_(generator=generator).log()  # Gumbel noise
    if spread == "zipf":
        logits_NE -= torch.arange(1, size.e + 1).log()
    width = 4 * size.k if spread == "top_p" else size.k
    chosen = logits_NE.topk(min(width, size.e))
    expert_NK, width = chosen.indices, chosen.indices.shape[1]
    if spread == "top_p":
        real_N = torch.randint(1, 2 * size.k, (size.n, 1), generator=generator)
        expert_NK = expert_NK.where(torch.arange(width) < real_N, size.e)
    weight_M = chosen.values.softmax(-1).flatten().to(dtype).requires_grad_()
    row_M = torch.arange(size.n).repeat_interleave(width)
    return Routing(row_M, expert_NK.flatten(), weight_M, size.n, size.e, top_k=width)


def make_bank(size: Size, kind: str, dtype: torch.dtype = torch.float32) -> Experts:
    """A bank of E experts of hidden width F."""
    bank, activation, bias = EXPERT_KINDS[kind]
    experts: Experts = bank(size.e, size.d, size.hidden, activation=activation, bias=bias)
    return experts.to(dtype)


def moe_step(
    size: Size,
    kind: str,
    mode: Mode,
    backend: Backend,
    *,
    dtype: torch.dtype = torch.float32,
    spread: Spread = "uniform",
) -> Callable[[], object]:
    """One call of a bank under a given routing, sorting included; gradients of x, weights and all parameters."""
    torch.manual_seed(0)
    if kind == NORMALISED:
        return every_step(size, mode)
    if kind == FIELDS:
        return fields_step(size, mode, backend)
    experts, routing = make_bank(size, kind, dtype), make_routing(size, spread, dtype)
    x_ND = torch.randn(size.n, size.d, dtype=dtype, requires_grad=True)
    inputs = [x_ND, routing.weight_M, *experts.parameters()]
    return step(lambda: run(experts, x_ND, sort_assignments(routing), backend=backend), inputs, mode)


def dense_step(size: Size, kind: str, mode: Mode, *, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """One call of the dense roof of equal active FLOPs; gradients of x and all parameters."""
    torch.manual_seed(0)
    if kind == NORMALISED:
        return wide_step(size, mode)
    if kind == FIELDS:
        return fields_step(Size(size.n, 1, 1, size.d), mode, "auto")
    network = DenseNetwork(kind, size.d, size.k * size.hidden).to(dtype)
    x_ND = torch.randn(size.n, size.d, dtype=dtype, requires_grad=True)
    return step(lambda: network(x_ND), [x_ND, *network.parameters()], mode)


def every_step(size: Size, mode: Mode) -> Callable[[], object]:
    """Experts normalised over the batch (HoME): all of them on all rows; F is the output width."""
    bank, x_ND = NormalisedExperts(size.e, size.d, size.hidden), torch.randn(size.n, size.d, requires_grad=True)
    return step(lambda: bank.every(x_ND), [x_ND, *bank.parameters()], mode)


def wide_step(size: Size, mode: Mode) -> Callable[[], object]:
    """One dense layer with batch norm as wide as all experts of ``every_step`` together."""
    width = size.e * size.hidden
    net = nn.Sequential(nn.Linear(size.d, width, bias=False), nn.BatchNorm1d(width), nn.SiLU())
    x_ND = torch.randn(size.n, size.d, requires_grad=True)
    return step(lambda: net(x_ND), [x_ND, *net.parameters()], mode)


def fields_step(size: Size, mode: Mode, backend: Backend) -> Callable[[], object]:
    """Stacked vector fields (MixER), each row to one of E; of one expert it is the dense field of the same size."""
    piece = CONTEXT // 4
    bank = GEPSExperts(size.d, size.e, piece * size.e, width=FIELD_WIDTH, activation="silu")
    x_ND, context = torch.randn(size.n, size.d, requires_grad=True), torch.randn(size.n, piece * size.e)
    routing = make_routing(size)

    def compute() -> Tensor:
        if size.e == 1:
            return bank.every(x_ND, context)
        return run(bank, x_ND, sort_assignments(routing), side=(context,), backend=backend)

    return step(compute, [x_ND, *bank.parameters()], mode)


def padded_step(size: Size, kind: str, mode: Mode) -> Callable[[], object]:
    """Another way to compute the same: pad every expert to the fullest one, then two batched products."""
    torch.manual_seed(0)
    experts, routing = make_bank(size, kind), make_routing(size)
    ffn = experts.feed_forward()
    assert ffn is not None
    x_ND = torch.randn(size.n, size.d, requires_grad=True)

    def compute() -> Tensor:
        plan = sort_assignments(routing)
        most, expert_M = max(plan.counts), plan.expert_M()
        start_E = plan.counts_E().cumsum(0) - plan.counts_E()
        place_M = expert_M * most + torch.arange(plan.num_assignments) - start_E[expert_M]
        x_MD = x_ND.index_select(0, plan.row_M)
        x_ECD = x_MD.new_zeros(size.e * most, size.d).index_copy(0, place_M, x_MD).view(size.e, most, size.d)
        y_ECD = ffn.every(x_ECD).transpose(0, 1).flatten(0, 1)
        y_MD = y_ECD.index_select(0, place_M) * plan.weight_M.unsqueeze(1)
        return y_MD.new_zeros(size.n, size.d).index_add(0, plan.target_M, y_MD)

    return step(compute, [x_ND, routing.weight_M, *experts.parameters()], mode)


def products_step(size: Size, kind: str, mode: Mode, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """The matrix products of the experts alone, into memory that is there: what no dispatch can undercut."""
    torch.manual_seed(0)
    ffn = make_bank(size, kind, dtype).feed_forward()
    assert ffn is not None
    counts = make_routing(size).counts().tolist()
    num, wide, narrow = sum(counts), ffn.w_in.shape[2], ffn.w_out.shape[1]
    x_MD, h_MH, a_MF, y_MD = (torch.randn(num, width, dtype=dtype) for width in (size.d, wide, narrow, size.d))
    w_in, w_out = ffn.w_in.detach(), ffn.w_out.detach()
    dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)

    def work() -> None:
        start = 0
        for e, count in enumerate(counts):
            rows = slice(start, start + count)
            start += count
            torch.mm(x_MD[rows], w_in[e], out=h_MH[rows])
            torch.mm(a_MF[rows], w_out[e], out=y_MD[rows])
            if mode == "fwd+bwd":
                torch.mm(y_MD[rows], w_out[e].t(), out=a_MF[rows])
                torch.mm(a_MF[rows].t(), y_MD[rows], out=dw_out[e])
                torch.mm(h_MH[rows], w_in[e].t(), out=x_MD[rows])
                torch.mm(x_MD[rows].t(), h_MH[rows], out=dw_in[e])

    return work


def step(compute: Callable[[], Tensor], inputs: Sequence[Tensor], mode: Mode) -> Callable[[], object]:
    """Forward without gradients, or forward and the gradients of ``inputs`` in fresh memory."""

    def forward() -> object:
        with torch.no_grad():
            return compute()

    def forward_backward() -> object:
        y = compute()
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    return forward if mode == "forward" else forward_backward


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one call, the release of its result included."""
    start = clock()
    work()
    return clock() - start


def paired_ratios(
    candidate: Callable[[], object], reference: Callable[[], object], *, pairs: int, threads: int = 1
) -> list[float]:
    """Time of ``candidate`` over time of ``reference``, pair by pair, the order alternating.

    One thread is timed by its own CPU time, which other processes on the machine hardly touch; several threads by the
    wall clock, which they do. Short work is repeated until a sample takes about 20 ms.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    timed(candidate, clock), timed(reference, clock)
    repeats = max(1, min(20, int(0.02 / max(timed(reference, clock), 1e-6))))

    def sample(work: Callable[[], object]) -> float:
        return sum(timed(work, clock) for _ in range(repeats))

    ratios = []
    for pair in range(pairs):
        if pair % 2:
            top = sample(candidate)
            ratios.append(top / sample(reference))
        else:
            bottom = sample(reference)
            ratios.append(sample(candidate) / bottom)
    return ratios


def median_ms(work: Callable[[], object], *, samples: int) -> float:
    """Median CPU milliseconds of one call on this thread."""
    work()
    return 1e3 * statistics.median(timed(work, time.thread_time) for _ in range(samples))


def saved_bytes(compute: Callable[[], Tensor], known: Sequence[Tensor]) -> int:
    """Bytes of all distinct storages that a forward pass keeps for backward, without the ``known`` tensors."""
    excluded = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = compute()
    del y
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in excluded)
