# SPDX-License-Identifier: Apache-2.0
"""The run folder: where it is, what is written there, and who made it (commit, versions, config hash)."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from moeapps.bounds import read_json
from moeapps.training.folders import newest_version

if TYPE_CHECKING:
    import lightning as L

PACKAGES = (
    "moeapps",
    "torch",
    "lightning",
    "torchmetrics",
    "jsonargparse",
    "torch-geometric",
    "timm",
    "numpy",
)
# No packages of the user's own: their commit is that of moeapps, or their version is in `PACKAGES`.
_COMMON = {"moeapps", "tasks", *(name.replace("-", "_") for name in PACKAGES), "lightning_fabric", "pytorch_lightning"}
# Keys that say where and how loudly a run runs, not what it computes.
_SILENT_TRAINER_KEYS = (
    "logger",
    "callbacks",
    "default_root_dir",
    "profiler",
    "log_every_n_steps",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
)
# Callbacks that look on; whatever else stands in a config may change what is learned, or which weights are tested.
_LOOKS_ON = (
    *("EndTable", "EpochPictures", "ExpertReport", "FirstLosses", "MoESummary", "PredictionWriter", "ProgressLines"),
    *("RoutingMonitor", "DeviceStatsMonitor", "LearningRateMonitor", "ModelSummary", "RichModelSummary"),
    *("RichProgressBar", "TQDMProgressBar"),
)
_SILENT_DATA_KEYS = ("cache_dir", "num_workers", "eval_batch_size", "predict")
_COUNTED_KEYS = ("seed_everything", "system", "model", "data")


_FOLDERS: WeakKeyDictionary[L.Trainer, Path | None] = WeakKeyDictionary()


def run_dir(trainer: L.Trainer) -> Path | None:
    """Return the folder of this run, or None where nothing is to be written (fast_dev_run, barebones).

    The first call for a trainer agrees on the folder and must be made by all processes (``BaseTask.setup`` does); later
    calls are local.
    """
    if getattr(trainer, "fast_dev_run", False) or trainer.barebones:
        return None
    if trainer not in _FOLDERS:
        folder = trainer.log_dir
        _FOLDERS[trainer] = None if folder is None else Path(folder)
    return _FOLDERS[trainer]


def git_commit(folder: Path | None = None) -> str | None:
    """Return the commit of the checkout that holds a package, or None where no commit holds any of it.

    ``-dirty`` is appended if a tracked file of the checkout has changes, or if the package has source files that are
    in no commit. A package that is installed inside of another project's checkout belongs to none of its commits.

    Args:
        folder: of the package, or the file of a module that is in none; None for moeapps.
    """
    folder = (folder or Path(__file__).parents[1]).resolve()
    place = folder.parent if folder.is_file() else folder
    # A grid rewrites its results and their page after every variant; they are no part of what makes a run.
    counted = ("--", ":(top)", ":(top,exclude)benchmarks/results", ":(top,exclude)docs/evidence.md")

    def git(*words: str) -> str:
        command = ["git", "-C", str(place), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if not git("ls-files", "--", str(folder)):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", *counted)
        added = git("ls-files", "--others", "--exclude-standard", "--", str(folder))
        new_code = any(line.endswith(".py") for line in added.splitlines())
        return git("rev-parse", "HEAD") + ("-dirty" if changed or new_code else "")
    except (OSError, subprocess.SubprocessError):
        return None


def own_packages(config: Any) -> dict[str, dict[str, str | None]]:
    """Return version and commit of each package of the user's own that a config names classes of, by its name.

    Packages are those whose modules are imported and whose versions `versions` does not list; Python's own are none.
    ``version`` is that of the installed distribution, None for a folder on Python's path; ``commit`` as `git_commit`.

    Args:
        config: of the run, as plain values.
    """
    found: dict[str, dict[str, str | None]] = {}
    for path in _dotted(config):
        top = path.partition(".")[0]
        module = sys.modules.get(top)
        if top in found or top in _COMMON or top in sys.stdlib_module_names or module is None:
            continue
        # A folder without __init__.py has no file, but places.
        places = [*getattr(module, "__path__", []), getattr(module, "__file__", None)]
        held = next((Path(place) for place in places if place), None)
        if held is not None:
            found[top] = {"version": _installed_version(top, held.resolve()), "commit": git_commit(held)}
    return dict(sorted(found.items()))


def _installed_version(name: str, place: Path) -> str | None:
    """Return the version of the distribution that a package is from; another may ship a package of the same name."""
    for found in map(distribution, packages_distributions().get(name, ())):
        installed = place.is_relative_to(Path(str(found.locate_file(""))).resolve())
        if installed or '"editable": true' in (found.read_text("direct_url.json") or ""):
            return found.version
    return None


def _dotted(value: Any) -> Iterator[str]:
    """Yield the texts of a config that read like the path of a class."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _dotted(item)
    elif isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value):
        yield value


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return processor, its instruction set, cores this process may use, and threads of torch.

    Times depend on all of them, the last digits of results on the instruction set that torch's kernels use and on the
    threads: machines of one name may differ in it.
    """
    import torch

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = named[0] if named else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
    }


def seeds_of(value: Any, prefix: str = "") -> dict[str, int]:
    """Return every seed in a configuration: dotted key -> seed, of the keys called ``...seed`` or `seed_everything`."""
    found: dict[str, int] = {}
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(item, dict | list):
            found |= seeds_of(item, f"{prefix}{key}.")
        elif isinstance(item, int) and _is_seed(str(key)):
            found[f"{prefix}{key}"] = item
    return found


def variant_hash(config: dict[str, Any]) -> str:
    """Return 12 hex digits that name WHAT was run: as `config_hash`, but runs that differ by their seeds share it.

    Where data is kept and how it is loaded does not count either. Callbacks count that may change the training
    (averaged weights, balancing, which checkpoint is best); those that only look on do not. Of a run that it starts
    from, what was run there counts and not its folder, which names a seed; where that run is gone, its path does.
    """
    data = dict(config.get("data") or {})
    data["init_args"] = {k: v for k, v in (data.get("init_args") or {}).items() if k not in _SILENT_DATA_KEYS}
    config = _seedless({**config, "data": data, "model": _start_named(config.get("model"))})
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    callbacks = [each for each in (callbacks if isinstance(callbacks, list) else [callbacks]) if not _looks_on(each)]
    return _digest(_counted(config) | ({"callbacks": callbacks} if callbacks else {}))


def _start_named(model: Any) -> Any:
    """A model's configuration with the hash of the run that it starts from, or of several, in place of the path."""
    arguments = dict(model.get("init_args") or {}) if isinstance(model, dict) else {}
    start = arguments.get("start")
    given = start.get("init_args") if isinstance(start, dict) else None
    if not isinstance(start, dict) or not isinstance(given, dict) or "path" not in given:
        return model
    paths = given["path"]
    named = [_variant_at(each) for each in paths] if isinstance(paths, list) else _variant_at(paths)
    return {**model, "init_args": {**arguments, "start": {**start, "init_args": {**given, "path": named}}}}


