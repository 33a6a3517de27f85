# SPDX-License-Identifier: Apache-2.0
"""What `make test` promises about a run, in one process and in two: no silent skip, no warning, a closing line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Every way to skip there is, beside tests that pass; `in_module` skips while it is collected.
SUITE = {
    "test_ways.py": '''
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason="by mark")
def test_marked():
    pass

def test_called():
    pytest.skip("by call")

@pytest.mark.xfail
def test_expected_to_fail():
    assert False
''',
    "test_in_module.py": 'import pytest\npytest.importorskip("no_such_module_anywhere")\n',
    "documented.py": '"""An example.\n\n>>> 1 + 1  # doctest: +SKIP\n3\n"""\n',
    "tests/tasks/recommendation/test_movielens.py": '''
import pytest

def test_real_log_is_on_the_list():
    pytest.skip("allowed")
''',
}  # fmt: skip
FORBIDDEN = {
    "documented.py::documented",
    "test_in_module.py",
    "test_ways.py::test_called",
    "test_ways.py::test_expected_to_fail",
    "test_ways.py::test_marked",
}


@pytest.fixture(params=["0", "2"], ids=["one process", "two workers"])
def jobs(request: pytest.FixtureRequest) -> list[str]:
    return ["-n", request.param]


def run_pytest(folder: Path, files: dict[str, str], *words: str) -> tuple[int, str]:
    """Write test files and run them under the project's own settings; return exit status and output."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    plugins = [word for name in ("xdist.plugin", "tests.skips", "no:cacheprovider") for word in ("-p", name)]
    settings = ["-c", "pyproject.toml", f"--rootdir={folder}", *plugins]
    command = [sys.executable, "-m", "pytest", *settings, "--doctest-modules", *words, str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a quarter of the time: other people's plugins start slowly
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_every_skip_that_is_not_on_the_list_fails_the_run_and_is_named(tmp_path: Path, jobs: list[str]) -> None:
    status, output = run_pytest(tmp_path, SUITE, "--fail-on-skip", *jobs)

    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert set(re.findall(r"FORBIDDEN SKIP (\S+):", output)) == FORBIDDEN
    assert re.search(r"1 passed, \d skipped, 1 xfailed in [\d.]+s", output.splitlines()[-1]), output


def test_an_allowed_skip_and_a_run_that_may_skip_pass(tmp_path: Path, jobs: list[str]) -> None:
    name = "tests/tasks/recommendation/test_movielens.py"
    status, output = run_pytest(tmp_path, {name: SUITE[name]}, "--fail-on-skip", *jobs)

    assert status == pytest.ExitCode.OK, output
    assert "FORBIDDEN" not in output


def test_a_warning_and_a_wrong_doctest_fail_in_workers_too(tmp_path: Path, jobs: list[str]) -> None:
    files = {
        "test_warns.py": "import warnings\n\ndef test_warns():\n    warnings.warn('careless')\n",
        "wrong.py": '"""An example.\n\n>>> 1 + 1\n3\n"""\n',
    }
    status, output = run_pytest(tmp_path, files, *jobs)

    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "UserWarning: careless" in output
    assert "2 failed in" in output.splitlines()[-1]
