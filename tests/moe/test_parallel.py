# SPDX-License-Identifier: Apache-2.0
"""Spread experts compute what one process computes: processes are started once, and run all laws.

The laws are in tests/moe/parallel_laws.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from moeapps.moe.parallel import expert_counts
from tests.moe.parallel_laws import LAWS

Told = dict[int, list[dict[str, str]]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, str]]]:
    """What each of so many processes says of each law; they are started when first asked for."""
    known: Told = {}

    def ask(world: int) -> list[dict[str, str]]:
        if world not in known:
            folder = tmp_path_factory.mktemp(f"of_{world}")
            command = [sys.executable, "-m", "tests.moe.parallel_laws", str(world), str(folder)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            with subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes) as process:
                try:
                    words, _ = process.communicate(timeout=300)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    words = f"not done after 300 s: {process.communicate()[0]}"
            files = [folder / f"{rank}.json" for rank in range(world)]
            assert all(file.is_file() for file in files), words[-3000:]
            known[world] = [json.loads(file.read_text()) for file in files]
        return known[world]

    return ask


def holds(told: list[dict[str, str]], law: str) -> None:
    """Fail with what the processes said; laws after the first that failed were not reached."""
    missing = [rank for rank, found in enumerate(told) if law not in found]
    assert not missing, f"processes {missing} did not come to it; an earlier law has failed"
    assert not any(found[law] for found in told), "\n".join(found[law] for found in told)


@pytest.mark.parametrize("law", LAWS)
def test_two_processes(told: Callable[[int], list[dict[str, str]]], law: str) -> None:
    holds(told(2), law)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_four_processes_of_which_one_has_no_rows(told: Callable[[int], list[dict[str, str]]], law: str) -> None:
    holds(told(4), law)


def test_experts_are_counted_out_as_torch_cuts() -> None:
    import torch

    for num_experts in range(1, 20):
        for ranks in range(1, num_experts + 1):
            wanted = [len(part) for part in torch.arange(num_experts).chunk(ranks)]
            if len(wanted) == ranks:
                assert expert_counts(num_experts, ranks) == wanted
            else:
                with pytest.raises(ValueError, match=f"spread them over {len(wanted)} processes or fewer"):
                    expert_counts(num_experts, ranks)
