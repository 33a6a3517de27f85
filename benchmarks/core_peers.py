# SPDX-License-Identifier: Apache-2.0
"""Our layer beside those of other projects that run on a CPU: equal work, nothing dropped, same rows, same weights.

``measure_peers`` runs this file in the environment of `benchmarks.peers.environment`, in a folder of its own:
torchmetrics and others import transformers where they find it.

Compared are whole layers, router included. Before a Mixtral block is timed, its weights are ours and its output must be
ours; so must that of mixture-of-experts. soft-moe-pytorch normalises rows and slots otherwise, and is compared by its
work alone: same slots, same experts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.core_cases import Mode, Size, paired_ratios, products_step, step
from benchmarks.core_rows import PEERS, Row, peer_rows
from benchmarks.peers.environment import FOLDER, python_with
from moeapps.moe import CosineScore, GLUExperts, LinearScore, MLPExperts, MoELayer, Router, Slots, TopK

PACKAGES = ("transformers", "mixture-of-experts", "soft-moe-pytorch")  # versions: benchmarks/peers/requirements.txt
SLOW_PAIRS = 3
"""Pairs where the peer takes many times as long as we do."""


def measure_peers(names: Sequence[str], pairs: int) -> dict[str, dict[str, Any]]:
    """Measure the named rows in the peers' environment: name -> values, and what else was tried where we are slower."""
    if not names:
        return {}
    root = str(Path(__file__).resolve().parents[1])
    variables = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [
        str(python_with(PACKAGES, FOLDER / "layers")),
        "-m",
        "benchmarks.core_peers",
        "--pairs",
        str(pairs),
        "--names",
        *names,
    ]
    done = subprocess.run(command, check=True, cwd=root, env=variables, stdout=subprocess.PIPE, text=True)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- in that environment ----------------------------------------------------------------------------------------------


def mixtral(size: Size, implementation: str) -> tuple[MoELayer, nn.Module, Callable[[Tensor], Tensor]]:
    """Our SwiGLU layer, transformers' block with the same weights, and how to call it."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=size.d, intermediate_size=size.hidden, num_local_experts=size.e, num_experts_per_tok=size.k
    )
    config._experts_implementation = implementation
    # k = 1: their block divides the one weight by itself; so does ours, with weights of 1.
    choose = TopK(size.k) if size.k > 1 else TopK(1, weighing="ones")
    ours = MoELayer(Router(LinearScore(size.d, size.e), choose), GLUExperts(size.e, size.d, size.hidden))
    theirs = MixtralSparseMoeBlock(config)
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        theirs.gate.weight.copy_(weights["router.score.weight"])
        theirs.experts.gate_up_proj.copy_(weights["experts.w_in"].mT)
        theirs.experts.down_proj.copy_(weights["experts.w_out"].mT)
    return ours, theirs, lambda x_ND: theirs(x_ND.unsqueeze(0)).squeeze(0)


def mixture_of_experts(size: Size) -> tuple[MoELayer, nn.Module, Callable[[Tensor], Tensor]]:
    """Our top-2 layer, lucidrains' with the same weights and the least capacity that drops nothing."""
    from mixture_of_experts import MoE  # type: ignore[import-not-found]

    bank = MLPExperts(size.e, size.d, size.hidden, bias=False)
    ours = MoELayer(Router(LinearScore(size.d, size.e), TopK(2)), bank)
    theirs = MoE(size.d, num_experts=size.e, hidden_dim=size.hidden, activation=nn.GELU)
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        theirs.gate.w_gating.copy_(weights["router.score.weight"].T)
        theirs.experts.w1.copy_(weights["experts.w_in"])
        theirs.experts.w2.copy_(weights["experts.w_out"])
        fullest = int(ours.route(rows(size)).counts().max())
    for gate in (theirs.gate,):
        gate.second_policy_train = gate.second_policy_eval = "all"
        gate.capacity_factor_train = gate.capacity_factor_eval = (fullest + 0.5) * size.e / size.n
    return ours, theirs, lambda x_ND: theirs(x_ND.unsqueeze(0))[0].squeeze(0)


