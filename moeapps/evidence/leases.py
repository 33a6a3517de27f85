# SPDX-License-Identifier: Apache-2.0
"""Who runs which cell: of processes that share a folder, on one machine or several, one at a time runs a cell.

A lease is a small file that only one process can create. Its owner touches it while it works; one that was not touched
for its time is of a dead process, and another takes the cell over by the lease of the next number, which again only one
can create. Nothing is ever changed or removed by anybody but its owner, so that nothing can be taken twice. A finished
cell is written before its lease goes: whoever gets a lease looks for the cell once more.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from moeapps.evidence.grid import Cell

LEASE_S = 600.0
_ENDING = ".lease"
_RENEWALS = 10  # in the time of a lease


class Leases:
    """The leases of one process.

    Args:
        folder: where all processes keep them.
        finished: whether a cell is there, and needs no run.
        lease_s: seconds after which a lease that nobody touched is of a dead process.
    """

    def __init__(self, folder: Path, finished: Callable[[Cell], bool], lease_s: float = LEASE_S) -> None:
        self.folder = folder
        self.finished = finished
        self.lease_s = lease_s
        self._held: dict[Cell, Path] = {}
        self._renewed = time.monotonic()

    def take(self, cell: Cell) -> bool:
        """Take a cell; False where another process has it, or where it is finished."""
        if self.finished(cell):
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self._newest(cell)
        if before is not None and not self._dead(before[1]):
            return False
        path = self.folder / f"{cell.stem}.{0 if before is None else before[0] + 1}{_ENDING}"
        try:
            with path.open("x", encoding="utf-8") as stream:
                json.dump(_myself(), stream)
        except FileExistsError:
            return False
        self._held[cell] = path
        if self.finished(cell):  # since the first look
            self.release(cell)
            return False
        return True

    def renew(self) -> list[Cell]:
        """Touch the leases from time to time; give the cells that another process has taken over meanwhile."""
        if time.monotonic() - self._renewed < self.lease_s / _RENEWALS:
            return []
        self._renewed = time.monotonic()
        lost = []
        for cell, path in self._held.items():
            newest = self._newest(cell)
            if newest is None or newest[1] != path:
                lost.append(cell)
            else:
                os.utime(path)
        return lost

    def release(self, cell: Cell) -> None:
        """Give a cell back: its lease goes, after those of dead processes that had it before."""
        path = self._held.pop(cell, None)
        if path is None:
            return
        own = _number(path)
        for number, old in sorted(self._all(cell).items()):
            if number <= own:
                with suppress(FileNotFoundError):
                    old.unlink()

    def release_all(self) -> None:
        """Give every cell back."""
        for cell in list(self._held):
            self.release(cell)

    def running(self, cell: Cell) -> bool:
        """Whether some process has a living lease of a cell."""
        newest = self._newest(cell)
        return newest is not None and not self._dead(newest[1])

    def _newest(self, cell: Cell) -> tuple[int, Path] | None:
        return max(self._all(cell).items(), default=None)

    def _all(self, cell: Cell) -> dict[int, Path]:
        found = {}
        for path in self.folder.glob(f"{cell.stem}.*{_ENDING}"):
            number = path.name.removesuffix(_ENDING)[len(cell.stem) + 1 :]
            if number.isdigit():  # else of a cell whose name begins alike
                found[int(number)] = path
        return found

    def _dead(self, path: Path) -> bool:
        """Whether the owner of a lease is gone: its process has ended here, or it has not touched it for its time."""
        try:
            age = self._now() - path.stat().st_mtime
            owner: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False  # given back just now; the next look will tell
        except ValueError:
            return age > self.lease_s  # its owner is about to write into it, or never will
        here = owner.get("place") == _place() != ""
        return age > self.lease_s or (here and _born(int(owner.get("pid", 0))) != owner.get("born"))

    def _now(self) -> float:
        """The time by the clock that stamps the files, which may be another machine's."""
        clock = self.folder / f".clock-{os.getpid()}-{id(self)}"
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink(missing_ok=True)
        return now


def _number(path: Path) -> int:
    return int(path.name.removesuffix(_ENDING).rpartition(".")[2])


def _myself() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), "born": _born(os.getpid()), "place": _place()}


def _place() -> str:
    """The kernel and the space of process numbers that a number of a process belongs to; empty where not told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """When a process began, in ticks of the kernel: a number that another process has taken since began later."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
