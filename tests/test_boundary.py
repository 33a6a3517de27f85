# SPDX-License-Identifier: Apache-2.0
"""Where errors meet people: which are told, in how many lines, with which exit code; which go on as defects."""

from __future__ import annotations

import errno
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch._utils import ExceptionWrapper

from moeapps.cli import main
from moeapps.commands.boundary import UsageError, guarded
from moeapps.data.archives import ArchiveError
from tests.toy import TOY, ToyData, ToyTask

ONE_EPOCH = [*TOY, "--trainer.max_epochs", "1", "--test_after_fit", "false", "--trainer.callbacks"]


def raises(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def from_worker(error: Exception) -> Callable[[], int]:
    """As torch's loader hands on what a worker process raised."""

    def work() -> int:
        try:
            raise error
        except Exception:
            ExceptionWrapper(where="in DataLoader worker process 3").reraise()
        return 0

    return work


def load_damaged() -> int:
    return len(torch.load("/dev/null", weights_only=True))


def load_of_another_network() -> int:
    torch.nn.Linear(2, 2).load_state_dict({"weight": torch.zeros(3, 2), "more": torch.zeros(1)})
    return 0


def label_beyond() -> int:
    return int(torch.nn.functional.cross_entropy(torch.zeros(1, 2), torch.tensor([9])))


def shapes() -> int:
    return int((torch.zeros(2, 3) @ torch.zeros(2, 3)).sum())


TOLD: list[tuple[Callable[[], int], list[str]]] = [
    (raises(UsageError("give --x")), ["error: give --x"]),
    (raises(ValueError("width=0; use 1 or more")), ["error: width=0; use 1 or more"]),
    (raises(MisconfigurationException("no GPU\n here")), ["error: no GPU here"]),
    (raises(OSError(errno.ENOSPC, "No space left on device", "a/b.npz")), ["error: a/b.npz: no space left on device"]),
    (raises(yaml.YAMLError("bad")), ["error: bad"]),
    (raises(pickle.UnpicklingError("bad")), ["error: bad"]),
    (from_worker(ValueError("clip 7 is empty\nremove it")),
     ["error: clip 7 is empty remove it (in DataLoader worker process 3)"]),
    (from_worker(FileNotFoundError(2, "No such file", "c.wav")),
     ["error: [Errno 2] No such file: 'c.wav' (in DataLoader worker process 3)"]),
]  # fmt: skip


@pytest.mark.parametrize(("work", "lines"), TOLD)
def test_what_was_written_for_people_is_told_alone_with_code_2(
    work: Callable[[], int], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(work) == 2
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize(
    ("work", "text", "function"),
    [
        (load_damaged, "", "load_damaged"),
        (load_of_another_network, "the weights are of another network: ", "load_of_another_network"),
        (label_beyond, "Target 9 is out of bounds", "label_beyond"),
        (shapes, "mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)", "shapes"),
        (lambda: int("four"), "invalid literal for int() with base 10: 'four'", "<lambda>"),
        (lambda: len(b"\xff".decode()), "'utf-8' codec can't decode byte 0xff", "<lambda>"),
        (lambda: len(Path("\0").read_bytes()), "embedded null byte", "<lambda>"),
    ],
)
def test_the_error_of_a_library_is_told_with_its_place_in_our_code(
    work: Callable[[], int], text: str, function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(work) == 2

    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {text}")
    assert len(first) > len("error: ")
    assert second.startswith("raised at tests/test_boundary.py:")
    assert second.endswith(f" ({function}); --debug shows the traceback")


@pytest.mark.parametrize("kind", [TypeError, KeyError, AttributeError, IndexError, AssertionError, ZeroDivisionError])
def test_a_defect_is_never_hidden(kind: type[Exception]) -> None:
    with pytest.raises(kind):
        guarded(raises(kind("defect")))


def test_debug_lets_every_error_pass() -> None:
    with pytest.raises(UsageError):
        guarded(raises(UsageError("x")), debug=True)


def test_the_outermost_tells_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: guarded(raises(ValueError("once")))) == 2
    assert capsys.readouterr().err == "error: once\n"


def interrupted_by_lightning() -> int:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (lambda: 0, 0),
        (raises(SystemExit(0)), 0),
        (raises(SystemExit(2)), 2),
        (raises(SystemExit("wrong")), 2),
        (raises(KeyboardInterrupt()), 130),
        (interrupted_by_lightning, 130),
        (raises(SIGTERMException()), 143),
    ],
)
def test_codes_are_those_of_a_shell(work: Callable[[], int], code: int) -> None:
    assert guarded(work) == code


