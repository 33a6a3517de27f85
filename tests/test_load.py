# SPDX-License-Identifier: Apache-2.0
"""``moeapps.load(run).predict(inputs)``: raw inputs get the answers that ``predict`` gives for the same items."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import moeapps
from moeapps.loading import Trained
from tests.load_common import make_run

pytestmark = pytest.mark.medium


def pair(system: str, tmp_path: Path, *overlays: Path) -> tuple[Any, Trained]:
    """The objects that wrote a run, and the run loaded again."""
    built = make_run(system, tmp_path / "run", *overlays)
    return built, moeapps.load(tmp_path / "run")


def test_scans_get_the_labels_of_the_test_and_their_order(tmp_path: Path) -> None:
    built, loaded = pair("point_moe", tmp_path)
    data, task = built.datamodule, built.model
    data.prepare_data()
    domain = data.present("seen")[0]
    scan = data.scans(domain, "test")[0]
    cloud = {"xyz": scan.pos, "intensity": scan.light / max(float(scan.light.max()), 1.0)}
    answer = loaded.predict(cloud)
    np.save(tmp_path / "scan.npy", scan.pos)

    assert answer["names"] == data.facts["label_sets"][domain]
    assert answer["label"].shape == (len(scan.pos),)
    assert 0 <= int(answer["label"].min()) <= int(answer["label"].max()) < len(answer["names"])
    shuffled = torch.randperm(len(scan.pos)).numpy()
    with torch.no_grad():  # what the task says of the tiles, put together by hand
        whole = torch.full((len(scan.pos),), -1)
        for batch in data.batches_of(cloud):
            (tile,) = task.predict_step(batch)
            whole[tile["raw_row"]] = tile["label"]
    assert torch.equal(answer["label"], whole)
    assert loaded.predict(tmp_path / "scan.npy")["label"].shape == answer["label"].shape
    assert loaded.predict(scan.pos[shuffled])["label"].shape == answer["label"].shape
    with pytest.raises(ValueError, match=r"scan of shape \(5, 2\)"):
        loaded.predict(np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"no such file"):
        loaded.predict(tmp_path / "none.ply")
    with pytest.raises(ValueError, match="unknown domain 'moon'"):
        loaded.predict(cloud, like="moon")


def test_classes_are_drawn_as_the_sampler_draws_them(tmp_path: Path) -> None:
    from tasks.image_diffusion.nets.samplers import sample

    built, loaded = pair("promoe", tmp_path)
    names, how = built.datamodule.facts["class_names"], built.model.sampling
    image = loaded.predict([names[2], 0], count=2)["image"]
    label, index = torch.tensor([2, 2, 0, 0]), torch.arange(4)
    wanted = sample(built.model, label, cfg=how.cfg, steps=how.steps, solver=how.solver, seed=how.seed, index=index)

    torch.testing.assert_close(image, wanted.detach())
    with pytest.raises(ValueError, match="no class 'zebrafish'"):
        loaded.predict("zebrafish")
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'colour'"):
        loaded.predict(0, colour="red")


def test_rows_of_a_table_get_the_probabilities_of_the_test(tmp_path: Path) -> None:
    built, loaded = pair("home", tmp_path)
    data = built.datamodule
    data.prepare_data()
    rows = data.get_dataset(data.present("seen")[0], "test").batch(torch.arange(9))
    schema = data.source.schema
    table = {name: rows.ids[:, j].numpy() for j, name in enumerate(schema.fields)}
    table |= {"dense": rows.dense.numpy()} if schema.dense_dim else {}
    for name, (ids, weight) in rows.bags.items():
        table |= {name: ids.numpy(), f"{name}_weight": weight.numpy()}
    with torch.no_grad():
        wanted = built.model.predict_step(rows)["probability"]
    np.savez(tmp_path / "rows.npz", **table)

    torch.testing.assert_close(loaded.predict(table)["probability"], wanted)
    torch.testing.assert_close(loaded.predict(tmp_path / "rows.npz")["probability"], wanted)
    first = next(iter(schema.fields))
    with pytest.raises(ValueError, match=f"lack the columns {first}"):
        loaded.predict({name: values for name, values in table.items() if name != first})
    with pytest.raises(ValueError, match=f"field {first!r} holds id 999999"):
        loaded.predict(table | {first: np.full(9, 999_999)})
    with pytest.raises(ValueError, match="columns of different lengths"):
        loaded.predict(table | {first: table[first][:4]})


def test_lists_get_the_probabilities_of_the_test(tmp_path: Path) -> None:
    built, loaded = pair("aw_moe", tmp_path)
    data = built.datamodule
    data.prepare_data()
    lists = data.get_dataset(data.present("seen")[0], "test").batch(torch.arange(6))
    inputs = {name: getattr(lists, name).numpy() for name in ("history", "candidates", "query", "profile")}
    with torch.no_grad():
        wanted = built.model.predict_step(lists)["probability"]

    torch.testing.assert_close(loaded.predict(inputs)["probability"], wanted)
    with pytest.raises(ValueError, match=r"history is \(6, 3\)"):
        loaded.predict(inputs | {"history": np.zeros((6, 3), np.int64)})


def test_a_new_system_is_adapted_to_and_rolled_out(tmp_path: Path) -> None:
    built, loaded = pair("mixer", tmp_path)
    data, task = built.datamodule, built.model
    data.prepare_data()
    new = data.trajectories(data.present("unseen")[0], "test")
    new = new.take(torch.tensor([0]))
    with torch.no_grad():
        wanted, found = task.predict_trajectories(new)
    answer = loaded.predict(new.support.x[0].numpy(), dt=float(new.dt), start=new.query.x[0, :, :1].numpy(),
                            steps=new.query.x.shape[2])  # fmt: skip

    torch.testing.assert_close(answer["x"], wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer["context"], found.context[0], rtol=1e-4, atol=1e-4)
    assert answer["expert"] == int(found.expert[0])
    short = loaded.predict(new.support.x[0].numpy(), dt=float(new.dt), steps=3)
    assert short["x"].shape[1] == 3
    with pytest.raises(ValueError, match=r"shape \(1, 4, 3\); give \(trajectories, samples, 2\)"):
        loaded.predict(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="dt=-1"):
        loaded.predict(np.zeros((4, 2)), dt=-1.0)


def test_prompts_are_drawn_and_clips_continued(tmp_path: Path) -> None:
    from tasks.audio.report.drawing import draw_codes, prompt_symbols, sounds

    built, loaded = pair("unimoe_audio", tmp_path)
    data, task = built.datamodule, built.model
    data.prepare_data()
    clip = data.clips(data.present("seen")[0], "test")[0]
    symbols = prompt_symbols(data.vocabulary, [clip.prompt], int(data.facts["prompt_symbols"]))
    codes = draw_codes(task.net, symbols, float(data.facts["frame_rate"]), task.answers.drawing,
                       domain=torch.zeros(1, dtype=torch.int64))  # fmt: skip
    answer = loaded.predict(str(clip.prompt))

    assert torch.equal(answer["codes"][0], codes[0])
    torch.testing.assert_close(answer["wave"][0], sounds(data.tokenizer, codes)[0])
    given = data.tokenizer.encode(clip.wave[None])[0][:, :4]
    wave = clip.wave[: round(4 / data.facts["frame_rate"] * data.facts["sample_rate"])]
    begun = loaded.predict([str(clip.prompt)], clips=[wave])["codes"][0]
    assert begun.shape[1] > loaded.data.tokenizer.encode(wave[None]).shape[2] > 0
    assert given.shape[0] == begun.shape[0]
    with pytest.raises(ValueError, match=r"unknown labels \['voice=nobody'\]"):
        loaded.predict("speech voice=nobody: la")
    with pytest.raises(ValueError, match="2 clips for 1 prompts"):
        loaded.predict("speech", clips=[None, None])


def test_images_of_a_new_domain_are_adapted_to_and_answered(tmp_path: Path) -> None:
    built, loaded = pair("meta_dmoe", tmp_path)
    data, task = built.datamodule, built.model
    data.prepare_data()
    name = data.present("unseen")[0]
    batch = data.collate([data.episodes(name, "test")[0]])
    answer = task.answer(batch, name)
    (episode,) = batch.episodes
    found = loaded.predict(episode.query.image.numpy(), support=episode.support.image.numpy())

    torch.testing.assert_close(found["logits"], answer.after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["before"], answer.before, rtol=1e-4, atol=1e-5)
    pixels = ((episode.query.image + 1) * 127.5).round().to(torch.uint8)
    torch.testing.assert_close(loaded.predict(pixels.numpy())["logits"].shape, answer.after.shape)
    with pytest.raises(ValueError, match=r"images of shape \(2, 5, 5\)"):
        loaded.predict(np.zeros((2, 5, 5)))
    with pytest.raises(ValueError, match="holds no picture"):
        loaded.predict(tmp_path)


# Errors, whatever the system --------------------------------------------------------------------------------------


def test_what_is_no_run_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder, there is no config"):
        moeapps.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="an empty run"):
        moeapps.load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tasks.recommendation.module.RankingTask", "nowhere.Task", "nowhere.Task: there is no package nowhere"),
        ("tasks.recommendation.module.RankingTask", "tasks.nowhere.Task", "there is no task package tasks.nowhere"),
        ("RankingTask", "Ranking", "no class 'tasks.recommendation.module.Ranking'; did you mean"),
        ("batch_size:", "batch_siz:", "data: unknown option 'batch_siz' of"),
        ("seed_everything:", "seed_everything: [", "config.yaml: while parsing"),
        (None, "[1]", "config.yaml holds no options"),
    ],
)
def test_a_wrong_config_is_one_error_of_a_line_or_two(tmp_path: Path, old: str | None, new: str, words: str) -> None:
    make_run("home", tmp_path)
    file = tmp_path / "config.yaml"
    text = file.read_text()
    assert old is None or old in text
    file.write_text(new if old is None else text.replace(old, new, 1))

    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        moeapps.load(tmp_path)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "errors of the parser stand above it"
    assert len(str(caught.value).splitlines()) <= 2


def test_a_version_without_weights_names_the_newest_that_has_them_and_a_run_is_that_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, whole in enumerate((True, True, False)):
        folder = tmp_path / f"version_{number}"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text("{}")
        if whole:
            (folder / "checkpoints" / "best.ckpt").touch()

    with pytest.raises(
        ValueError, match=rf"^{tmp_path / 'version_2'}: no checkpoint, .*; give {tmp_path / 'version_1'},"
    ):
        moeapps.load(tmp_path / "version_2")
    with pytest.raises(ValueError, match="missing: data, model"):
        moeapps.load(tmp_path)
    assert caplog.messages == [f"{tmp_path}: version_2 has no checkpoint; version_1 is taken"]


def test_a_package_that_hides_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").touch()
    code = f"import sys, moeapps; sys.path.insert(0, {str(tmp_path)!r}); moeapps.load('runs/x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert f"ValueError: {tmp_path / 'tasks'} hides the package `tasks` of moeapps; rename it" in done.stderr


def test_wrong_weights_are_named_and_nothing_else_is_unpickled(tmp_path: Path) -> None:
    make_run("home", tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    state = torch.load(best, weights_only=True)["state_dict"]
    first = next(name for name in state if name.startswith("net."))
    save_file({name: value for name, value in state.items() if name != first}, tmp_path / "less.safetensors")
    save_file(state | {first: torch.zeros(1, 2, 3, 4)}, tmp_path / "other.safetensors")
    torch.save({"state_dict": Path("x")}, tmp_path / "code.ckpt")
    (tmp_path / "torn.ckpt").write_bytes(best.read_bytes()[:5000])

    for file, words in {
        "less.safetensors": f"lacks {first}",
        "other.safetensors": f"another size: {first}",
        "code.ckpt": "damaged or no checkpoint",
        "torn.ckpt": "damaged or no checkpoint",
        "none.ckpt": "no such file",
    }.items():
        with pytest.raises(ValueError, match=words):
            moeapps.load(tmp_path / "run", checkpoint=tmp_path / file)
    best.unlink()
    with pytest.raises(ValueError, match="no checkpoint, looked for"):
        moeapps.load(tmp_path / "run")


def test_loading_and_predicting_leave_random_numbers_as_they_were(tmp_path: Path) -> None:
    make_run("promoe", tmp_path / "run")
    state = torch.get_rng_state()
    moeapps.load(tmp_path / "run").predict(0)

    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [None, "41"])
def test_loading_leaves_no_seed_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: str | None) -> None:
    """Lightning reads its seed, and whether to seed workers, from the environment of whatever comes later."""
    make_run("mixer", tmp_path / "run")
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(variable, raising=False)
        if seed is not None:
            monkeypatch.setenv(variable, seed)
    moeapps.load(tmp_path / "run")
    assert [os.environ.get(variable) for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")] == [seed, seed]


def test_the_package_itself_loads_no_torch() -> None:
    code = "import sys, moeapps; assert callable(moeapps.load); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_gate_that_was_fitted_brings_its_rows(tmp_path: Path) -> None:
    """A gate that partitions environments knows how many there are after its first fit, which a tiny run has not."""
    make_run("mixer", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    labels = next(name for name in state if name.endswith("partition.labels"))
    fitted = torch.arange(20) % 3
    save_file({**state, labels: fitted}, tmp_path / "fitted.safetensors")

    found = moeapps.load(tmp_path / "run", checkpoint=tmp_path / "fitted.safetensors")

    assert torch.equal(found.task.state_dict()[labels], fitted)