def soft_moe(size: Size) -> tuple[MoELayer, nn.Module, Callable[[Tensor], Tensor]]:
    """Our soft mixture and lucidrains', of as many slots as a top-k layer has assignments."""
    from soft_moe_pytorch import SoftMoE  # type: ignore[import-not-found]

    slots = size.rows_per_expert
    bank = MLPExperts(size.e, size.d, size.hidden)
    ours = MoELayer(Router(CosineScore(size.d, size.e * slots), Slots(slots)), bank)
    theirs = SoftMoE(size.d, num_experts=size.e, num_slots=slots, offload_unused_experts_to_cpu=False)
    return ours, theirs, lambda x_ND: theirs(x_ND.unsqueeze(0)).squeeze(0)


def rows(size: Size) -> Tensor:
    """The rows that both layers get."""
    return torch.randn(size.n, size.d, generator=torch.Generator().manual_seed(0))


def build(row: Row) -> tuple[MoELayer, nn.Module, Callable[[Tensor], Tensor]]:
    """The two layers of a row."""
    torch.manual_seed(0)
    if row.regime.endswith(PEERS):
        return mixtral(row.size, row.regime.rsplit("-", 1)[1].replace("grouped", "grouped_mm"))
    return mixture_of_experts(row.size) if row.regime.startswith("mixture") else soft_moe(row.size)


def measure(row: Row, pairs: int) -> dict[str, Any]:
    """Ratios of our time over theirs, after a check that both compute the same."""
    ours, theirs, call = build(row)
    mode: Mode = "forward" if row.mode == "forward" else "fwd+bwd"
    x_ND = rows(row.size).requires_grad_()
    if not row.regime.startswith("soft"):
        with torch.no_grad():
            torch.testing.assert_close(ours(x_ND), call(x_ND), rtol=1e-3, atol=1e-4)
    their_step = step(lambda: call(x_ND), differentiable(call, theirs, x_ND), mode)
    slow = row.regime.endswith("eager") and row.size.e > 8
    pairs = SLOW_PAIRS if slow else pairs

    def ratios(backend: str) -> list[float]:
        ours.backend = backend  # type: ignore[assignment]
        our_step = step(lambda: ours(x_ND), differentiable(ours, ours, x_ND), mode)
        return paired_ratios(our_step, their_step, pairs=pairs)

    values, tried, reason = ratios("auto"), [], ""
    if median(values) > (row.gate or 0.0):
        for backend in ("segments", "grouped_mm", "loop"):
            tried.append({"way": backend, "ratio": round(median(ratios(backend)), 4)})
        reason = "both run the same matrix products; the rest is the mixing of rows, two dense products in both"
    if tried and row.regime.endswith(PEERS):
        bare = median(paired_ratios(products_step(row.size, row.expert, mode), their_step, pairs=pairs))
        store_transposed(ours)
        tried.append({"way": "auto, weights stored as theirs", "ratio": round(median(ratios("auto")), 4)})
        reason = (
            f"the matrix products of the experts alone take {bare:.2f} x the peer's time. It stores weights as "
            "(experts, out, in), which makes products of few rows faster forward and slower backward; ours lie as "
            "(experts, in, out)"
        )
    return {"values": values, "tried": tried, "reason": reason}


def store_transposed(layer: MoELayer) -> None:
    """Keep every stack as it is, but with its last two dimensions exchanged in memory."""
    for parameter in layer.experts.parameters():
        parameter.data = parameter.data.mT.contiguous().mT


def differentiable(call: Callable[[Tensor], Tensor], module: nn.Module, x_ND: Tensor) -> list[Tensor]:
    """The rows, and the parameters that have a gradient."""
    parameters = list(module.parameters())
    found = torch.autograd.grad(call(x_ND).sum(), parameters, allow_unused=True)
    return [x_ND, *(p for p, g in zip(parameters, found, strict=True) if g is not None)]


def main(args: list[str] | None = None) -> int:
    """Measure the named rows and print them as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core_peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--names", nargs="*", default=None)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    found = {}
    for row in peer_rows():
        if options.names is None or row.name in options.names:
            print(row.name, file=sys.stderr, flush=True)
            found[row.name] = measure(row, options.pairs)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
