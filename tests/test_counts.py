# SPDX-License-Identifier: Apache-2.0
"""Numbers that nothing can be made of are told by the name of their option, before data are read."""

from __future__ import annotations

import pytest

from moeapps.cli import main
from tests.systems import CONFIGS, tiny

NET = "model.init_args.net.init_args."
WRONG = [
    ("home", NET + "bank.init_args.meta_shared", "-1"),
    ("home", NET + "bank.init_args.meta_category", "-1"),
    ("home", NET + "bank.init_args.task_own", "-1"),
    ("home", NET + "bank.init_args.feature_gates", "-1"),
    ("home", NET + "bank.init_args.tower_dim", "0"),
    ("home", "data.init_args.source.init_args.scale_spread", "-1"),
    ("aw_moe", NET + "tower_dim", "0"),
    ("aw_moe", "data.init_args.source.init_args.strength", "-1"),
    ("promoe", NET + "num_heads", "-1"),
    ("promoe", "model.init_args.sampling.steps", "0"),
    ("promoe", "model.init_args.sampling.cfg", "-1"),
    ("mixer", NET + "substeps", "0"),
    ("mixer", "model.init_args.alternation.max_grad_norm", "0"),
]


@pytest.mark.parametrize(("system", "option", "value"), WRONG)
def test_a_number_of_nothing_is_told_by_its_name(
    system: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *tiny(CONFIGS / f"{system}.yaml"), f"--{option}={value}"]) == 2

    told = capsys.readouterr().err
    assert f"{option.rpartition('.')[2]}={value}" in told
