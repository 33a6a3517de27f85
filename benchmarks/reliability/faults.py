# SPDX-License-Identifier: Apache-2.0
"""Chains of killed processes: each goes on where the one before was struck, and the end is compared with no fault.

A case is a command: ``fit`` of a system, or ``curriculum``, whose stages are each struck. It runs once to its end,
and once more as a chain of processes, each of which sends itself a signal at a drawn step. Every step of every process
of the chain must have the state and the scores that this step has in the uninterrupted run, to the bit.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.reliability.witness import STRIKE, TAPE, Moment, Strike

WATCHED = (
    *("--trainer.callbacks+=moeapps.training.callbacks.RoutingMonitor", "--trainer.callbacks.figures=false"),
    "--trainer.callbacks+=benchmarks.reliability.witness.Witness",
)
"""No figures of the routing, a quarter of so short a run; then the witness."""
EPOCH, EPOCHS, STAGE_EPOCHS = 4, 4, 2
"""Steps of an epoch, epochs of a fit, and of a stage of a curriculum."""
PATIENCE_S = 1800.0
_CONFIGS = Path("configs")
_EPOCH_ENDS: tuple[Moment, ...] = ("epoch end", "saving", "epoch start")


@dataclass(frozen=True)
class Case:
    """A command whose processes are struck.

    Args:
        name: of the case.
        system: of its runs' folder.
        command: ``fit`` or ``curriculum``.
        words: what follows it.
        runs: names of its runs, in order.
    """

    name: str
    system: str
    command: str
    words: tuple[str, ...]
    runs: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Steps of all its runs together."""
        return EPOCH * (STAGE_EPOCHS * len(self.runs) if self.command == "curriculum" else EPOCHS)

    def strikes(self, seed: int) -> list[Strike]:
        """Draw the faults of a chain, in the order of the steps that they fall on.

        A fit is killed at three drawn steps inside of epochs and at an end of an epoch, and gets Ctrl-C and SIGTERM;
        each stage of a curriculum is killed once, the last one gets Ctrl-C besides.
        """
        draw = random.Random(f"{self.name} {seed}")
        inside = lambda epoch: epoch * EPOCH + draw.randint(1, EPOCH - 1)  # noqa: E731 - a step that ends no epoch
        if self.command == "curriculum":
            killed = [Strike("SIGKILL", "step", inside(1), run) for run in self.runs]
            return [*killed, Strike("SIGINT", "step", inside(1), self.runs[-1])]
        run, interrupted = self.runs[0], 2 * EPOCH + draw.randint(1, EPOCH - 2)
        end = Strike("SIGKILL", draw.choice(_EPOCH_ENDS), 2 * EPOCH, run)
        last = [Strike("SIGKILL", "step", inside(3), run), Strike("SIGTERM", "step", inside(3), run)]
        return [
            Strike("SIGKILL", "step", inside(1), run),
            end,
            Strike("SIGINT", "step", interrupted, run),
            Strike("SIGKILL", "step", draw.randint(interrupted + 1, 3 * EPOCH - 1), run),
            *sorted(last, key=lambda strike: strike.step),
        ]


@dataclass(frozen=True)
class Fault:
    """What became of one process.

    Args:
        signal: that struck it.
        moment: where.
        run: whose.
        step: steps done by then.
        ended: exit code; negative is the signal's number.
        resumed_at: step from which the next process went on; 0 is from the start.
    """

    signal: str
    moment: str
    run: str
    step: int
    ended: int
    resumed_at: int

    @property
    def repeated(self) -> int:
        """Steps that had to be taken again."""
        return self.step - self.resumed_at


@dataclass(frozen=True)
class Outcome:
    """What became of a chain.

    Args:
        faults: its processes, but for the last, which ended.
        compared: lines of the chain that were held against the uninterrupted run.
        differing: those that are not equal to the bit: ``run what step``.
        missing: lines of the uninterrupted run that no process of the chain wrote.
    """

    faults: list[Fault]
    compared: int
    differing: list[str]
    missing: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return {**asdict(self), "repeated": max(fault.repeated for fault in self.faults)}


class ChainError(RuntimeError):
    """A process that did not end as its strike says; the message has the end of its output."""


def cases() -> dict[str, Case]:
    """Return a fit of every base config and the curricula that have stages, at the sizes of configs/debug."""
    found: dict[str, Case] = {}
    few = ("--trainer.check_val_every_n_epoch=1", f"--trainer.limit_train_batches={EPOCH}", *WATCHED)
    for base in sorted(_CONFIGS.glob("*.yaml")):
        files = (base, _CONFIGS / "debug" / "tiny.yaml", _CONFIGS / "debug" / base.name)
        words = (*(word for file in files for word in ("--config", str(file))), *few)
        fit = (*words, f"--trainer.max_epochs={EPOCHS}", "--name=struck")
        found[base.stem] = Case(base.stem, base.stem, "fit", fit, ("struck",))
        stages = stages_of(base.stem)
        if stages:
            # A stage may ask for batches that data of this size do not fill.
            batch = yaml.safe_load(files[-1].read_text(encoding="utf-8"))["data"]["init_args"]["batch_size"]
            chain = (
                *words,
                f"--data.init_args.batch_size={batch}",
                f"--trainer.max_epochs={STAGE_EPOCHS}",
                "--name=struck",
            )
            chain += tuple(word for stage in stages for word in ("--stage", str(stage)))
            runs = (*(f"struck_stage{number}" for number in range(len(stages) - 1)), "struck")
            name = f"{base.stem}_curriculum"
            found[name] = Case(name, base.stem, "curriculum", chain, runs)
    return found


