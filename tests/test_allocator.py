# SPDX-License-Identifier: Apache-2.0
"""What the allocator is asked for, and that it does it: memory that was freed is not faulted in again."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from moeapps import allocator
from moeapps.commands import run

BLOCK, PAGE = 64 << 20, 4096
# Every round writes to each page of a block that it then frees.
ROUNDS = f"""
import resource
from moeapps.allocator import keep_freed_memory

def faults(rounds=4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        bytearray(b"x") * {BLOCK}
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
kept = keep_freed_memory()
bytearray(b"x") * {BLOCK}
print(int(kept), first, faults())
"""


def test_a_block_that_was_freed_is_used_again_without_a_fault_where_glibc_allocates() -> None:
    done = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True)

    kept, before, after = (int(word) for word in done.stdout.split())
    assert bool(kept) == (platform.libc_ver()[0] == "glibc")
    if kept:
        assert before >= 4 * BLOCK // PAGE
        assert after < BLOCK // PAGE // 100


def asked(monkeypatch: pytest.MonkeyPatch, answer: int = 1) -> list[tuple[int, int]]:
    """Put a recorder in place of the C library; return what it will have been asked."""
    calls: list[tuple[int, int]] = []

    def mallopt(name: int, value: int) -> int:
        calls.append((name, value))
        return answer

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(sys, "platform", "linux")
    return calls


def test_no_mapping_per_block_and_no_trimming_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = asked(monkeypatch)

    assert allocator.keep_freed_memory({}) is True
    assert calls == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD of glibc's malloc.h


def test_a_library_that_refuses_is_not_said_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, answer=0)

    assert allocator.keep_freed_memory({}) is False


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"MALLOC_CONF": ""}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=9"}],
)
def test_whoever_sets_the_allocator_himself_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    calls = asked(monkeypatch)

    assert allocator.keep_freed_memory(environment) is False
    assert allocator.keep_freed_memory({"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}) is True
    assert len(calls) == 2


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())  # as musl: no such function
    monkeypatch.setattr(sys, "platform", system)

    assert allocator.keep_freed_memory({}) is False


def test_a_training_command_asks_before_it_reads_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = asked(monkeypatch)
    monkeypatch.setattr(run, "take_trust", lambda words: pytest.fail("read") if not calls else sys.exit(3))
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)

    with pytest.raises(SystemExit):
        run.run(["fit"])
    assert calls == [(-4, 0), (-1, -1)]
