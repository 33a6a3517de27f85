# SPDX-License-Identifier: Apache-2.0
"""Run something in a process of its own that may not crash, hang or fill memory: what came of it, in a few words."""

from __future__ import annotations

import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 5
FREE_BYTES, PER_BYTE = 256_000_000, 10


@dataclass(frozen=True)
class Outcome:
    """What came of a guarded call.

    Args:
        kind: ``value``, the name of the exception's class, ``hang`` or ``crash``.
        text: the exception's text; the signal of a crash.
        grown: bytes of memory that the process took beyond what it had.
    """

    kind: str
    text: str
    grown: int

    def within(self, size: int) -> bool:
        """Whether memory stayed below ten times a file's size and 256 MB."""
        return self.grown <= FREE_BYTES + PER_BYTE * size


def guarded(work: Callable[[], object], seconds: int = SECONDS) -> Outcome:
    """Run ``work`` in a copy of this process; it has so many seconds of processor, and sixty times as many in all.

    A process that was started with pytest's caches and torch loaded is copied, not started: a case takes milliseconds.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of copies of processes with threads
        child = os.fork()
    if child == 0:
        os.close(read)
        _child(work, write, seconds)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hang = number in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
        return Outcome("hang" if hang else "crash", signal.Signals(number).name, 0)
    kind, grown, text = told.split("\n", 2)
    return Outcome(kind, text, int(grown))


def attempted(work: Callable[[], object]) -> Outcome:
    """Run ``work`` in this process; for one that is watched already (``make fuzz``), in which a copy costs 26 ms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for people; pytest makes errors of them
        try:
            work()
        except BaseException as error:  # reported, whatever it is
            return Outcome(type(error).__name__, str(error), 0)
    return Outcome("value", "", 0)


def silence() -> None:
    """Throw away what this process and the libraries in it print."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def _child(work: Callable[[], object], write: int, seconds: int) -> None:
    silence()
    for number in (signal.SIGALRM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(60 * seconds)  # for what waits and does not work, such as an open pipe; other work may be in the way
    before = _resident()
    found = attempted(work)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) - before
    os.write(write, f"{found.kind}\n{max(0, grown)}\n{found.text[:2000]}".encode())
    os._exit(0)


def _resident() -> int:
    """Bytes of memory of this process now; its peak so far where the system does not say."""
    file = Path("/proc/self/statm")
    if file.is_file():
        return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
