# SPDX-License-Identifier: Apache-2.0
"""Every file under configs/ parses; every base config and baseline runs; paper sizes have the published counts."""

from __future__ import annotations

import inspect
import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from moeapps.cli import main
from moeapps.commands.messages import option_names
from moeapps.commands.run import Cli, import_tasks, quiet, run
from moeapps.training.callbacks import PredictionWriter
from tasks.image_diffusion.model import LATENTS
from tasks.point_cloud.data.features import IN_DIM
from tests.systems import BASELINES, BASES, OTHERS, PAPERS, base_of, flags, name, tiny
from tests.update_golden import GOLDEN, first_losses

pytestmark = pytest.mark.medium

# The figures of a system cost more than its two steps; once per base config is enough.
QUICK = ["--trainer.callbacks", "null"]


@cache
def parsed(*files: Path) -> dict[str, object]:
    """Return the whole configuration that files give together; two tests ask for each of the large ones."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main(["fit", *flags(*files), "--print_config"]) == 0, err.getvalue()
    return yaml.safe_load(out.getvalue())


def bases_for(overlay: Path) -> list[Path]:
    """Return the base config of the overlay's name, else all, the one that its text names first."""
    bases = BASES or [Path("tests/toy.yaml")]
    text = overlay.read_text(encoding="utf-8")
    return [base for base in bases if overlay.stem == base.stem] or sorted(
        bases, key=lambda base: (f"configs/{base.name}" not in text, package(base) not in text)
    )


def package(base: Path) -> str:
    """Return the package of a base config's task, such as ``tasks.point_cloud``."""
    found = re.search(r"tasks\.\w+", base.read_text(encoding="utf-8"))
    return found[0] if found else str(base)


@pytest.mark.parametrize("path", [*BASES, *BASELINES, *PAPERS, *OTHERS], ids=name)
def test_file_begins_with_a_line_that_says_what_it_is(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]

    assert first.startswith("# ")
    assert 30 <= len(first) <= 132


@pytest.mark.parametrize("path", [*BASES, *BASELINES, *PAPERS], ids=name)
def test_weights_of_auxiliary_losses_are_for_each_layer_as_in_the_codes_they_come_from(path: Path) -> None:
    model = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("model", {}).get("init_args", {})
    for loss in model.get("aux_losses") or []:
        named = loss["init_args"].get("reduction")
        # The sums of the image task are the classes' own; a loss of the core says what it does with several layers.
        assert named == "sum" or (named is None and loss["class_path"].startswith("tasks.")), loss


@pytest.mark.parametrize("path", BASES, ids=name)
def test_base_config_parses_and_names_its_system(path: Path) -> None:
    config = parsed(path)

    assert config["system"] == path.stem
    assert config["seed_everything"] == 0


@pytest.mark.parametrize("path", BASES, ids=name)
def test_base_config_has_all_three_roles(path: Path) -> None:
    quiet()
    import_tasks(flags(path))
    built = Cli(flags(path), run=False)

    assert all(built.datamodule.roles[role] for role in ("seen", "validation", "unseen"))
    assert built.model.monitor.startswith("val/validation/")


