# SPDX-License-Identifier: Apache-2.0
"""``make fuzz``: tests named ``..._is_read_or_told`` at many cases, in guarded processes, with a record per reader.

Such a test is a hypothesis test that damages a file and reads it: anything but a sample or the one error of the reader
fails it. Where MOEAPPS_FUZZ is a number of cases, each of them runs that many, in processes of 2,500: a crash, a case
of five seconds, or memory of 256 MB is then a loss like any other exception. What was tried is kept in
``runs/fuzz/<reader>.json`` after every process, and the next ``make fuzz`` goes on from there with new seeds.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import re
import resource
import signal
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from moeapps.files import write_json
from tests.guarded import FREE_BYTES, silence

CASES, RECORDS = "MOEAPPS_FUZZ", "MOEAPPS_FUZZ_RECORDS"
NAMED = "_is_read_or_told"
CHUNK = 2500
SECONDS, WALL_SECONDS, MEMORY_MIB = 5.0, 120.0, FREE_BYTES / 2**20
"""A case may take so long of the processor, or of the clock (a file that never answers), and grow memory so much.

All cases of a process together grow it by no more than that: the bound is that of one, and files have some kilobytes.
"""
MOST_LOSSES = 3
_COUNTS: memoryview | None = None


def refused() -> None:
    """Count a case whose file was refused in one sentence; the others are read."""
    if _COUNTS is not None:
        _COUNTS[1] += 1


def watched() -> bool:
    """Whether this process is one of ``make fuzz``, whose crash, time and memory are watched from outside."""
    return _COUNTS is not None


@dataclass
class Record:
    """What is known of one reader.

    Args:
        reader: its name.
        test: the test that says what it promises.
        cases: damaged files tried.
        read: those that gave a sample.
        refused: those that gave the reader's one error.
        losses: those that gave anything else: kind, seed, number of the case in its process, message.
        processes: of up to 2,500 cases each; the number of one is its seed.
        cpu_seconds: all of them.
        commits: of the code that ran.
    """

    reader: str
    test: str
    cases: int = 0
    read: int = 0
    refused: int = 0
    losses: list[dict[str, Any]] = field(default_factory=list)
    processes: int = 0
    cpu_seconds: float = 0.0
    commits: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        """Where it is kept."""
        folder = Path(os.environ.get(RECORDS) or "runs/fuzz")
        return folder / f"{re.sub(r'[^a-zA-Z0-9]+', '_', self.test.rpartition('::')[2])}.json"

    def add(self, found: Found, commit: str) -> None:
        """Add what a process found."""
        lost = [{"seed": self.processes, **loss} for loss in found.losses]
        self.cases += found.cases
        self.refused += found.refused
        self.read += found.cases - found.refused - len(lost)
        self.losses += lost
        self.processes += 1
        self.cpu_seconds = round(self.cpu_seconds + found.cpu_seconds, 2)
        self.commits = list(dict.fromkeys([*self.commits, commit]))


@dataclass(frozen=True)
class Found:
    """What one process found: cases, those refused, its CPU seconds, and losses (``kind``, ``case``, ``message``)."""

    cases: int
    refused: int
    cpu_seconds: float
    losses: list[dict[str, Any]]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a fuzz test at the wanted number of cases in place of the few of ``make test``."""
    test = pyfuncitem.obj
    if not os.environ.get(CASES) or NAMED not in pyfuncitem.name or not hasattr(test, "hypothesis"):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    record = record_of(pyfuncitem)
    go_on(record, lambda most: guarded(lambda: _cases(test, arguments, most, record.processes)))
    if record.losses:
        told = "\n".join(f"{loss['kind']}, seed {loss['seed']}: {loss['message']}" for loss in record.losses)
        pytest.fail(
            f"{record.reader}: {told}\nOnce it is mended, delete {record.file}: it is tried anew", pytrace=False
        )
    return True


def record_of(item: pytest.Item, reader: str | None = None) -> Record:
    """Return what is known of the reader of a test.

    Args:
        item: the test.
        reader: a name that says more than the test's.
    """
    new = Record(reader or reader_name(item.name), item.nodeid)
    return Record(**json.loads(new.file.read_text(encoding="utf-8"))) if new.file.is_file() else new


