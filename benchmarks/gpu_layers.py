# SPDX-License-Identifier: Apache-2.0
"""Checks of single layers for `benchmarks.gpu`: arithmetic, waiting, compilation, and other projects' kernels."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.core_cases import Size
from benchmarks.core_peers import mixtral
from benchmarks.gpu_device import Device, Report, learn, relative_error, too_far, verdict
from moeapps.moe import GLUExperts, LayerFactory, LinearScore, MoELayer, Router, TopK, combine, presets
from moeapps.moe.experts import Experts
from moeapps.moe.feed_forward import FeedForward
from moeapps.moe.routing import Routing

REGIMES: tuple[tuple[int, int, int, int], ...] = ((16384, 8, 2, 512), (16384, 64, 2, 512), (65536, 64, 8, 512))
"""(N rows, E experts, k chosen, D width) beside a dense network of equal active FLOPs."""
SYSTEMS: dict[str, tuple[LayerFactory, int]] = {
    "point_moe": (presets.point_moe(num_experts=4, top_k=2, expansion=1.0), 512),
    "promoe": (presets.promoe(num_experts=12, expansion=2.0), 384),
    "unimoe_audio": (presets.unimoe_audio(expansion=2752 / 2048, shared_expansion=1376 / 2048, jitter=0.0), 2048),
}
"""The layer of a paper and its width: Point-MoE-S at its widest, ProMoE-S, UniMoE-Audio."""

Call = Callable[[Tensor], Tensor]


# --- arithmetic and waiting -------------------------------------------------------------------------------------------


def layers(device: Device) -> Report:
    """Bfloat16 beside a float32 run on the processor, time and memory beside a dense network, and no waiting."""
    rows = [regime(device, *sizes) for sizes in REGIMES[: device.size(3, 1)]]
    wrong = [f"n={row['n']}, e={row['e']}: {row['reason']}" for row in rows if not row["ok"]]
    return verdict({"rows": rows}, *wrong)


def regime(device: Device, n: int, e: int, k: int, d: int) -> Report:
    """One row of `layers`."""
    torch.manual_seed(0)
    n, d = device.size(n, 64), device.size(d, 16)
    layer = presets.point_moe(num_experts=e, top_k=k, expansion=2.0)(d)
    # The oracle sees the rounded weights and rows: only the arithmetic differs.
    fast = copy.deepcopy(layer).to(device.name, torch.bfloat16)
    x = torch.randn(n, d).to(device.name, torch.bfloat16)
    few = x[:2048]
    oracle = copy.deepcopy(fast).to("cpu", torch.float32)
    error = relative_error(fast(few), oracle(few.float().cpu()))
    twin = presets.dense(expansion=2.0 * k)(d).to(device.name, torch.bfloat16)
    ours, dense = partial(learn, fast, lambda: fast(x)), partial(learn, twin, lambda: twin(x))
    waits = device.wait_told(ours)
    ms, dense_ms = device.milliseconds(ours, dense)
    held, dense_held = device.peak(ours), device.peak(dense)
    report = {
        **{"n": n, "e": e, "k": k, "d": d, "relative_error": error, "waits": waits, "ms": ms, "peak_bytes": held},
        "ratio_time": round(ms / dense_ms, 3),
        "ratio_memory": None if held is None or dense_held is None else round(held / dense_held, 3),
    }
    return verdict(report, too_far(error, "the output"), waits)


# --- compilation ------------------------------------------------------------------------------------------------------


def compiled(device: Device, system: str) -> Report:
    """The layer of a paper as one graph, forward and backward: as eager, no break, no wait, and no second graph.

    Under autocast, as ``trainer.precision: bf16-mixed`` has it.
    """
    torch.manual_seed(0)
    make, width = SYSTEMS[system]
    layer = make(device.size(width, 32)).to(device.name).train()
    x, other = torch.randn(2, device.size(8192, 48), device.size(width, 32), device=device.name)
    group = torch.arange(len(x), device=device.name) % 4 - 1
    with device.autocast():
        torch._dynamo.reset()
        breaks = torch._dynamo.explain(layer)(x, group=group).graph_break_count
        torch._dynamo.reset()
        module = torch.compile(layer, fullgraph=True, backend="aot_eager" if device.small else "inductor")
        found, graphs = {}, 0
        for name, call in (("eager", layer), ("compiled", module)):
            for rows in (x, other):  # the same shapes, routed otherwise
                learn(layer, partial(call, rows, group=group))
            found[name] = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
            found[f"{name} output"] = call(x, group=group)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        works = [partial(learn, layer, partial(call, x, group=group)) for call in (layer, module)]
        waits = [device.wait_told(work) for work in works]
        eager_ms, compiled_ms = device.milliseconds(*works)
    error = relative_error(found["compiled output"], found["eager output"])
    slope = relative_error(found["compiled"], found["eager"])
    report = {
        **{"n": len(x), "d": x.shape[1], "graph_breaks": breaks, "graphs": graphs, "relative_error": error},
        **{"gradient_relative_error": slope, "waits": waits, "eager_ms": eager_ms, "compiled_ms": compiled_ms},
    }
    # Forward alone and forward for a backward pass may each have a graph; a routing must have none of its own.
    more = None if graphs <= 2 else f"{graphs} graphs for rows of one shape"
    broken = f"{breaks} graph breaks" if breaks else None
    return verdict(report, too_far(error, "the output"), too_far(slope, "the gradient"), broken, more, *waits)


# --- other projects ---------------------------------------------------------------------------------------------------


class PlainMixtral(nn.Module):
    """A block of Mixtral's form, written plainly: each expert in turn on the rows that chose it.

    Args:
        ours: the layer whose router and experts it has.
    """

    def __init__(self, ours: MoELayer, top_k: int) -> None:
        super().__init__()
        weights = dict(ours.named_parameters())
        self.gate = nn.Parameter(weights["router.score.weight"].detach().clone())
        self.w_in = nn.Parameter(weights["experts.w_in"].detach().clone())
        self.w_out = nn.Parameter(weights["experts.w_out"].detach().clone())
        self.top_k = top_k

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        weight_NK, expert_NK = F.linear(x_ND, self.gate).float().softmax(-1).topk(self.top_k)
        weight_NK = (weight_NK / weight_NK.sum(-1, keepdim=True)).to(x_ND.dtype)
        y_ND = torch.zeros_like(x_ND)
        for e in range(len(self.w_in)):
            row_M, place_M = torch.where(expert_NK == e)
            gate_MH, up_MH = (x_ND[row_M] @ self.w_in[e]).chunk(2, -1)
            y_MD = (F.silu(gate_MH) * up_MH) @ self.w_out[e]
            y_ND = y_ND.index_add(0, row_M, y_MD * weight_NK[row_M, place_M].unsqueeze(-1))
        return y_ND


def mixtral_size(device: Device) -> Size:
    """Rows, experts, chosen, width, hidden width."""
    return Size(64, 4, 2, 16, 32) if device.small else Size(16384, 8, 2, 1024, 3584)


def swiglu_layer(size: Size) -> MoELayer:
    """Our layer of Mixtral's form."""
    bank = GLUExperts(size.e, size.d, size.hidden, activation="silu")
    return MoELayer(Router(LinearScore(size.d, size.e), TopK(size.k)), bank)