def _variant_at(path: Any) -> Any:
    """What a run is called in the hash of one that starts from it: its own hash, and the checkpoint where named."""
    if not isinstance(path, str):
        return path
    place = Path(path)
    try:
        file = place.is_file()
        folder = place.resolve().parent.parent if file else newest_version(place, trained=True)
        found = read_json(folder / "run.json").get("variant_hash")
    except (OSError, ValueError, AttributeError):  # gone, or not one of ours: nothing but the path tells it
        return path
    return {"variant_hash": found, "checkpoint": place.name if file else None} if found else path


def _looks_on(callback: Any) -> bool:
    path = str(callback.get("class_path", "")) if isinstance(callback, dict) else ""
    reports = path.partition(".")[0] in _COMMON and ".report." in path
    return reports or path.rpartition(".")[2] in _LOOKS_ON


def _seedless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _seedless(item) for key, item in value.items() if not _is_seed(str(key))}
    return [_seedless(item) for item in value] if isinstance(value, list) else value


def _is_seed(key: str) -> bool:
    return key in ("seed", "seed_everything") or key.endswith("_seed")


def config_hash(config: dict[str, Any]) -> str:
    """Return 12 hex digits that name what a run computes: seed, system, model, data and the trainer's numbers.

    The run's name, its folders, loggers, callbacks and progress bars do not count.
    """
    return _digest(_counted(config))


def _counted(config: dict[str, Any]) -> dict[str, Any]:
    counted: dict[str, Any] = {key: config.get(key) for key in _COUNTED_KEYS}
    trainer = dict(config.get("trainer") or {})
    counted["trainer"] = {key: value for key, value in trainer.items() if key not in _SILENT_TRAINER_KEYS}
    return counted


def _digest(counted: dict[str, Any]) -> str:
    text = json.dumps(counted, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
