# SPDX-License-Identifier: Apache-2.0
"""Run cells: each in a process of its own with one thread, two at a time, resumable at any moment."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from moeapps.evidence.cells import CellError, CellResult, collect
from moeapps.evidence.grid import Cell, Grid
from moeapps.evidence.leases import Leases

COMMAND = (sys.executable, "-m", "moeapps")
LOG_TAIL = 20
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Failure:
    """A cell that gave no result, with the end of its log."""

    cell: Cell
    reason: str
    log: Path
    tail: str


def _end_with_parent() -> None:
    """Let Linux end a cell whose runner was killed: whoever takes the cell over must not meet it at work."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class _Job:
    cell: Cell
    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    started: float


@dataclass
class Runner:
    """Runs cells of a grid and hands each result over as soon as it is there.

    Args:
        grid: The grid.
        root: Working directory of the cells; configs are looked for there, and packages of one's own.
        work: Folder for runs and logs; ``<work>/<cell>/`` is emptied before the cell starts and its runs are removed
            after success.
        command: What to call; the words of the cell follow. Tests give a program of their own.
        jobs: Cells at a time.
        timeout_s: Wall seconds after which a cell is stopped and counts as failed.
        keep_runs: Leave the run folders (checkpoints, curves) of finished cells.
        leases: Where several processes share the grid: a cell that another one has is left to it.
    """

    grid: Grid
    root: Path
    work: Path
    command: Sequence[str] = COMMAND
    jobs: int = 2
    timeout_s: float = 3600.0
    keep_runs: bool = False
    leases: Leases | None = None
    _running: list[_Job] = field(init=False, repr=False, default_factory=list)

    def run(
        self,
        cells: Iterable[Cell],
        on_result: Callable[[CellResult], None],
        on_failure: Callable[[Failure], None],
        on_start: Callable[[Cell], None] = lambda cell: None,
    ) -> list[Cell]:
        """Run the cells; a failing one does not stop the others.

        Interrupted, it stops the running processes and leaves.

        Args:
            cells: Cells to run, in order.
            on_result: Called with each finished cell; it should store the result at once.
            on_failure: Called with each cell that gave none.
            on_start: Called when a cell starts.

        Returns:
            Cells that were left to other processes.
        """
        # A config that cannot be read fails before anything runs, not after an hour.
        queue = list(cells)
        of_variant = {name: self.grid.definition(name, self.root) for name in {cell.variant for cell in queue}}
        left: list[Cell] = []
        try:
            while queue or self._running:
                while queue and len(self._running) < self.jobs:
                    cell = queue.pop(0)
                    if self.leases is not None and not self.leases.take(cell):
                        left.append(cell)
                        continue
                    on_start(cell)
                    self._running.append(self._start(cell))
                for job in list(self._running):
                    outcome = self._poll(job, of_variant[job.cell.variant])
                    if isinstance(outcome, CellResult):
                        on_result(outcome)
                    elif outcome is not None:
                        on_failure(outcome)
                    if outcome is not None and self.leases is not None:
                        self.leases.release(job.cell)  # once its result is stored
                for failure in self._lost():
                    on_failure(failure)
                time.sleep(_POLL_S if self._running else 0.0)
        finally:
            self._stop_all()
            if self.leases is not None:
                self.leases.release_all()
        return left

    def _lost(self) -> list[Failure]:
        """Renew the leases; stop cells that another process has taken over, this one having slept for too long."""
        lost = [] if self.leases is None else self.leases.renew()
        found = []
        for job in [job for job in self._running if job.cell in lost]:
            self._stop(job)
            found.append(self._failure(job, "another process has taken it over"))
        return found

    def _start(self, cell: Cell) -> _Job:
        folder = self.work / cell.stem
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = folder / "log.txt"
        environment = {**os.environ, **_ONE_THREAD, "PYTHONHASHSEED": "0", "MPLBACKEND": "Agg"}
        environment["MOEAPPS_RUNS"] = str((folder / "runs").resolve())
        with log.open("wb") as stream:
            # A session of its own: loader workers can be stopped with it, and Ctrl-C reaches only this program.
            process = subprocess.Popen(
                [*self.command, *self.grid.arguments(cell)],
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        return _Job(cell, process, folder, log, time.monotonic())

    def _poll(self, job: _Job, definition: str) -> CellResult | Failure | None:
        """Give the outcome of a job that ended, or None."""
        pid, status, usage = os.wait4(job.process.pid, os.WNOHANG)
        if pid == 0:
            if time.monotonic() - job.started <= self.timeout_s:
                return None
            self._stop(job)
            return self._failure(job, f"stopped after {self.timeout_s:.0f} s")
        job.process.returncode = os.waitstatus_to_exitcode(status)
        self._running.remove(job)
        if job.process.returncode != 0:
            return self._failure(job, f"exit status {job.process.returncode}")
        try:
            cpu_s = usage.ru_utime + usage.ru_stime
            result = collect(job.folder / "runs", job.cell, system=self.grid.system, definition=definition, cpu_s=cpu_s)
        except CellError as error:
            return self._failure(job, str(error))
        if not self.keep_runs:
            shutil.rmtree(job.folder / "runs", ignore_errors=True)
        return result

    def _failure(self, job: _Job, reason: str) -> Failure:
        lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return Failure(job.cell, reason, job.log, "\n".join(lines[-LOG_TAIL:]))

    def _stop_all(self) -> None:
        for job in list(self._running):
            self._stop(job)

    def _stop(self, job: _Job) -> None:
        """Stop a cell and whatever it started: first politely, then for good."""
        self._running.remove(job)
        for sign, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(job.process.pid, sign)
                job.process.wait(patience)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue
            return
