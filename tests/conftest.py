# SPDX-License-Identifier: Apache-2.0
"""Fixtures around every test, and the rule that a skip must be on the allow-list."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-skip", action="store_true", help="fail when a skipped test is not in tests/allowed_skips.txt"
    )


def _forbidden_skips(config: pytest.Config) -> list[pytest.TestReport]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    patterns = [line.split("#")[0].strip() for line in ALLOWED_SKIPS.read_text().splitlines()]
    skipped = [*reporter.stats.get("skipped", []), *reporter.stats.get("xfailed", [])] if reporter else []
    return [report for report in skipped if not any(p and fnmatch(report.nodeid, p) for p in patterns)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--fail-on-skip") and _forbidden_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--fail-on-skip"):
        return
    for report in _forbidden_skips(config):
        terminalreporter.write_line(f"FORBIDDEN SKIP {report.nodeid}: not in {ALLOWED_SKIPS.name}", red=True)


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
