# SPDX-License-Identifier: Apache-2.0
"""The overlays of configs/baselines as built: parameters, active FLOPs, what an image of a test depends on."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from moeapps.training.cost import count_flops
from tasks.image_diffusion.datamodule import ImageData
from tasks.image_diffusion.model import DiT
from tasks.image_diffusion.rivals.routers import ClassTable
from tests.tasks.image_diffusion.model_common import layers

BASELINES = sorted(Path("configs/baselines").glob("promoe_*.yaml"))
NAMES = [path.stem.removeprefix("promoe_") for path in BASELINES]
README = Path("tasks/image_diffusion/README.md")
OTHER_PARAMETERS = {"dense", "domain", "class_supervised"}  # one wide expert; an expert per domain
OTHER_FLOPS = {"dense_params"}
POOLS = {"token": "row", "image": "group", "batch": "batch"}


def merged(config: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """A config under an overlay as the command line joins them: another class starts from its own defaults."""
    out = dict(config)
    for key, value in overlay.items():
        known = out.get(key)
        same = isinstance(known, dict) and isinstance(value, dict)
        if same and value.get("class_path", known.get("class_path")) == known.get("class_path"):
            value = merged(known, value)
        out[key] = value
    return out


def built(spec: Any) -> Any:
    """What a class path with its options makes."""
    if not isinstance(spec, dict):
        return spec
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**{key: built(value) for key, value in spec["init_args"].items()})


@pytest.fixture(scope="module")
def nets() -> dict[str, DiT]:
    """The network of configs/promoe.yaml, ``base``, and under each overlay."""
    config = yaml.safe_load(Path("configs/promoe.yaml").read_text())
    found = {}
    for name, path in (("base", None), *zip(NAMES, BASELINES, strict=True)):
        own = merged(config, yaml.safe_load(path.read_text())) if path else config
        torch.manual_seed(0)
        net = own["model"]["init_args"]["net"]
        assert net["class_path"] == "tasks.image_diffusion.model.DiT"
        found[name] = DiT(ImageData().facts, **{key: built(value) for key, value in net["init_args"].items()})
        for module in found[name].modules():
            if isinstance(module, ClassTable):
                module.use_superclasses([label // 10 for label in range(30)])
    return found


def inputs(num: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(num, 1, 28, 28, generator=generator, dtype=torch.float64)
    return image, torch.linspace(1, 999, num, dtype=torch.float64), torch.tensor([0, 30, 12, 29, 30, 7])[:num]


def flops(network: DiT) -> int:
    image, time, label = inputs()
    network.train()
    return count_flops(network, image.float(), time.float(), label)


@pytest.mark.parametrize("name", NAMES)
def test_a_rival_has_the_parameters_and_active_flops_of_promoe(name: str, nets: dict[str, DiT]) -> None:
    count = {key: sum(p.numel() for p in nets[key].parameters()) for key in ("base", name)}
    assert (abs(count[name] / count["base"] - 1) <= 0.02) == (name not in OTHER_PARAMETERS)
    assert (abs(flops(nets[name]) / flops(nets["base"]) - 1) <= 0.05) == (name not in OTHER_FLOPS)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_in_a_test_depends_on_no_other_image(name: str, nets: dict[str, DiT]) -> None:
    network = nets[name].double().train()
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():  # all outputs of a fresh network are 0
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    image, time, label = inputs()
    with torch.no_grad():
        network(image, time, label)  # thresholds and centroids move off their start
        network.eval()
        whole, part = network(image, time, label), network(image[1:5], time[1:5], label[1:5])

    same = torch.allclose(part, whole[1:5], rtol=1e-9, atol=1e-9)
    assert same == (name != "random")  # which draws by the place in the batch


def test_the_table_of_rivals_says_what_the_routers_say(nets: dict[str, DiT]) -> None:
    section = README.read_text().partition("\n## Rivals")[2].partition("\n## ")[0]
    told = {}
    for names, pool in re.findall(r"^\| (`.*?`) \|.*\| ([^|]*) \|$", section, flags=re.MULTILINE):
        told |= dict.fromkeys(re.findall(r"`(\w+)`", names), pool)

    assert sorted(told) == sorted(NAMES)
    for name, pool in told.items():
        routers = {layer.router.pool for layer in layers(nets[name])}
        assert routers == {POOLS[pool]}, name
