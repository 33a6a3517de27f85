# SPDX-License-Identifier: Apache-2.0
"""Commands of moeapps by several processes, in a row: torch and Lightning are imported once for all of them.

``python -m tests.launched FOLDER`` reads FOLDER/jobs.json, a list of [number of processes, words of a command], and
writes FOLDER/<i>.<rank>.json with the exit code and what was printed. Commands in a row that have the same number of
processes share these, as torchrun would start them; the process group outlives a command.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

Job = tuple[int, list[str]]


def run_jobs(folder: Path, jobs: Iterable[Job], seconds: int) -> None:
    """Run commands and hold that each ended with 0 on every process."""
    listed = list(jobs)
    (folder / "jobs.json").write_text(json.dumps(listed))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "MOEAPPS_RUNS": str(folder / "runs")}
    command = [sys.executable, "-m", "tests.launched", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    for i, (size, words) in enumerate(listed):
        for rank in range(size):
            file = folder / f"{i}.{rank}.json"
            assert file.is_file(), f"{words} did not end: {done.stdout[-3000:]}{done.stderr[-3000:]}"
            code, told = json.loads(file.read_text())
            assert code == 0, f"{words} on process {rank}: {told[-3000:]}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _process(rank: int, size: int, port: int, jobs: list[tuple[int, list[str]]], folder: Path) -> None:
    if size > 1:  # what torchrun sets
        place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        place |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": False}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    import torch

    from moeapps.cli import main

    torch.set_num_threads(1)
    for i, words in jobs:
        told = io.StringIO()
        with redirect_stdout(told), redirect_stderr(told):
            try:
                code = main([*words, "--debug"])
            except BaseException as error:
                import traceback

                traceback.print_exc()
                code = f"{type(error).__name__}: {error}"
        (folder / f"{i}.{rank}.json").write_text(json.dumps([code, told.getvalue()]))
        if code != 0:
            os._exit(1)  # the others may wait for this one


def main(folder: Path) -> None:
    import moeapps.commands.run  # noqa: F401 - imported once, before the processes are made
    import tests.toy  # noqa: F401

    fork = multiprocessing.get_context("fork")
    jobs = list(enumerate(json.loads((folder / "jobs.json").read_text())))
    for size, members in itertools.groupby(jobs, key=lambda job: job[1][0]):
        row, port = [(i, words) for i, (_, words) in members], _free_port()
        processes = [fork.Process(target=_process, args=(rank, size, port, row, folder)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
