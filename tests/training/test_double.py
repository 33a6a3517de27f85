# SPDX-License-Identifier: Apache-2.0
"""Every system in double precision: batches are converted, and nothing of a step or a report is of another width."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch

from moeapps.cli import main
from moeapps.data.gather import Rows
from moeapps.training.checkpoints import read_checkpoint
from tests.systems import BASES, name, tiny


def kinds(base: type[Rows]) -> Iterator[type[Rows]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def test_no_batch_is_frozen() -> None:
    """Lightning sets the fields of a copy, and refuses frozen classes in a text that names none."""
    for path in (*Path("moeapps/data").rglob("*.py"), *Path("tasks").rglob("*.py")):
        if "(Rows)" in path.read_text(encoding="utf-8"):
            importlib.import_module(".".join(path.with_suffix("").parts))
    found = [kind for kind in kinds(Rows) if is_dataclass(kind)]
    ours = [kind for kind in found if kind.__module__.startswith(("moeapps.", "tasks."))]

    assert len(ours) > 5
    assert [kind.__name__ for kind in ours if kind.__dataclass_params__.frozen] == []


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES, ids=name)
def test_a_system_trains_and_tests_in_double_precision(base: Path, tmp_path: Path) -> None:
    # All batches: a training step of another kind, or a gate that is fitted between two, reads what no batch holds.
    words = ["fit", *tiny(base), "--trainer.precision", "64-true", "--trainer.limit_train_batches", "1.0"]
    assert main(words) == 0

    run = tmp_path / "runs" / base.stem / "base" / "version_0"
    assert (run / "metrics" / "test.json").is_file()
    held = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    assert {value.dtype for key, value in held.items() if key.startswith("net.") and value.is_floating_point()} == {
        torch.float64
    }
