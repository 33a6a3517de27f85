# SPDX-License-Identifier: Apache-2.0
"""What experts did, read from run folders that are written by hand."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from moeapps.reporting.findings import clearest, describe_run, gallery_of
from moeapps.reporting.view import read_run

EYE = [[100.0, 0.0], [0.0, 100.0]]
EVEN = [[50.0, 50.0], [50.0, 50.0]]


def layer(work, told, entropy=0.5):
    return {"num_experts": 2, "load_cv": 0.0, "entropy": entropy, "dead": 0.0, "mi_domain": told, "work": work}


def run_of(folder, layers, task="elsewhere.module.Task", **files):
    (folder / "metrics").mkdir(exist_ok=True)
    files["routing_test"] = {"domains": ["a", "b"], "layers": layers}
    files["test"] = {"header": {"task": task}, "rows": []}
    for name, content in files.items():
        (folder / "metrics" / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_run_says_what_each_layer_did_and_sums_it_up(tmp_path):
    layers = {"net.blocks.0.ffn": layer(EVEN, 0.0), "net.blocks.1.ffn": layer(EYE, 1.0)}
    found = describe_run(run_of(tmp_path, layers))
    assert [one.kinds[0] for one in found.layers] == ["even", "specialised"]
    assert found.sentence == (
        "In 1 of 2 MoE layers the experts specialise, most by domain in layer 2: the expert tells 100 % of it (expert "
        "0 takes 100 % of a, expert 1 takes 100 % of b); 1 of 2 MoE layers shares the work alike and follows nothing "
        "known; no expert is dead."
    )
    assert found.layers[1].numbers["entropy"] == 0.5
    assert found.notes == ()


@pytest.mark.parametrize(("per_row", "told"), [(2, True), (1, False), (None, False), (9, False), ("2", False)])
def test_every_table_of_a_layer_knows_how_many_experts_work_on_a_row(tmp_path, per_row, told):
    report = {**layer([[50.0, 50.0, 0.0], [0.0, 50.0, 50.0]], 0.4), "per_row": per_row}
    experts = {"work": {"experts.0": {"class": [[[60.0, 60.0, 0.0], [0.0, 60.0, 60.0]]]}}, "labels": {}}
    (found,) = describe_run(run_of(tmp_path, {"net.blocks.0.ffn": report}, experts=experts)).layers
    assert {table.factor for table in found.tables} == {"domain", "class"}
    for table in found.tables:
        assert table.most() == ("50 % is the most, as 2 experts work on each row" if told else "")


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (EYE, " are specialised by domain: the expert tells 100 % of it"),
        (EVEN, " are even: all 2 experts share the work alike"),
        ([[90.0, 0.0], [90.0, 0.0]], " have collapsed: expert 0 does all the work, the other is dead."),
        ([[90.0, 30.0], [90.0, 30.0]], " are uneven, yet not specialised"),
        ([[1.0, 2.0], [2.0, 1.0]], ": too little was routed (6 rows)"),
    ],
)
def test_a_run_of_one_layer_speaks_of_its_experts(tmp_path, work, words):
    told = 1.0 if work is EYE else 0.0
    found = describe_run(run_of(tmp_path, {"net.layer": layer(work, told)}))
    assert found.sentence.startswith(f"The 2 experts of its one MoE layer{words}")


@pytest.mark.parametrize(
    ("work", "told", "sentence"),
    [
        (
            EVEN,
            0.0,
            "The 2 experts of its one MoE layer all work on every row, as the layer is built: nothing is chosen.",
        ),
        (
            [[52.0, 48.0], [48.0, 52.0]],
            0.001,
            "The 2 experts of its one MoE layer all work on every row, and none counts more for some of them "
            "(at most 0.1 % of domain told by the expert).",
        ),
        ([[50.0], [50.0]], 0.0, "Its one MoE layer has one expert, always on: there is nothing to choose."),
    ],
)
def test_where_nothing_is_chosen_the_sentence_says_so(tmp_path, work, told, sentence):
    found = describe_run(run_of(tmp_path, {"net.layer": {**layer(work, told), "always": len(work[0]) > 1}}))
    assert found.sentence == sentence


def test_twins_of_one_expert_are_not_said_to_share_work(tmp_path):
    one = layer([[50.0], [50.0]], 0.0)
    found = describe_run(run_of(tmp_path, {"net.blocks.0.moe": one, "net.blocks.1.moe": one}))
    assert found.sentence == "Each of its 2 MoE layers has one expert, always on: there is nothing to choose."


def test_experts_that_always_work_and_follow_something_are_told_by_it(tmp_path):
    found = describe_run(run_of(tmp_path, {"net.layer": {**layer(EYE, 1.0), "always": True}}))
    assert found.layers[0].kinds == ("specialised",)


def test_the_factors_of_a_report_are_read_with_their_names_and_numbers(tmp_path):
    work = {"experts.0": {"colour": [[[80.0, 0.0], [20.0, 0.0]], [[0.0, 20.0], [0.0, 80.0]]]}}
    # over both domains: red [80, 20], blue [20, 80]
    report = {"domains": ["a", "b"], "experts.0": {"mi_colour": 0.278}, "labels": {"colour": ["red", "blue"]}}
    folder = run_of(tmp_path, {"net.blocks.0.ffn": layer(EVEN, 0.0)}, experts={**report, "work": work})
    found = describe_run(folder).layers[0]
    assert found.factor == "colour"
    assert found.numbers["told_colour"] == 0.278
    assert "expert 0 takes 80 % of red, expert 1 takes 80 % of blue" in found.sentence


def test_layers_of_two_stages_keep_their_own_tables(tmp_path):
    layers = {"net.encoder.0.proj": layer(EVEN, 0.0), "net.decoder.0.proj": layer(EVEN, 0.0)}
    work = {"encoder.0": {"class": [EYE]}, "decoder.0": {"class": [EVEN]}}
    found = describe_run(run_of(tmp_path, layers, experts={"domains": ["a"], "work": work}))
    assert [one.kinds[0] for one in found.layers] == ["specialised", "even"]


def test_the_gallery_of_a_task_brings_tables_of_its_own(tmp_path):
    partition = {"family": ["swing", "swing", "decay", "decay"] * 8, "expert": [0, 0, 1, 1] * 8, "ari": 1.0}
    layers = {"net.layer": layer(EVEN, 0.0)}
    folder = run_of(tmp_path, layers, task="tasks.dynamics.module.DynamicsTask", partition=partition)
    assert gallery_of(folder).__name__ == "tasks.dynamics.report.gallery"
    found = describe_run(folder).layers[0]
    assert found.factor == "hidden family"
    assert "adjusted Rand index of experts and families 1.00" in found.sentence
    assert "expert 0 takes 100 % of swing, expert 1 takes 100 % of decay" in found.sentence


def test_gates_of_tasks_are_told_by_what_they_choose_of_what_they_may_see(tmp_path):
    # click sees click, watch and shared; like sees like, talk and shared. By hand: own (0.1 + 0.5) / 2 = 30 %,
    # shared (0.7 + 0.3) / 2 = 50 %, the rest 20 %; a third each where weights are even.
    level = {
        "gates": ["click", "like"],
        "experts": ["watch", "click", "talk", "like", "shared"],
        "share": [[0.2, 0.1, 0.0, 0.0, 0.7], [0.0, 0.0, 0.2, 0.5, 0.3]],
    }
    work = [[10.0, 5.0, 10.0, 25.0, 50.0]] * 2
    layers = {f"net.levels.{k}.moe": layer(work, 0.0) for k in range(2)}
    task = "tasks.recommendation.module.RankingTask"
    found = describe_run(run_of(tmp_path, layers, task=task, experts={"levels": [level, level]}))
    story = (
        "the gates of click and like put 30 % of their weight on their own experts (click 10 % to like 50 %), 50 % on "
        "shared ones and 20 % on talk or watch, their category's (even weights: 33 : 33 : 33)"
    )
    assert found.notes == ()
    assert found.sentence == f"In layer 1 of 2 {story}; in layer 2 of 2 {story}; no expert is dead."
    assert (
        found.layers[0].sentence
        == f"{story}; the expert tells 0 % of the domain; expert shared takes 50 % of the work."
    )


def test_gates_without_experts_of_their_own_have_no_story():
    from tasks.recommendation.report.gallery import gate_story

    assert gate_story(["click", "like"], ["shared.0", "shared.1"], np.full((2, 2), 0.5)) == ""
    assert gate_story(["click"], ["click.0", "click.1"], np.full((1, 2), 0.5)) == ""  # nothing besides its own


def test_the_layer_to_look_at_first_is_the_one_that_follows_most(tmp_path):
    layers = {
        "net.0.moe": layer(EVEN, 0.0),
        "net.1.moe": layer(EYE, 1.0),
        "net.2.moe": layer([[90.0, 10.0], [10.0, 90.0]], 0.53),
    }
    found = describe_run(run_of(tmp_path, layers)).layers
    assert clearest(found) == 1
    assert clearest(found[:1] * 3) == 2


def test_a_task_that_is_not_installed_is_never_imported(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = run_of(tmp_path, {"net.layer": layer(EYE, 1.0)}, task="trap.Task")
    assert gallery_of(folder) is None
    assert describe_run(folder).layers[0].kinds == ("specialised",)
    assert "trap" not in sys.modules


def test_a_run_without_experts_says_so(tmp_path):
    found = describe_run(tmp_path)
    assert found.layers == ()
    assert found.sentence == "Nothing was routed in its test: the network has no experts, or it was not tested."


@pytest.mark.parametrize("text", ["", "{", "[]", '{"domains": ["a"], "layers": {"x": {"work": [[1]]}}}'])
def test_a_broken_routing_file_is_one_clear_line(tmp_path, text):
    run_of(tmp_path, {})
    (tmp_path / "metrics" / "routing_test.json").write_text(text)
    with pytest.raises(ValueError, match=r"routing_test\.json is not a routing file of moeapps"):
        describe_run(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"work": {"experts.0": {"class": [[[1, "x"]]]}}}'])
def test_a_broken_file_of_factors_is_a_note_and_costs_no_sentence(tmp_path, text):
    folder = run_of(tmp_path, {"net.blocks.0.ffn": layer(EYE, 1.0)})
    (folder / "metrics" / "experts.json").write_text(text)
    found = describe_run(folder)
    assert found.layers[0].kinds == ("specialised",)
    assert len(found.notes) == 1
    assert "left out" in found.notes[0]


GALLERY = """
from moeapps.reporting.exhibits import Room, Table