# Through the command line --------------------------------------------------------------------------------------------


class BrokenItems(ToyData):
    """Data whose third seen domain is damaged.

    Args:
        where: ``prepare``, ``setup`` or ``item``.
    """

    def __init__(self, *, where: str = "item", **options: Any) -> None:
        super().__init__(**options)
        self.where = where

    def prepare_data(self) -> None:
        self._break("prepare")

    def setup(self, stage: str) -> None:
        self._break("setup")

    def collate(self, items: list[Any]) -> Any:
        self._break("item")
        return super().collate(items)

    def _break(self, where: str) -> None:
        if self.where == where:
            raise ValueError(f"file 7 is damaged ({where}); fetch it again")


class BrokenStep(ToyTask):
    """A task whose step meets a value that it refuses."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        raise ValueError("label 9 is none of 2 classes; correct the labels")


@pytest.mark.medium
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--data.where", "prepare"], "file 7 is damaged (prepare); fetch it again"),
        (["--data.where", "setup"], "file 7 is damaged (setup); fetch it again"),
        (["--data.where", "item"], "file 7 is damaged (item); fetch it again"),
        (["--data.where", "item", "--data.num_workers", "1", "--trainer.num_sanity_val_steps", "0",
          "--trainer.enable_model_summary", "false"],
         "file 7 is damaged (item); fetch it again (in DataLoader worker process 0)"),
        (["--data.where", "none", "--model", "tests.test_boundary.BrokenStep"],
         "label 9 is none of 2 classes; correct the labels"),
        (["--data.where", "none", "--trainer.accelerator", "cuda"], "`CUDAAccelerator` can not run on your system"),
        (["--data.where", "none", "--trainer.devices", "0"], ""),
        (["--data.where", "none", "--trainer.precision", "bf17"], ""),
    ],
)  # fmt: skip
def test_wherever_it_arises_it_ends_in_one_or_two_lines(
    flags: list[str], line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.yaml"
    data.write_text("data: {class_path: tests.test_boundary.BrokenItems}")
    assert main(["fit", *TOY, "--config", str(data), "--trainer.max_epochs", "1", *flags]) == 2

    told = capfd.readouterr().err.split("error: ")[-1]
    assert told.startswith(line)
    assert len(told.splitlines()) <= 2
    assert "Traceback" not in told


@pytest.fixture
def _restored_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.medium
@pytest.mark.usefixtures("_restored_signals", "no_routing_figures")
@pytest.mark.parametrize(("callback", "code"), [("PressCtrlC", 130), ("SendSigterm", 143)])
def test_a_training_that_a_signal_stops_has_the_code_of_a_shell(callback: str, code: int) -> None:
    assert main(["fit", *ONE_EPOCH, f"{{class_path: tests.toy_callbacks.{callback}, init_args: {{step: 2}}}}"]) == code


@pytest.mark.parametrize("error", [ValueError("a.wav is damaged"), ArchiveError("a.wav is damaged")])
def test_commands_of_tasks_tell_in_a_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> int:
        raise error

    monkeypatch.setattr("moeapps.commands.hooks._hand_over", broken)
    assert main(["sample", "--run", "anywhere"]) == 2
    assert capsys.readouterr().err == "error: a.wav is damaged\n"


@pytest.mark.parametrize("words", [["list", "x"], ["xeval", "nowhere"], ["data", "prepare", "nothing"]])
def test_small_commands_tell_in_a_line(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "moeapps", *words], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