def beside_mixtral(device: Device) -> Report:
    """Our grouped products beside Mixtral's block: transformers', each way it has, where that is installed."""
    torch.manual_seed(0)
    size = mixtral_size(device)
    rows, wrong = [], []
    for theirs in ("eager", "grouped_mm") if importlib.util.find_spec("transformers") else ("plain",):
        if theirs == "plain":
            ours = swiglu_layer(size)
            peer: nn.Module = PlainMixtral(ours, size.k)
            call: Call = peer
        else:
            ours, peer, call = mixtral(size, theirs)
        row = beside(device, size, ours, peer, call)
        rows.append({"theirs": "our own plain loop of Mixtral's form" if theirs == "plain" else theirs, **row})
        wrong.append(too_far(row["relative_error"], f"the output beside {theirs}"))
    return verdict({"rows": rows, **vars(size)}, *wrong)


def beside(device: Device, size: Size, ours: MoELayer, peer: nn.Module, call: Call) -> Report:
    """Time and memory of a step of ours over the peer's in bfloat16, after a look at both outputs."""
    ours.to(device.name, torch.bfloat16)
    peer.to(device.name, torch.bfloat16)
    x = torch.randn(size.n, size.d).to(device.name, torch.bfloat16)
    works = [partial(learn, ours, lambda: ours(x)), partial(learn, peer, lambda: call(x))]
    error = relative_error(ours(x), call(x))
    ms, peer_ms = device.milliseconds(*works)
    held, peer_held = (device.peak(work) for work in works)
    report = {"relative_error": error, "ms": ms, "their_ms": peer_ms, "ratio_time": round(ms / peer_ms, 3)}
    return report | {"peak_bytes": held, "their_peak_bytes": peer_held}


