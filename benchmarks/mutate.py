# SPDX-License-Identifier: Apache-2.0
"""Break core and training on purpose: ``python -m benchmarks.mutate`` fails if their own tests do not notice.

Every mutation (modules ``benchmarks.mutations*``) is applied alone to a copy of the tree; then the tests most likely to
see it run, and all of tests/moe or tests/training if those do not. A mutation that no test kills is a law that nobody
tests. A mutation whose text is not found exactly once is an error: the code has moved on and the mutation must follow.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.mutations import CORE_MUTATIONS, Mutation
from benchmarks.mutations_callbacks import CALLBACKS, SCORES
from benchmarks.mutations_training import OPTIMISATION, TASK

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = CORE_MUTATIONS + TASK + OPTIMISATION + SCORES + CALLBACKS
_COPIED = ("moeapps", "tasks", "tests", "configs", "pyproject.toml")
_TIMEOUT_S = 300.0
_FAILED, _PASSED = 1, 0


class MutationError(RuntimeError):
    """A mutation that cannot be applied, or tests that say nothing about mutations."""


@dataclass(frozen=True)
class Outcome:
    """What became of one mutation.

    Args:
        mutation: The mutation.
        killer: Name of the test that failed, ``timeout``, or None if the mutation survived.
        seconds: Wall time of its test runs.
    """

    mutation: Mutation
    killer: str | None
    seconds: float


def mutated(text: str, mutation: Mutation) -> str:
    """Give the text of a file with one mutation applied.

    Raises:
        MutationError: If the searched text is not there exactly once, or nothing would change.
    """
    found = text.count(mutation.search)
    if found != 1 or mutation.search == mutation.replace:
        raise MutationError(
            f"{mutation.name}: its search text is found {found} times in {mutation.path}, not once (or the replacement "
            "equals it); the code has changed, so write the mutation anew in benchmarks/mutations.py"
        )
    return text.replace(mutation.search, mutation.replace)


def copy_tree(root: Path, target: Path) -> None:
    """Copy what the core's tests need."""
    for name in _COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy2(source, target / name)


def run_tests(tree: Path, tests: Sequence[str], timeout_s: float = _TIMEOUT_S) -> tuple[int, str]:
    """Run tests in a tree until the first failure; give pytest's exit status (-1 after a timeout) and its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # Bytecode is matched to its source by time and size: two mutations within a second could share it.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a second less per run, of which there are hundreds
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return -1, ""
    return done.returncode, done.stdout + done.stderr


def killer_of(tree: Path, mutation: Mutation, tests: Sequence[str]) -> str | None:
    """Give the test that fails in a mutated tree, or None.

    Raises:
        MutationError: If pytest could not run the tests (the mutation breaks an import, or a test file is missing).
    """
    status, output = run_tests(tree, tests)
    if status == -1:
        return "timeout"
    if status == _PASSED:
        return None
    failed = [line.split()[1] for line in output.splitlines() if line.startswith("FAILED ")]
    if status != _FAILED or not failed:
        tail = "\n".join(output.splitlines()[-15:])
        raise MutationError(
            f"{mutation.name}: pytest ended with status {status} instead of passing or failing:\n{tail}"
        )
    return failed[0]


def try_mutation(tree: Path, mutation: Mutation) -> Outcome:
    """Apply a mutation to a tree, test, and put the tree right again."""
    path = tree / mutation.path
    original = path.read_text(encoding="utf-8")
    start = time.monotonic()
    path.write_text(mutated(original, mutation), encoding="utf-8")
    try:
        killer = killer_of(tree, mutation, mutation.tests) or killer_of(tree, mutation, all_tests(mutation))
    finally:
        path.write_text(original, encoding="utf-8")
    return Outcome(mutation, killer, time.monotonic() - start)


def all_tests(mutation: Mutation) -> tuple[str, ...]:
    """Give the tests of the package that a mutation breaks: tests/moe of moeapps/moe, and so on."""
    return (f"tests/{Path(mutation.path).parts[1]}",)


def check_clean(tree: Path, mutations: Sequence[Mutation]) -> None:
    """Make sure that the unchanged copy is what gets tested, and that it passes the tests that are to kill.

    Raises:
        MutationError: If it does not: every mutation would look killed.
    """
    where = [sys.executable, "-c", "import moeapps; print(moeapps.__file__)"]
    found = subprocess.run(where, cwd=tree, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).resolve().is_relative_to(tree.resolve()):
        raise MutationError(f"the copy's tests would import {found}; run this as 'python -m benchmarks.mutate'")
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    status, output = run_tests(tree, tests, timeout_s=10 * _TIMEOUT_S)  # all files at once
    if status != _PASSED:
        tail = "\n".join(output.splitlines()[-15:])
        raise MutationError(f"the tests fail without any mutation (pytest status {status}); mend them first:\n{tail}")


def run(mutations: Sequence[Mutation], *, root: Path = ROOT, jobs: int = 2, console: Console | None = None) -> int:
    """Try mutations in copies of a tree, print a table, and give the number of survivors."""
    console = console or Console(highlight=False, width=140)
    for mutation in mutations:
        mutated((root / mutation.path).read_text(encoding="utf-8"), mutation)
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(jobs):
            tree = Path(folder) / str(i)
            copy_tree(root, tree)
            trees.put(tree)
        check_clean(Path(folder) / "0", mutations)

        def attempt(mutation: Mutation) -> Outcome:
            tree = trees.get()
            try:
                outcome = try_mutation(tree, mutation)
            finally:
                trees.put(tree)
            console.print(f"{'killed  ' if outcome.killer else 'SURVIVED'} {mutation.name}", markup=False)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            outcomes = list(pool.map(attempt, mutations))
    console.print(_table(outcomes))
    survivors = [outcome.mutation for outcome in outcomes if outcome.killer is None]
    for mutation in survivors:
        console.print(f"SURVIVED {mutation.name} ({mutation.path}): {mutation.why}", markup=False)
    console.print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} mutations killed.")
    return len(survivors)


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("mutation", "file", "killed by", "s", box=None)
    for outcome in outcomes:
        path = outcome.mutation.path.removeprefix("moeapps/")
        killer = (outcome.killer or "SURVIVED").removeprefix("tests/")
        table.add_row(outcome.mutation.name, path, killer, f"{outcome.seconds:.0f}")
    return table


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutate", description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of mutations to try (* and ?)")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time (default 2)")
    options = parser.parse_args(words)
    chosen = [mutation for mutation in MUTATIONS if fnmatch.fnmatch(mutation.name, options.only)]
    if not chosen:
        parser.error(f"--only {options.only!r} matches none of: {', '.join(m.name for m in MUTATIONS)}")
    try:
        return min(1, run(chosen, jobs=options.jobs))
    except MutationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