def stages_of(system: str) -> list[Path]:
    """Return the overlays of the stages of a system in order: by their number, or as `make` chains them by name."""
    named = {path.stem.removeprefix(f"{system}_"): path for path in _CONFIGS.glob(f"stages/{system}_*.yaml")}
    order = ("student", "experts", "aggregator", "meta")
    return [named[key] for key in sorted(named, key=lambda key: (order.index(key) if key in order else -1, key))]


def chain(case: Case, folder: Path, *, seed: int = 0) -> Outcome:
    """Run a case to its end without a fault, then as a chain of struck processes; compare.

    Args:
        case: what to run.
        folder: for runs, outputs and tapes.
        seed: of the drawn steps.

    Raises:
        ChainError: a process ended otherwise than it should.
    """
    _run(case, folder / "whole", [], None)
    steps = sum(line["what"] == "step" for line in _lines(folder / "whole"))
    if steps != case.steps:
        raise ChainError(f"{case.name} took {steps} steps, not {case.steps}: its data do not fill {EPOCH} batches")
    struck, faults = folder / "struck", []
    words: list[str] = []
    for strike in case.strikes(seed):
        ended = _run(case, struck, words, strike)
        words, resumed_at = _go_on(case, struck)
        if case.command == "curriculum":
            resumed_at = _newest_step(struck / "runs" / case.system / strike.run)
        faults.append(Fault(strike.signal, strike.moment, strike.run, strike.step, ended, resumed_at))
    _run(case, struck, words, None)
    return compare(faults, _lines(folder / "whole"), _lines(struck))


def compare(faults: list[Fault], whole: Iterable[dict[str, Any]], struck: Iterable[dict[str, Any]]) -> Outcome:
    """Hold each line of a chain against the uninterrupted run's of the same run, kind and step."""
    expected = {_key(line): line for line in whole}
    lines = list(struck)
    differing = sorted({_key(line) for line in lines if expected.get(_key(line)) != line})
    missing = sorted(set(expected) - {_key(line) for line in lines})
    return Outcome(faults, len(lines), differing, missing)


def _key(line: dict[str, Any]) -> str:
    return f"{line['run']} {line['what']} {line['step']}"


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "tape.jsonl").read_text(encoding="utf-8").splitlines()]


def _go_on(case: Case, folder: Path) -> tuple[list[str], int]:
    """Return the words that go on from the newest checkpoint of a fit, and its step; a curriculum needs none."""
    if case.command == "curriculum":
        return [], 0
    newest = _newest(folder / "runs" / case.system / case.runs[0])
    return ([], 0) if newest is None else ([f"--ckpt_path={newest}"], _step_of(newest))


def _newest(run: Path) -> Path | None:
    files = [*run.glob("version_*/checkpoints/last.ckpt"), *run.glob("version_*/checkpoints/interrupted.ckpt")]
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)


def _newest_step(run: Path) -> int:
    newest = _newest(run)
    return 0 if newest is None else _step_of(newest)


def _step_of(checkpoint: Path) -> int:
    import torch

    return int(torch.load(checkpoint, weights_only=True, mmap=True)["callbacks"]["Witness"]["steps"])


def _run(case: Case, folder: Path, words: Sequence[str], strike: Strike | None) -> int:
    """Run the command in a process of its own; return how it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output.txt"
    environment = {
        "MOEAPPS_RUNS": str(folder / "runs"),
        "MPLBACKEND": "Agg",
        TAPE: str(folder / "tape.jsonl"),
        STRIKE: str(strike or ""),
    }
    # One process imports everything, each run is a fork of it: imports would cost more than all the trainings.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.reliability.prepared"])
    process = context.Process(target=_work, args=([case.command, *case.words, *words], str(output), environment))
    process.start()
    process.join(PATIENCE_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise ChainError(f"{case.name}: a process was not done after {PATIENCE_S:.0f} s")
    ended = process.exitcode
    struck = strike is not None and (ended == -9 if strike.signal == "SIGKILL" else ended not in (0, -9))
    if not (struck if strike else ended == 0):
        tail = "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise ChainError(f"{case.name}: a process with the strike {strike} ended with {ended}:\n{tail}")
    return ended


def _work(words: list[str], output: str, environment: dict[str, str]) -> None:
    """What the process does."""
    import torch

    from moeapps.cli import main

    os.environ.update(environment)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts behind itself ignore Ctrl-C
    sys.exit(main(words))


def measure(case: Case, seed: int) -> dict[str, Any]:
    """Run the chain of a case in a folder that is gone afterwards; return its outcome."""
    with tempfile.TemporaryDirectory(prefix="moeapps-faults-") as folder:
        return chain(case, Path(folder), seed=seed).as_dict()
