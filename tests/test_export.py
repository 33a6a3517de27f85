# SPDX-License-Identifier: Apache-2.0
"""``moeapps export``: what is written answers as the run does, for every system; about.json says what is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moeapps
from moeapps.cli import main
from moeapps.commands.export import ONNX, _write_program
from moeapps.training.inputs import Program
from tests.load_common import make_run
from tests.systems import BASES

pytestmark = pytest.mark.medium

# Systems of which torch can and cannot trace a part; for the others about.json says what its version met.
TRACED, WHOLE = {"meta_dmoe", "mixer"}, {"point_moe"}
INPUTS: dict[str, Any] = {
    "point_moe": torch.rand(300, 3, generator=torch.Generator().manual_seed(1)).numpy() * 4,
    "promoe": [1],
    "mixer": torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(1)).numpy(),
    "unimoe_audio": "speech: la mo ti",
}


def inputs_of(system: str, run: moeapps.loading.Trained) -> Any:
    """Raw inputs of a system, made of its facts alone."""
    facts = run.task.facts
    if system == "meta_dmoe":
        return torch.rand(5, facts["channels"], facts["image_size"], facts["image_size"]).numpy()
    if system == "home":
        bags = {name: torch.ones(4, 2, dtype=torch.int64) for name in facts["bags"]}
        return (
            {name: torch.arange(4) % size for name, size in facts["fields"].items()}
            | bags
            | {"dense": torch.rand(4, facts["dense_dim"])}
        )
    if system == "aw_moe":

        def ids(fields: dict[str, int], *lead: int) -> torch.Tensor:
            number = 1 + torch.arange(torch.Size(lead).numel()).view(lead)
            return torch.stack([1 + number % (size - 1) for size in fields.values()], -1)

        parts = {"candidates": ids(facts["item_fields"], 2, 3), "history": ids(facts["item_fields"], 2, 0)}
        return parts | {f"{name}": ids(facts[f"{name}_fields"], 2) for name in ("query", "profile")
                        if facts[f"{name}_fields"]}  # fmt: skip
    return INPUTS[system]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict | list):
        pairs = (
            zip(one.values(), other.values(), strict=True) if isinstance(one, dict) else zip(one, other, strict=True)
        )
        return all(same(a, b) for a, b in pairs)
    return bool(one == other)


@pytest.mark.parametrize("system", [base.stem for base in BASES])
def test_an_exported_folder_answers_as_the_run_does(
    system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = make_run(system, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    said, about = capsys.readouterr().out, json.loads((tmp_path / "out" / "about.json").read_text())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    own = built.model.state_dict()

    assert set(weights) == set(own)
    assert all(torch.equal(weights[name].nan_to_num(), value.nan_to_num()) for name, value in own.items())
    assert sorted(about["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert about["parameters"] == sum(p.numel() for p in built.model.parameters())
    assert (about["system"], about["onnx"]) == (built.config.system, ONNX)
    run, out = moeapps.load(tmp_path / "run"), moeapps.load(tmp_path / "out")
    inputs = inputs_of(system, run)
    assert same(run.predict(inputs), out.predict(inputs))
    assert system not in TRACED or "program.pt2" in about["files"], about["program"]
    assert system not in WHOLE or "program.pt2" not in about["files"]
    if "program.pt2" in about["files"]:
        check_program(built.model, tmp_path / "out" / "program.pt2", about)
        assert about["program"]["covers"] in said
    else:
        assert about["program"]["why_not"] in said


def check_program(task: Any, file: Path, about: dict[str, Any]) -> None:
    """The program, read by torch alone, against the network at a batch size that it was not traced with."""
    program = task.eval().program()
    free = all(told["shape"][0] == "batch" for told in about["program"]["inputs"].values())
    inputs = [torch.cat([part, part.flip(0), part[:1]]) if free else part.flip(0) for part in program.inputs.values()]
    found = torch.export.load(file).module()(*inputs)
    with torch.no_grad():
        wanted = program.module(*inputs)

    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert list(about["program"]["inputs"]) == list(program.inputs)


class Counting(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / len(x)  # a Python number: the tracer takes the size for a constant


def test_a_network_of_one_batch_size_is_traced_at_the_size_of_its_examples(tmp_path: Path) -> None:
    about = _write_program(Program(Counting(), {"x": torch.ones(3, 2)}, "Shares."), tmp_path)

    assert about == {"covers": "Shares.", "inputs": {"x": {"shape": [3, 2], "dtype": "torch.float32"}}}


def test_errors_are_one_sentence_and_help_says_what_onnx_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    make_run("promoe", tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "run")]) == 2
    assert "is what is exported" in capsys.readouterr().err
    assert main(["export", "--help"]) == 0
    assert "No ONNX file is written" in capsys.readouterr().out
