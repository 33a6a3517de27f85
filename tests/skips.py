# SPDX-License-Identifier: Apache-2.0
"""``--fail-on-skip``: a skipped test that is not on the allow-list fails the run, whichever process skipped it."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-skip", action="store_true", help="fail when a skipped test is not in tests/allowed_skips.txt"
    )


def _forbidden_skips(config: pytest.Config) -> list[pytest.TestReport]:
    """Return the skips nobody allowed; the process with the terminal has the reports of all workers."""
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