def reader_name(test: str) -> str:
    """``test_a_damaged_image_file_is_read_or_told[.png]`` -> ``image file .png``."""
    words = test.replace(NAMED, "").removeprefix("test_").removeprefix("a_damaged_").replace("_", " ")
    return words.replace("[", " ").replace("]", "").strip()


def go_on(record: Record, work: Callable[[int], Found]) -> None:
    """Run processes until a record holds the wanted number of cases, or too many losses; keep it after each.

    Args:
        record: what is known.
        work: runs the next process, of at most so many cases.
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    while record.cases < int(os.environ[CASES]) and len(record.losses) < MOST_LOSSES:
        found = work(min(CHUNK, int(os.environ[CASES]) - record.cases))
        record.add(found, commit)
        write_json(record.file, asdict(record))
        if found.cases == 0:
            break


def _cases(test: Any, arguments: dict[str, Any], most: int, seed: int) -> None:
    """Run cases of a test in this process, each counted when it begins."""
    inner = test.hypothesis.inner_test
    failed = False

    @wraps(inner)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        assert _COUNTS is not None
        _COUNTS[0] += not failed  # hypothesis runs a case that fails once more, to tell of it
        try:
            return inner(*args, **kwargs)
        except hypothesis.errors.HypothesisException:  # a case that was no good: not drawn on
            raise
        except Exception:
            failed = True
            raise

    test.hypothesis.inner_test = counted
    test._hypothesis_internal_use_settings = hypothesis.settings(
        test._hypothesis_internal_use_settings,
        max_examples=most,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.seed(seed)(test)(**arguments)


def guarded(work: Callable[[], object]) -> Found:
    """Do work in a forked process that is watched; return what it counted and how it failed."""
    global _COUNTS
    _COUNTS = memoryview(mmap.mmap(-1, 16)).cast("q")  # shared with the process: cases begun, cases refused
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        gc.freeze()  # else the first collection of the process copies all that there is
        _give_back_free_memory()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads only wait for their terminal
            process = os.fork()
        if process == 0:
            _exit_after(work, told)
        gc.unfreeze()
        cause, status, cpu_seconds = _watch(process, _COUNTS)
        message = told.read_text(encoding="utf-8") if told.is_file() else ""
    if cause is None and os.WIFSIGNALED(status):
        cause = f"crash ({signal.Signals(os.WTERMSIG(status)).name})"
    elif cause is None and message:
        cause = "exception"
    losses = [] if cause is None else [{"kind": cause, "case": _COUNTS[0], "message": message[-2000:]}]
    found = Found(_COUNTS[0], _COUNTS[1], cpu_seconds, losses)
    _COUNTS = None
    return found


def _exit_after(work: Callable[[], object], told: Path) -> None:
    silence()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        work()
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        text = "".join(traceback.format_exception_only(error))  # with what hypothesis says of the case
        told.write_text(f"{Path(at.filename).name}:{at.lineno}: {text}", encoding="utf-8")
    finally:
        os._exit(0)


def _give_back_free_memory() -> None:
    """Return to the system what was allocated and freed: what a case takes of that would not be seen to grow."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep less
    if trim is not None:
        trim(0)


def _watch(process: int, counts: memoryview) -> tuple[str | None, int, float]:
    """Wait for a process; kill it where a case takes too long or too much. Return why, its status, its CPU seconds."""
    begun, at, clock, cpu = _memory_mib(process, "VmRSS"), counts[0], time.monotonic(), 0.0
    cause = None
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            return cause, status, usage.ru_utime + usage.ru_stime
        if counts[0] != at:
            at, clock, cpu = counts[0], time.monotonic(), _cpu_seconds(process)
        elif (at and _cpu_seconds(process) - cpu > SECONDS) or time.monotonic() - clock > WALL_SECONDS:
            cause = cause or "hang"
        if _memory_mib(process, "VmHWM") - begun > MEMORY_MIB:
            cause = cause or "memory"
        if cause is not None:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


def _memory_mib(process: int, name: str) -> float:
    """A line of a process's memory; 0 where it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(f"{name}:")), 0.0)


def _cpu_seconds(process: int) -> float:
    try:
        after_name = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")
