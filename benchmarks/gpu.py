# SPDX-License-Identifier: Apache-2.0
"""Check the core on an accelerator, where one is at hand: ``python -m benchmarks.gpu --json FILE``.

Four checks per regime of a mixture of gated experts: bfloat16 agrees with a float32 run on the processor; a step never
waits for the device; time and peak memory of forward + backward against a dense network of equal active FLOPs; and
``torch.compile`` into one graph changes nothing.
Nothing in the project needs this file's result; without an accelerator it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from moeapps.files import write_json
from moeapps.moe import presets

REGIMES: tuple[tuple[int, int, int, int], ...] = ((16384, 8, 2, 512), (16384, 64, 2, 512), (65536, 64, 8, 512))
"""(N rows, E experts, k chosen, D width) of each row of the table."""
REPEATS = 9


def main(args: list[str] | None = None) -> int:
    """Run the checks and write the table; 0 when all agree or there is nothing to check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    path: Path = parser.parse_args(args).json
    if not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing to check, nothing written")
        return 0
    rows = [check(*regime) for regime in REGIMES]
    report = {
        "command": "make gpu-check",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rows": rows,
    }
    write_json(path, report)
    print(json.dumps(report, indent=1))
    return 0 if all(row["ok"] for row in rows) else 1


def check(n: int, e: int, k: int, d: int) -> dict[str, Any]:
    """Compare one regime with its float32 run on the processor and with its dense twin."""
    torch.manual_seed(0)
    layer = presets.point_moe(num_experts=e, top_k=k, expansion=2.0)(d)
    dense = presets.dense(expansion=2.0 * k)(d)
    x_ND = torch.randn(n, d)
    # The oracle sees the rounded weights and rows: only the arithmetic differs.
    fast = copy.deepcopy(layer).to("cuda", torch.bfloat16)
    oracle = copy.deepcopy(fast).to("cpu", torch.float32)
    few = x_ND[:2048].to(torch.bfloat16)
    want = oracle(few.float())
    error = relative_error(fast(few.cuda()).float().cpu(), want)
    compiled = torch.compile(fast, fullgraph=True)
    compile_error = relative_error(compiled(few.cuda()).float().cpu(), want)
    x = x_ND.to("cuda", torch.bfloat16)
    twin = dense.to("cuda", torch.bfloat16)
    waits = waits_for_device(fast, x)
    moe_ms, dense_ms = paired_times(lambda: step(fast, x), lambda: step(twin, x))
    return {
        "n": n,
        "e": e,
        "k": k,
        "d": d,
        "dtype": "bfloat16",
        "relative_error": error,
        "compile_relative_error": compile_error,
        "waits_for_device": waits,
        "ratio_time": moe_ms / dense_ms,
        "ratio_memory": peak(fast, x) / peak(twin, x),
        # A router near a tie may choose differently in bfloat16; such rows are few.
        "ok": error < 0.05 and compile_error < 0.05 and not waits,
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the Frobenius norm."""
    return float((got - want).norm() / want.norm())


def waits_for_device(module: nn.Module, x_ND: Tensor) -> bool:
    """Whether a forward and backward pass takes a value of the device to the host."""
    step(module, x_ND)  # the first call may initialise libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(module, x_ND)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def step(module: nn.Module, x_ND: Tensor) -> None:
    """One forward and backward pass with fresh gradients."""
    module.zero_grad(set_to_none=True)
    module(x_ND).float().square().mean().backward()


def paired_times(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """Median milliseconds of two calls, alternated, after two warm-up rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(REPEATS + 2):
        for call, store in zip((first, second), times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                store.append(begin.elapsed_time(end))
    return median(times[0]), median(times[1])


def peak(module: nn.Module, x_ND: Tensor) -> int:
    """Bytes a forward and backward pass needs beyond what is held before it."""
    module.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(module, x_ND)
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    sys.exit(main())
