# SPDX-License-Identifier: Apache-2.0
"""Memory of a fit in a process of its own: the peak of a base config, and what 2,000 steps at debug size leave behind.

``python -m benchmarks.reliability.memory WHAT SYSTEM FILE`` is that process; it writes what it found as JSON.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from typing_extensions import override

from moeapps.allocator import keep_freed_memory
from moeapps.files import write_json

What = Literal["peak", "leak"]
PEAK_STEPS = 20
LEAK_STEPS, EVERY, FIRST = 2000, 500, 1000
"""Steps, between two marks, and of the mark that growth counts from: after a validation, whose metrics keep a state."""
PAGE_KIB = 4
"""What the kernel gives at least: a step that keeps anything at all for good needs new pages sooner or later."""
BOUND_MIB = (LEAK_STEPS - FIRST) * PAGE_KIB / 1024
"""RSS may grow by less than a page for every step between the first mark and the last."""
BOUND_TENSORS = (LEAK_STEPS - FIRST) // 10
"""And live tensors by less than one in ten steps: one kept from every step, however small, would be ten times that."""
_CONFIGS = Path("configs")
_MIB = 2**20


class Marks(L.Callback):
    """Memory and live tensors after the named numbers of steps (batches); training ends with the last step.

    Args:
        at: numbers of steps.
        steps: of the training.
    """

    def __init__(self, at: list[int], steps: int) -> None:
        self.at = at
        self.steps = steps
        self.seen = 0
        self.found: dict[str, dict[str, float]] = {}

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self.seen += 1
        trainer.should_stop = self.seen >= self.steps
        if self.seen in self.at:
            self.found[str(self.seen)] = {**live_tensors(), "rss_mib": settled_mib()}


def live_tensors() -> dict[str, float]:
    """Count the tensors that Python knows, and their storages' memory."""
    gc.collect()
    held = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    storages = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in held}
    return {"tensors": len(held), "tensors_mib": round(sum(storages.values()) / _MIB, 2)}


def settled_mib() -> float:
    """Resident memory after the allocator gave back what it holds for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    return memory_mib("VmRSS")


def memory_mib(name: str) -> float:
    """Read one line of this process's memory, such as ``VmRSS`` or its peak ``VmHWM``, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise RuntimeError(f"/proc/self/status has no {name}; these measurements need Linux")


def words_of(what: What, system: str) -> list[str]:
    """Return the words of a fit: 20 steps of the base config as it is, or 2,000 at debug size."""
    files = [_CONFIGS / f"{system}.yaml"]
    if what == "leak":
        files += [_CONFIGS / "debug" / "tiny.yaml", _CONFIGS / "debug" / f"{system}.yaml"]
    most = 4 * LEAK_STEPS  # of optimizers, of which a step may move several; schedules need an end
    own = ["--trainer.limit_train_batches=1.0", f"--trainer.val_check_interval={EVERY}"]
    own += ["--trainer.check_val_every_n_epoch=null", "--trainer.log_every_n_steps=50"]
    return [
        *(word for file in files for word in ("--config", str(file))),
        *(f"--trainer.max_steps={most}", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=2"),
        *("--test_after_fit=false", "--trainer.enable_progress_bar=false"),
        *(own if what == "leak" else []),
        *(["--model.init_args.start=null"] if "    start:" in files[0].read_text(encoding="utf-8") else []),
    ]


def fit(what: What, system: str) -> dict[str, Any]:
    """Fit in this process; return its memory.

    Args:
        what: which of the two measurements.
        system: name of its base config.
    """
    import benchmarks.reliability.prepared  # noqa: F401
    from moeapps.commands.run import Cli, quiet

    quiet()
    keep_freed_memory()  # as the command does
    torch.set_num_threads(1)
    imported = settled_mib()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    begun = time.process_time()
    at = [*range(EVERY, LEAK_STEPS + 1, EVERY)]
    marks = Marks([], PEAK_STEPS) if what == "peak" else Marks(at, LEAK_STEPS)
    built = Cli(words_of(what, system), run=False)
    built.trainer.callbacks.insert(0, marks)  # type: ignore[attr-defined]
    built.trainer.fit(built.model, datamodule=built.datamodule)
    peak = memory_mib("VmHWM")
    return {
        "steps": marks.seen,
        "imported_mib": imported,
        "peak_mib": peak,
        "over_import_mib": round(peak - imported, 1),
        "cpu_seconds": round(time.process_time() - begun, 1),
        **({"marks": marks.found} if marks.found else {}),
    }


def measure(what: What, system: str) -> dict[str, Any]:
    """Run `fit` in a process of its own; return what it found.

    Raises:
        RuntimeError: the process failed; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="moeapps-memory-") as name:
        found = Path(name) / "found.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        environment["MOEAPPS_RUNS"] = str(Path(name) / "runs")
        command = [sys.executable, "-m", "benchmarks.reliability.memory", what, system, str(found)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0 or not found.is_file():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise RuntimeError(f"{what} of {system}: the process ended with {done.returncode}:\n{tail}")
        import json

        report: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    if what == "leak":
        report |= growth(report["marks"])
    return report


def growth(marks: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return what was added between the first mark and the last, and whether it lies under both bounds."""
    first, last = marks[str(FIRST)], marks[str(LEAK_STEPS)]
    rss, tensors = round(last["rss_mib"] - first["rss_mib"], 1), int(last["tensors"] - first["tensors"])
    within = rss < BOUND_MIB and tensors < BOUND_TENSORS
    return {"grown_mib": rss, "grown_tensors": tensors, "within": within}


if __name__ == "__main__":
    _what, _system, _file = sys.argv[1:]
    write_json(Path(_file), fit(_what, _system))  # type: ignore[arg-type]