def gallery(folder):
    return [Room("Moves", "What was seen.", [Table("Moves", ["move", "times"], [["left", 3.0]])])]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A run of a package of the user's own that has a gallery."""
    package = tmp_path / "moves_of_mine"
    (package / "report").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "report" / "gallery.py").write_text(GALLERY)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "out").mkdir()
    yield run_of(tmp_path / "out", {"net.layer": layer(EYE, 1.0)}, task="moves_of_mine.module.Task")
    for name in [name for name in sys.modules if name.startswith("moves_of_mine")]:
        del sys.modules[name]


def test_a_gallery_of_the_users_own_is_imported_where_its_package_is_named(own):
    assert gallery_of(own) is None
    view = read_run(own)
    assert view.rooms == []
    assert "moves_of_mine has a gallery of its own for this run: moeapps report --trust moves_of_mine imports it." in (
        view.notes
    )
    assert not any(name.startswith("moves_of_mine") for name in sys.modules)

    view = read_run(own, packages=frozenset({"moves_of_mine"}))
    assert [room.title for room in view.rooms] == ["Moves"]
    assert not any("--trust" in note for note in view.notes)


def test_a_gallery_inside_of_a_run_is_never_imported(own, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "run.json").touch()  # what the package lies in is a run now
    assert gallery_of(own, frozenset({"moves_of_mine"})) is None
    assert not any(name.startswith("moves_of_mine") for name in sys.modules)
