# SPDX-License-Identifier: Apache-2.0
"""Point-MoE's training step in a process of its own, with the code of any checkout: `tree` starts and asks it.

The process answers lines on its standard input, see `serve`. Memory is the peak of a step: the highest resident set
during one step (``VmHWM``) minus the one before it, taken after ``malloc_trim`` gave back what the allocator held.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

CROPS = {"15k": 6, "150k": 60}
"""Training crops of 2,500 voxels in a step, for every size."""
OWN = {-4: 65536, -3: 32 << 20, -1: 64 << 20}
"""M_MMAP_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD as glibc has them after blocks of 32 MiB were freed."""

Ask = Callable[[str, str], dict[str, float]]


def serve() -> None:
    """Answer each line ``SIZE WHAT [WAY]`` on stdin with JSON: cost of a ``step``, its ``memory``, or the ``limit``.

    ``glibc`` and ``keep`` set the allocator first. WAY names one of `OTHER_WAYS`, with underscores.
    """
    # Not in trees of before; to ask Python would find that of an installed checkout, as it searches there next.
    if Path("moeapps/allocator.py").is_file():
        importlib.import_module("moeapps.allocator").keep_freed_memory()
    import torch

    from benchmarks.system_share import build, train_step

    torch.set_num_threads(1)
    torch.manual_seed(0)
    size, voxels = "", 0
    step: Callable[[], object] = dict
    for line in sys.stdin:
        wanted, what, *way = line.split()
        if wanted != size:
            size = wanted
            task, batch = build("point_moe", ["--data.init_args.batch_size", str(CROPS[size])])
            step, voxels = train_step(task, batch), int(batch.num_nodes)
            step()
        if what in ("glibc", "keep"):
            keep_or_not(what == "keep")
        with ExitStack() as stack:
            for other in OTHER_WAYS[way[0].replace("_", " ")]() if way else []:
                stack.enter_context(other)
            cost = {"memory": peak_of, "limit": limit_of}.get(what, cost_of)(step)
        print(json.dumps({"voxels": voxels, **cost}), flush=True)


def tap_by_tap() -> list[AbstractContextManager[Any]]:
    """Convolve as narrow features are convolved: a gather, a product and a sum for every tap."""
    from tasks.point_cloud.nets import sparse_conv

    return [patch.object(sparse_conv, "_in_blocks", lambda *_: False)]


def whole_mlp() -> list[AbstractContextManager[Any]]:
    """Run each MLP over all rows at once, and keep the hidden layer twice."""
    from timm.layers import Mlp

    from tasks.point_cloud.nets.mlp import GeluMlp

    return [patch.object(GeluMlp, "forward", Mlp.forward)]


def attention_by_products() -> list[AbstractContextManager[Any]]:
    """Attend by two batched products and a softmax in place of torch's fused kernel."""
    import torch

    def attend(q: Any, k: Any, v: Any, attn_mask: Any = None) -> Any:
        score = (q @ k.mT) * q.shape[-1] ** -0.5
        return torch.softmax(score if attn_mask is None else score.masked_fill(~attn_mask, -torch.inf), -1) @ v

    return [patch("torch.nn.functional.scaled_dot_product_attention", attend)]


OTHER_WAYS: dict[str, Callable[[], list[AbstractContextManager[Any]]]] = {
    "convolutions tap by tap": tap_by_tap,
    "MLPs over all rows at once": whole_mlp,
    "attention by products": attention_by_products,
}
"""Of our own tree; what each makes of a step stands in the report beside the goals."""


def keep_or_not(keep: bool) -> None:
    """Keep freed memory as `moeapps.allocator` does, or take the thresholds of `OWN` and give back what was kept."""
    library = ctypes.CDLL(None)
    if keep:
        importlib.import_module("moeapps.allocator").keep_freed_memory()
        return
    for name, value in OWN.items():
        library.mallopt(name, value)
    library.malloc_trim(0)


def cost_of(step: Callable[[], object]) -> dict[str, float]:
    """CPU seconds and page faults of a step."""
    faults, begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.thread_time()
    step()
    seconds = time.thread_time() - begun
    return {"seconds": seconds, "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults}


def peak_of(step: Callable[[], object]) -> dict[str, float]:
    """Bytes that the resident set grows by within a step, at its peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    before = status("VmRSS")
    step()
    return {"bytes": status("VmHWM") - before}


def limit_of(step: Callable[[], object]) -> dict[str, float]:
    """Seconds of the step's products at full speed, and bytes that autograd keeps for the backward pass."""
    import torch

    from benchmarks.limits import peak_gflops, product_flops

    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return {"seconds": product_flops(step) / (1e9 * peak_gflops()), "bytes": sum(kept.values())}


def status(name: str) -> int:
    """One line of this process's memory, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:"))


@contextmanager
def tree(place: Path) -> Iterator[Ask]:
    """Start the process of a tree; it is asked for a size and for what."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment = {**known, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-W", "ignore", str(Path(__file__).resolve())]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=place, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(size: str, what: str) -> dict[str, float]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{size} {what}\n")
        process.stdin.flush()
        while line := process.stdout.readline():
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise RuntimeError(f"the process of {place} ended without an answer; its last words are above")

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    serve()
