# SPDX-License-Identifier: Apache-2.0
"""A resumed run ends where the uninterrupted one ends, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from moeapps.commands.run import run

TOY = ["fit", "--config", "tests/toy.yaml", "--test_after_fit", "false"]


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("mixing", ["concat", "balanced", "one_domain"])
def test_resume_at_an_epoch_end_is_bit_equal(tmp_path: Path, mixing: str) -> None:
    flags = ["--data.mixing", mixing]
    whole = run([*TOY, *flags, "--trainer.max_epochs", "3"])
    keep = "--trainer.callbacks+=tests.toy.KeepEpochs"
    run([*TOY, *flags, keep, "--trainer.max_epochs", "3"])
    for epoch in (0, 1):
        checkpoint = tmp_path / "runs" / "toy" / "base" / "version_1" / "checkpoints" / f"epoch={epoch}.ckpt"
        resumed = run([*TOY, *flags, "--trainer.max_epochs", "3", "--ckpt_path", str(checkpoint)])

        assert resumed.trainer.global_step == whole.trainer.global_step
        assert_equal(resumed.model, whole.model)
