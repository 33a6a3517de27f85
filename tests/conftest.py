# SPDX-License-Identifier: Apache-2.0
"""The state around every test; which skips are allowed is said in tests/skips.py."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["tests.skips", "tests.fuzzing"]

# Lightning 2.6 calls what jsonargparse 5 will drop; the program says so too (moeapps.commands.run.quiet).
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

# The same cases in every `make test`, so that a failure is the change's; `make fuzz` draws new ones each time.
settings.register_profile("fixed", derandomize="MOEAPPS_FUZZ" not in os.environ)
settings.load_profile("fixed")


def pytest_collection_finish() -> None:
    """What lives as long as the session is not searched for cycles again and again: a twentieth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _clean_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seed, run on one thread, write only below ``tmp_path``, and restore the default dtype."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("MOEAPPS_RUNS", str(tmp_path / "runs"))
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def restored_signals() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt, and put back what it did before."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_routing_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures of the routing, a quarter of a short run; for tests that look at other things."""
    from moeapps.training.callbacks import RoutingMonitor

    monkeypatch.setattr(RoutingMonitor, "_draw", lambda *_, **__: None)
