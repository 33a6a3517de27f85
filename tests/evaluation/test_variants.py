# SPDX-License-Identifier: Apache-2.0
"""Which runs are one variant, which are pairs, and which are one training: by what was run, not by names and paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeapps.cli import main
from moeapps.evaluation.results import read_results
from moeapps.evaluation.statistics import paired_t_interval
from moeapps.evaluation.xeval import build_matrix
from moeapps.training.run import seeds_of, variant_hash
from tests.evaluation.xeval_common import write_run


def test_runs_are_one_variant_by_what_was_run_and_not_by_their_names(tmp_path: Path) -> None:
    values = [0.9, 0.7, 0.6, 0.5, 0.3]
    runs = [
        write_run(tmp_path / "1", values, variant="first", seed=0, variant_hash="aaaaaaaaaaaa"),
        write_run(tmp_path / "2", values, variant="again", seed=1, variant_hash="aaaaaaaaaaaa"),
        write_run(tmp_path / "3", values, variant="first", seed=1, variant_hash="bbbbbbbbbbbb"),
    ]

    matrix = build_matrix([read_results(path) for path in runs])

    assert [row.variant for row in matrix.rows] == ["toy/first#aaaaaa", "toy/first#aaaaaa", "toy/first#bbbbbb"]
    assert list(matrix.variants) == ["toy/first#aaaaaa"]


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b")])
def test_two_runs_of_one_seed_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    runs = [
        write_run(tmp_path / str(i), [1.0] * 5, variant=name, variant_hash="aaaaaaaaaaaa")
        for i, name in enumerate(names)
    ]

    with pytest.raises(ValueError, match="both have seed 0"):
        build_matrix([read_results(path) for path in runs])
    with pytest.raises(ValueError, match="both have seed 0"):
        build_matrix([read_results(runs[0])], [read_results(runs[1])])


def test_seeds_of_the_data_count_as_seeds_and_other_test_data_is_said(tmp_path: Path) -> None:
    def run(name: str, data_seed: int, variant: str) -> Any:
        seeds = {"seed_everything": 0, "data.init_args.data_seed": data_seed, "data.init_args.seed": 0}
        values = [0.5 + 0.1 * (variant == "a"), 0.5, 0.5, 0.5, 0.5]
        return read_results(write_run(tmp_path / name, values, variant=variant, variant_hash=variant * 12, seeds=seeds))

    matrix = build_matrix([run("1", 1, "a"), run("2", 2, "a")], [run("4", 2, "b"), run("3", 1, "b")])

    assert matrix.differences[0].over == "seeds"
    assert [note for note in matrix.notes if "data.init_args.data_seed differs" in note]
    apart = build_matrix([run("5", 1, "a")], [run("6", 2, "b")])
    assert any("share no seed" in note for note in apart.notes)


def sown(folder: Path, variant: str, seeds: dict[str, int], value: float) -> Any:
    told = {"seed_everything": 0, **seeds}
    return read_results(write_run(folder, [value] * 5, variant=variant, variant_hash=variant * 12, seeds=told))


def test_runs_of_one_seed_and_several_data_seeds_pair_by_both_and_none_is_dropped(tmp_path: Path) -> None:
    values = {("a", 1): 0.5, ("a", 2): 0.7, ("b", 1): 0.4, ("b", 2): 0.5}
    runs = {}
    for (variant, seed), value in values.items():
        own = {"model.init_args.deal_seed": seed} if variant == "a" else {}  # which its baseline has not
        seeds = {"data.init_args.seed": seed, **own}
        runs[variant, seed] = sown(tmp_path / f"{variant}{seed}", variant, seeds, value)

    matrix = build_matrix([runs["a", 1], runs["a", 2]], [runs["b", 2], runs["b", 1]])

    found = {d.column: d for d in matrix.differences}["a"]
    expected = paired_t_interval([0.5, 0.7], [0.4, 0.5])
    assert (found.over, found.interval.n) == ("seeds", 2)
    assert (found.interval.mean, found.interval.low) == (pytest.approx(expected.mean), pytest.approx(expected.low))


def test_a_variant_that_does_not_tell_its_data_seeds_does_not_unpair_the_others(tmp_path: Path) -> None:
    seeds = {"data.init_args.data_seed": 1}, {"data.init_args.data_seed": 2}
    ours, base = ([sown(tmp_path / f"{v}{i}", v, s, 0.5) for i, s in enumerate(seeds)] for v in "ab")
    silent = sown(tmp_path / "c", "c", {}, 0.5)

    with pytest.raises(ValueError, match=r"b0 and \S+b1 differ by data.init_args.data_seed alone, which not every run"):
        build_matrix([*ours, silent], base)
    matrix = build_matrix([*ours, silent], base[:1])
    assert {d.variant: d.interval.n for d in matrix.differences if d.column == "a"} == {"toy/a": 0, "toy/c": 0}
    assert not [note for note in matrix.notes if "share no seed" in note]


def test_paths_that_are_spelt_apart_are_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("a", 0.5), ("b", 0.4)):
        write_run(tmp_path / "runs" / name, [value] * 5, variant=name, params_active=7, train_flops=9)
    monkeypatch.chdir(tmp_path)
    whole = str(tmp_path / "runs" / "b")

    for words in (["runs/a", "runs/b", "--baseline", whole], ["runs/a", whole, "runs/b", "runs/../runs/a"]):
        assert main(["xeval", *words, "--select", "--out", "out"]) == 0, capsys.readouterr().err
        written = json.loads((tmp_path / "out" / "xeval.json").read_text())
        assert [row["run"] for row in written["rows"]] in (["runs/a", "runs/b"], ["runs/a", whole])
        assert [cost["runs"] for cost in written["costs"]] == [1, 1]
        assert [choice["chosen"] for choice in written["choices"] if choice["rule"] == "oracle"] == [{"toy/a": 1}]


def test_a_run_and_its_continuation_are_one_training(tmp_path: Path) -> None:
    first = write_run(tmp_path / "base" / "version_0", [1.0] * 5, variant_hash="a" * 12)
    checkpoint = str(first / "checkpoints" / "last.ckpt")
    second = write_run(tmp_path / "base" / "version_1", [1.0] * 5, variant_hash="b" * 12, continued_from=checkpoint)

    with pytest.raises(ValueError, match="the two are one training"):
        build_matrix([read_results(second)], [read_results(first)])
    assert len(build_matrix([read_results(second)]).rows) == 1


def continuation(root: Path, version: int, told: str | None) -> Path:
    """A run, with what it says that it continued both in its results and in run.json."""
    folder = root / "toy" / "base" / f"version_{version}"
    write_run(folder, [1.0] * 5, variant_hash=str(version) * 12, continued_from=told)
    (folder / "run.json").write_text(json.dumps({"continued_from": told}))
    return folder


@pytest.mark.parametrize("given", ["relative", "absolute", "absolute, moved", "relative to another folder"])
def test_a_continuation_is_known_from_any_folder_and_over_a_run_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    before = {
        "relative": "runs",
        "absolute": str(tmp_path / "here" / "runs"),
        "absolute, moved": "/cluster/of/old/runs",
        "relative to another folder": "../scratch/runs",
    }[given]
    root, folders = tmp_path / "here" / "runs", []
    for version in range(3):
        told = f"{before}/toy/base/version_{version - 1}/checkpoints/last.ckpt" if version else None
        folders.append(continuation(root, version, told))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    runs = [read_results(folder) for folder in folders]
    for earlier, later in ((0, 1), (1, 2), (0, 2)):
        with pytest.raises(ValueError, match=rf"version_{later} continues \S+version_{earlier}: the two are one"):
            build_matrix([runs[later]], [runs[earlier]])
    assert runs[2].trained_before == folders[1::-1]


def test_a_chain_of_continuations_ends_where_runs_are_gone_damaged_or_come_round(tmp_path: Path) -> None:
    paths = [tmp_path / "toy" / "base" / f"version_{k}" / "checkpoints" / "last.ckpt" for k in range(3)]
    folders = [continuation(tmp_path, k, str(paths[(k + 1) % 3])) for k in range(3)]
    assert read_results(folders[0]).trained_before == folders[1:]
    (folders[2] / "run.json").write_text("{")
    assert read_results(folders[0]).trained_before == folders[1:]
    (folders[1] / "run.json").unlink()
    assert read_results(folders[0]).trained_before == folders[1:2]
    (folders[1] / "config.yaml").write_text(f"ckpt_path: {paths[2]}\n")
    assert read_results(folders[0]).trained_before == folders[1:]


def test_an_untrained_run_is_refused(tmp_path: Path) -> None:
    run = read_results(write_run(tmp_path / "r", [1.0] * 5, global_step=0))

    with pytest.raises(ValueError, match="never trained"):
        build_matrix([run])


def test_results_without_a_hash_are_told_apart_by_the_config_beside_them(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), [1.0] * 5, seed=i) for i in range(3)]
    for i, (path, width) in enumerate(zip(runs, (8, 8, 16), strict=True)):
        config = {"seed_everything": i, "model": {"init_args": {"width": width}}, "data": {"init_args": {"seed": i}}}
        (path / "config.yaml").write_text(yaml.safe_dump(config))

    matrix = build_matrix([read_results(path) for path in runs])

    assert [row.variant == matrix.rows[0].variant for row in matrix.rows] == [True, True, False]
    assert read_results(runs[1]).seeds == {"seed_everything": 1, "data.init_args.seed": 1}


def test_the_hash_of_a_variant_forgets_seeds_and_places_alone() -> None:
    def config(seed: int, width: int = 8, folder: str = "x", steps: int = 5) -> dict[str, Any]:
        data = {"init_args": {"data_seed": seed, "cache_dir": folder, "source": {"init_args": {"seed": seed}}}}
        model = {"init_args": {"width": width, "blocks": [{"init_args": {"deal_seed": seed}}]}}
        return {"seed_everything": seed, "model": model, "data": data, "trainer": {"max_steps": steps}}

    assert variant_hash(config(0)) == variant_hash(config(1, folder="y"))
    assert len({variant_hash(c) for c in (config(0), config(0, width=9), config(0, steps=6))}) == 3
    assert set(seeds_of(config(3)).values()) == {3}
    assert len(seeds_of(config(3))) == 4


def test_what_a_run_started_from_counts_by_its_own_hash_and_not_by_its_folder(tmp_path: Path) -> None:
    def hashed(*paths: str, **more: str) -> str:
        given = {"path": list(paths) if len(paths) > 1 else paths[0], **more}
        start = {"class_path": "moeapps.training.stages.FromCheckpoint", "init_args": given}
        return variant_hash({"system": "toy", "model": {"init_args": {"width": 8, "start": start}}})

    def source(name: str, hashed_as: str) -> str:
        folder = tmp_path / name / "version_0"
        (folder / "checkpoints").mkdir(parents=True)
        for file in ("best", "last"):
            (folder / "checkpoints" / f"{file}.ckpt").touch()
        (folder / "run.json").write_text(json.dumps({"variant_hash": hashed_as}))
        return str(tmp_path / name)

    one, other, third = source("s1", "a" * 12), source("s2", "a" * 12), source("s3", "b" * 12)
    best, last = (f"version_0/checkpoints/{name}.ckpt" for name in ("best", "last"))

    assert hashed(one) == hashed(other) == hashed(f"{other}/version_0")
    assert hashed(f"{one}/{best}") == hashed(f"{other}/{best}")
    assert hashed(one, third) == hashed(other, third)
    apart = [hashed(one), hashed(third), hashed(one, checkpoint="best"), hashed(f"{one}/{best}")]
    apart += [hashed(f"{one}/{last}"), hashed(one, third), hashed(third, one), hashed("gone/1"), hashed("gone/2")]
    assert len(set(apart)) == len(apart)
    assert variant_hash({"system": "toy", "model": {"init_args": {"start": None}}})


def test_callbacks_that_change_the_training_make_another_variant_and_those_that_look_on_do_not() -> None:
    def hashed(*callbacks: dict[str, Any]) -> str:
        return variant_hash({"system": "toy", "trainer": {"callbacks": list(callbacks) or None}})

    averaged = {"class_path": "moeapps.training.callbacks.AveragedWeights", "init_args": {"decay": 0.99}}
    report = {"class_path": "moeapps.training.callbacks.ExpertReport"}
    figures = {"class_path": "tasks.point_cloud.report.figures.ScanFigures", "init_args": {"scans": 2}}

    assert hashed() == hashed(report) == hashed(report, figures)
    assert hashed(averaged, report) == hashed(averaged) != hashed()
    assert hashed({**averaged, "init_args": {"decay": 0.9}}) != hashed(averaged)
    assert hashed({"class_path": "mine.Freeze", "init_args": {"seed": 1}}) == hashed(
        {"class_path": "mine.Freeze", "init_args": {"seed": 2}}
    )
