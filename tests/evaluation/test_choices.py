# SPDX-License-Identifier: Apache-2.0
"""Rules of choosing among runs, counted by hand: what each may look at, and what that comes to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from moeapps.cli import main
from moeapps.evaluation.choices import Choice, choices
from moeapps.evaluation.results import RunResults, read_results
from moeapps.evaluation.statistics import t_interval
from moeapps.evaluation.xeval import build_matrix
from tests.evaluation.xeval_common import write_run


def chosen(paths: list[Path], metric: str = "acc") -> dict[str, Choice]:
    runs = [read_results(path) for path in paths]
    return {choice.rule: choice for choice in choices(runs, metric, table(runs, metric))}


def table(runs: list[RunResults], metric: str) -> dict[Path, dict[str, float]]:
    return {row.run: row.cells for row in build_matrix(runs, [], metric).rows}


def candidate(folder: Path, variant: str, seed: int, val: list[float], unseen: list[float], **more: Any) -> Path:
    """A run: [seen a, seen b, validation v] as validated, and unseen u and w as tested."""
    path = write_run(folder, [0.5, 0.5, val[2], *unseen], variant=variant, seed=seed, **more)
    roles = {"a": "seen", "b": "seen", "v": "validation"}
    write_run(folder, list(val), variant=variant, seed=seed, stage="val", roles=roles, **more)
    return path


@pytest.mark.parametrize("direction", ["max", "min"])
def test_every_rule_takes_what_it_may_see_and_nothing_else(tmp_path: Path, direction: str) -> None:
    sign = 1 if direction == "max" else -1
    val = {"x": [0.9, 0.7, 0.1], "y": [0.5, 0.5, 0.8], "z": [0.1, 0.1, 0.2]}  # x wins on seen, y on validation
    unseen = {"x": (0.2, 0.4), "y": (0.3, 0.5), "z": (0.9, 0.7)}  # z on unseen
    paths = [
        candidate(
            *(tmp_path / f"{n}{s}", n, s, [sign * v for v in val[n]], [sign * u, sign * (w + s / 10)]),
            direction=direction,
        )
        for n in val
        for s in (0, 1)
        for u, w in [unseen[n]]
    ]
    found = chosen(paths)
    assert {rule: choice.chosen for rule, choice in found.items()} == {
        "seen": {"toy/x": 2},
        "validation": {"toy/y": 2},
        "oracle": {"toy/z": 2},
    }
    # Means of u and w, by seed: x 0.3 and 0.35, y 0.4 and 0.45, z 0.8 and 0.85.
    for rule, values in (("seen", (0.3, 0.35)), ("validation", (0.4, 0.45)), ("oracle", (0.8, 0.85))):
        known, got = t_interval([sign * v for v in values]), found[rule].unseen
        assert got is not None
        assert (got.mean, got.low, got.high) == pytest.approx((known.mean, known.low, known.high))
    assert found["seen"].worst is not None
    assert found["seen"].worst.mean == pytest.approx(sign * 0.2)  # of u and w, both seeds


def test_seeds_choose_for_themselves(tmp_path: Path) -> None:
    scores = {("x", 0): 0.9, ("y", 0): 0.1, ("x", 1): 0.2, ("y", 1): 0.3}
    paths = [candidate(tmp_path / f"{n}{s}", n, s, [v, v, v], [v, v]) for (n, s), v in scores.items()]
    assert chosen(paths)["seen"].chosen == {"toy/x": 1, "toy/y": 1}


def test_curves_tell_the_seen_domains_up_to_the_step_whose_weights_were_tested(tmp_path: Path) -> None:
    for name, early, late in (("x", 0.6, 0.1), ("y", 0.5, 0.9)):
        path = write_run(tmp_path / name, [0.5, 0.5, 0.5, 0.5, 0.5], variant=name, global_step=10)
        curve = f"epoch,step,val/seen/acc,train/loss\n0,5,0.3,\n0,7,,1.0\n1,10,{early},\n2,15,{late},\n"
        (path / "metrics.csv").write_text(curve)
    found = chosen([tmp_path / "x", tmp_path / "y"])
    assert found["seen"].chosen == {"toy/x": 1}
    assert found["seen"].unseen is not None
    assert math.isnan(found["seen"].unseen.low), "one seed has no interval"
    assert found["validation"].chosen == {"toy/x": 1}, "the first of equals"


def test_curves_tell_the_weights_that_were_tested_and_not_those_that_training_ended_with(tmp_path: Path) -> None:
    for name, best, late in (("x", 0.6, 0.1), ("y", 0.5, 0.9)):
        # best.ckpt is of the first five steps, whose validation is logged with the fifth of them, counted from 0.
        path = write_run(tmp_path / name, [0.5] * 5, variant=name, global_step=10, tested_step=5)
        (path / "metrics.csv").write_text(f"epoch,step,val/seen/acc\n0,4,{best}\n1,5,{late}\n1,9,{late}\n")
    assert chosen([tmp_path / "x", tmp_path / "y"])["seen"].chosen == {"toy/x": 1}


def test_the_validation_of_another_checkpoint_than_the_tested_one_is_not_looked_at(tmp_path: Path) -> None:
    for name, best, last in (("x", 0.6, 0.1), ("y", 0.5, 0.9)):
        path = write_run(tmp_path / name, [0.5] * 5, variant=name, tested_step=5)
        roles = {"a": "seen"}
        (path / "metrics.csv").write_text(f"epoch,step,val/seen/acc\n0,4,{best}\n1,9,{last}\n")
        write_run(path, [last], variant=name, stage="val", roles=roles, tested_step=10)
    assert chosen([tmp_path / "x", tmp_path / "y"])["seen"].chosen == {"toy/x": 1}


def test_candidates_of_one_seed_are_those_of_one_data_seed_as_well(tmp_path: Path) -> None:
    scores = {("x", 1): 0.9, ("y", 1): 0.1, ("x", 2): 0.2, ("y", 2): 0.3}
    paths = []
    for (name, seed), value in scores.items():
        seeds = {"seed_everything": 0, "data.init_args.seed": seed}
        paths.append(candidate(tmp_path / f"{name}{seed}", name, 0, [value] * 3, [value] * 2, seeds=seeds))
    assert chosen(paths)["seen"].chosen == {"toy/x": 1, "toy/y": 1}


def test_what_cannot_be_followed_says_what_to_do(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, [0.5] * 5, variant=name) for name in "xy"]
    found = chosen(paths)
    assert found["seen"].note.endswith(f"make it with: moeapps validate --run {tmp_path / 'x'}")
    assert found["oracle"].chosen == {"toy/x": 1}


def test_damaged_curves_and_a_lonely_run_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_run(tmp_path / name, [0.5] * 5, variant=name) for name in "xy"]
    (paths[1] / "metrics.csv").write_text("step,val/seen/acc\n1,much\n")
    (paths[0] / "metrics.csv").write_text("step,val/seen/acc\n1,0.5\n")
    assert main(["xeval", *map(str, paths), "--select"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {paths[1] / 'metrics.csv'} is damaged")
    assert len(told.splitlines()) == 1
    assert main(["xeval", str(paths[0]), "--select"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing to choose between")
