# SPDX-License-Identifier: Apache-2.0
"""Check moeapps on one accelerator, in ten minutes at most: ``python -m benchmarks.gpu --json FILE``.

* ``layers``: a layer in bfloat16 beside a float32 run on the processor; time and memory beside a dense network of equal
  active FLOPs; whether the host waits for the device.
* ``compile ...``: the layer of a paper as one graph, without a break, a wait or a second graph for other routings.
* ``mixtral``: our grouped products beside Mixtral's block (transformers', or a plain loop of ours, which is said).
* ``kernels``: scattermoe behind the seam of our backends and sonic-moe's layer, where they are installed.
* ``step ...``: steps of ``moeapps fit`` in bfloat16 with time and peak memory, of each paper's small size.

Every part is a process of its own with a limit of time. One that fails is told with its reason, the others go on, and
the exit status is 1. Without a device the file says so, the exit status is 0, and results of a device are kept.
``--device cpu`` runs every part on the processor in a small form: that shows that they run, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from moeapps.files import write_json

Report = dict[str, Any]
Run = Callable[[str, float, str], Report]

BUDGETS: dict[str, float] = {
    **{"device": 25, "layers": 45},
    **{"compile point_moe": 75, "compile promoe": 60, "compile unimoe_audio": 60, "mixtral": 35, "kernels": 40},
    **{"step point_moe": 50, "step promoe": 50, "step unimoe_audio": 50},
    **{"step home": 20, "step aw_moe": 20, "step mixer": 20, "step meta_dmoe": 20},
}
"""Seconds of each part, in their order; with the time to end them they make less than ten minutes."""
WHOLE = 600.0
NONE = "no device"


def main(args: list[str] | None = None) -> int:
    """Run the parts and write the file: 0 when all agree or there is no device, 1 when a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small, only to see it run")
    parser.add_argument("--only", nargs="+", choices=tuple(BUDGETS), help="parts (default: all)")
    options = parser.parse_args(args)
    return check(options.json, options.device, options.only or list(BUDGETS))


def check(path: Path, device: str, names: list[str], *, run: Run | None = None) -> int:
    """Run parts one after the other and write their file; ``run`` stands in for processes in tests."""
    run = run or in_process
    begun = time.monotonic()
    report: Report = {"command": "make gpu-check"}
    if device == "cuda":
        about = run("device", BUDGETS["device"], device)
        if about.get("name") is None:
            return no_device(path, about)
        report |= {"device": about}
    else:
        report |= {"device": "the processor, in a small form: this shows that the parts run, and measures nothing"}
    parts: dict[str, Report] = {}
    for name in names:
        if name == "device":
            continue
        left = min(BUDGETS[name], WHOLE - (time.monotonic() - begun))
        parts[name] = run(name, left, device) if left > 1 else failed("no time was left")
        print(f"{name}: {told(parts[name])}", flush=True)
        write_json(path, report | {"parts": parts, "ok": False, "reason": "it was stopped before its end"})
    ok = all(part["ok"] for part in parts.values())
    write_json(path, report | {"seconds": round(time.monotonic() - begun, 1), "parts": parts, "ok": ok})
    return 0 if ok else 1


def no_device(path: Path, about: Mapping[str, Any]) -> int:
    """Say that there is nothing to check; keep a file with results of a device."""
    said = f"{NONE}: {about.get('reason', 'torch finds no CUDA device on this machine')}; nothing was checked"
    print(said)
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("parts"):
        print(f"{path} keeps the results of the last check on a device")
        return 0
    write_json(path, {"command": "make gpu-check", "device": NONE, "told": said})
    return 0


def told(part: Mapping[str, Any]) -> str:
    """A part in a line."""
    return f"{'ok' if part['ok'] else 'failed: ' + str(part['reason'])} ({part.get('seconds', 0):.0f} s)"


def failed(reason: str) -> Report:
    """A part without values."""
    return {"ok": False, "reason": reason}


# --- parts ------------------------------------------------------------------------------------------------------------


def about_device(device: Any) -> Report:
    """Name, memory and versions; no name where there is no device."""
    import torch

    if not torch.cuda.is_available():
        return {"ok": True, "name": None}
    held = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    return {
        "ok": True,
        "name": held.name,
        "bytes": held.total_memory,
        "capability": [held.major, held.minor],
        **versions,
    }


def work_of(name: str) -> Callable[[Any], Report]:
    """The function of a part."""
    if name == "device":
        return about_device
    kind, _, system = name.partition(" ")
    if kind == "step":
        from benchmarks.gpu_systems import steps

        return partial(steps, system=system)
    from benchmarks import gpu_layers

    if kind == "compile":
        return partial(gpu_layers.compiled, system=system)
    return {"layers": gpu_layers.layers, "mixtral": gpu_layers.beside_mixtral, "kernels": gpu_layers.kernels}[kind]


def done(name: str, device: str) -> Report:
    """Run a part here; whatever it raises is its reason."""
    from benchmarks.gpu_device import Device

    begun = time.monotonic()
    try:
        found = work_of(name)(Device(device))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        found = failed(f"{type(error).__name__}: {lines[0]}"[:400])
    return found | {"seconds": round(time.monotonic() - begun, 1)}


def in_process(name: str, seconds: float, device: str) -> Report:
    """Run a part in a process of its own, which ends with its time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu_layers", "benchmarks.gpu_systems"])  # imported once for all parts
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, name, device))
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            return failed(f"it was not done after {seconds:.0f} s") | {"seconds": round(seconds, 1)}
        found: Report = here.recv()
        return found
    except EOFError:
        process.join(5)
        return failed(f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _child(there: Connection, name: str, device: str) -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes of its own, which would outlive it
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        sys.stdout = sys.stderr = nothing
        there.send(done(name, device))


if __name__ == "__main__":
    sys.exit(main())