def kernels(device: Device) -> Report:
    """Kernels of scattermoe at the seam of our backends and sonic-moe's layer beside ours, where installed."""
    torch.manual_seed(0)
    size = mixtral_size(device)
    found: Report = {}
    wrong: list[str | None] = []
    for package, check in (("scattermoe", through_scattermoe), ("sonicmoe", beside_sonic)):
        if importlib.util.find_spec(package) is None:
            found[package] = "not installed"
            continue
        found[package] = row = check(device, size)
        row["faster"] = row["ratio_time"] > 1
        wrong.append(too_far(row["relative_error"], f"the output beside {package}"))
    return verdict(found, *wrong)


def through_scattermoe(device: Device, size: Size) -> Report:
    """Our layer beside the same layer with scattermoe's products in the place of a backend of ours."""
    ours = swiglu_layer(size)
    other = copy.deepcopy(ours)

    def call(x_ND: Tensor) -> Tensor:
        with patch.object(combine, "apply", scattermoe_apply):
            y: Tensor = other(x_ND)
            return y

    return beside(device, size, ours, other, call)


def scattermoe_apply(bank: Experts | FeedForward, x_ND: Tensor, routing: Routing, **_: Any) -> Tensor:
    """What `moeapps.moe.backends.apply` takes and gives, by scattermoe's kernels; no biases, K experts in each row."""
    import scattermoe.parallel_experts as kernels  # type: ignore[import-not-found]

    ffn = bank.feed_forward()
    assert ffn is not None
    assert ffn.b_in is None
    assert routing.top_k is not None
    expert_NK = routing.expert_M.view(routing.num_rows, routing.top_k)
    weight_NK = routing.weight_M.view_as(expert_NK).to(x_ND.dtype)
    order = kernels.flatten_sort_count(expert_NK, num_experts=routing.num_experts)
    h_MH = kernels.parallel_linear(x_ND, ffn.w_in, routing.top_k, *order, grouped_out=True)
    y: Tensor = kernels.parallel_linear(ffn.hidden(h_MH), ffn.w_out, 1, *order, gates=weight_NK, grouped_in=True)
    return y


def beside_sonic(device: Device, size: Size) -> Report:
    """Our layer beside sonic-moe's, which has a router and kernels of its own, with the same weights."""
    import sonicmoe  # type: ignore[import-not-found]
    from sonicmoe.enums import ActivationType  # type: ignore[import-not-found]

    ours = swiglu_layer(size)
    peer = sonicmoe.MoE(size.e, size.k, size.d, size.hidden, ActivationType.SWIGLU, add_bias=False, std=0.02)
    weights: dict[str, Any] = dict(ours.named_parameters())
    gate_EDH, up_EDH = weights["experts.w_in"].detach().chunk(2, -1)
    with torch.no_grad():
        peer.router.weight.copy_(weights["router.score.weight"])
        peer.c_fc.weight.copy_(torch.stack([gate_EDH.mT, up_EDH.mT], 2).flatten(1, 2))  # row by row in turn
        peer.c_proj.weight.copy_(weights["experts.w_out"].mT)
    return beside(device, size, ours, peer, lambda x: peer(x)[0])