def named(path: str) -> type:
    """Return the class of a class path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", BASES, ids=name)
def test_the_network_is_made_from_the_facts_and_every_option_of_it_is_shown(path: Path) -> None:
    model = parsed(path)["model"]
    net = model["init_args"]["net"]
    options = inspect.signature(named(net["class_path"])).parameters
    task = inspect.signature(named(model["class_path"])).parameters

    assert task["net"].annotation.startswith("Callable[[dict[str, Any]], ")
    assert next(iter(options)) == "facts"
    assert set(net["init_args"]) == set(option_names(named(net["class_path"])))  # those of its base classes, too
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown):
        assert main(["fit", "--model.help", model["class_path"]]) == 0
        assert main(["fit", *flags(path), "--model.init_args.net.help", net["class_path"]]) == 0
    assert [option for option in net["init_args"] if f".{option}" not in shown.getvalue()] == []


@pytest.mark.parametrize("path", [*BASES, *BASELINES, *PAPERS, *OTHERS], ids=name)
def test_no_number_of_the_data_is_typed_for_the_network(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    model = config.get("model", {}).get("init_args", {})
    facts = {"in_dim", "image_size", "channels", "num_classes", "state_dim", "num_environments"}

    assert facts & set(re.findall(r"'(\w+)':", str(model))) == set()


@pytest.mark.parametrize("path", PAPERS, ids=name)
def test_paper_size_parses_and_has_a_name_of_its_own(path: Path) -> None:
    config = parsed(base_of(path), path)

    assert config["name"] != "base"
    assert config["system"] == base_of(path).stem


@pytest.mark.parametrize("path", OTHERS, ids=name)
def test_overlay_parses_with_a_base(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everywhere = path.parent.name in ("trainer", "logger", "debug")
    outcomes = (main(["fit", *flags(base, path), "--print_config"]) == 0 for base in bases_for(path))

    assert all(outcomes) if everywhere else any(outcomes), capsys.readouterr().err


@pytest.mark.parametrize("path", BASES, ids=name)
def test_base_config_fits_tests_and_predicts(path: Path, tmp_path: Path) -> None:
    assert main(["fit", *tiny(path)]) == 0

    folder = tmp_path / "runs" / path.stem / "base" / "version_0"
    results = json.loads((folder / "metrics" / "test.json").read_text())
    assert {row["role"] for row in results["rows"]} == {"seen", "validation", "unseen"}
    assert 0 < results["header"]["params_active"] <= results["header"]["params_total"]
    assert results["header"]["flops_per_token"] > 0
    assert main(["test", "--run", str(folder), *QUICK]) == 0
    assert json.loads((folder / "metrics" / "test.json").read_text())["rows"] == results["rows"]
    done = run(["predict", "--run", str(folder), *QUICK])
    place, writer = folder / "predictions", done.model.prediction_writer() or PredictionWriter()
    files = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
    patterns = [writer.written(domain) for domain in done.datamodule.eval_domains("predict")]
    assert files
    # What a later predict removes; else rows of both would be read.
    assert [file for file in files if not any(re.fullmatch(pattern, file) for pattern in patterns)] == []


@pytest.mark.usefixtures("no_routing_figures")  # bases draw
@pytest.mark.parametrize("path", BASELINES, ids=name)
def test_baseline_fits_and_validates_under_a_name_of_its_own(path: Path, tmp_path: Path) -> None:
    """Tests of the base configs score all domains; a baseline's network meets evaluation in its validation."""
    assert main(["fit", *tiny(base_of(path), path), *QUICK, "--test_after_fit", "false"]) == 0

    (saved,) = (tmp_path / "runs").glob("*/*/version_0/config.yaml")
    config = yaml.safe_load(saved.read_text(encoding="utf-8"))
    assert config["system"] == base_of(path).stem
    assert config["name"] != "base"
    logged = (saved.parent / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert any(column.startswith("val/") for column in logged)


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")  # five steps without a validation
@pytest.mark.parametrize("path", BASES, ids=name)
def test_first_losses_are_the_recorded_ones(path: Path) -> None:
    recorded = json.loads((GOLDEN / f"{path.stem}.json").read_text())

    torch.testing.assert_close(first_losses(path), recorded["losses"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PAPERS, ids=name)
def test_paper_size_has_the_parameter_count_its_first_lines_state(path: Path) -> None:
    stated = re.search(r"([\d,]{4,}) parameters", path.read_text(encoding="utf-8"))
    assert stated, f"{path}: write '<count> parameters' into the first comment"
    config = parsed(base_of(path), path)

    net = count_parameters(config["model"]["init_args"]["net"], PAPER_FACTS[base_of(path).stem])
    assert net == int(stated[1].replace(",", ""))


PAPER_FACTS = {"promoe": LATENTS, "point_moe": {"in_dim": IN_DIM}}
"""What the data of the papers tells the networks."""


def count_parameters(net: dict[str, object], facts: dict[str, object]) -> int:
    """Build a network on the meta device, where tensors have shapes and no numbers, and count its parameters."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=Callable[[dict[str, Any]], nn.Module])
    with torch.device("meta"):
        built = parser.instantiate(parser.parse_object({"net": net})).net(facts)
    return sum(parameter.numel() for parameter in built.parameters())
