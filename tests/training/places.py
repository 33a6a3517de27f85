# SPDX-License-Identifier: Apache-2.0
"""What a process of many would hold of the largest network of each paper; run by tests/training/test_places.py.

``python -m tests.training.places FILE`` builds each on the meta device and places it by `ModelParallel.place`, under
torch's fake process group: a process that believes the others to be there. Nothing is sent, and no weight exists.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moeapps.moe import presets
from moeapps.training.parallel import ModelParallel
from tasks.audio.model import AudioLM
from tasks.image_diffusion.model import DiT
from tasks.point_cloud.model import PointMoE

FACTS: dict[str, dict[str, Any]] = {
    "promoe_xl": {"channels": 4, "image_size": 32, "num_classes": 1000},
    "point_moe_l": {"in_dim": 6},
    "unimoe_audio": {"num_codebooks": 12, "num_codes": 1024, "num_symbols": 400},
}
# Experts of a layer are spread over so many processes; 13 of ProMoE cannot be over 8.
SHARE = {"promoe_xl": 4, "point_moe_l": 8, "unimoe_audio": 8}
WORLDS = (8, 64)
KINDS = (("ep", 0, "replicated"), ("ep_fsdp2", 0, "sharded"), ("fsdp2", 1, "sharded"))
"""As the overlays of configs/trainer/ divide a network; 0: over as many as `SHARE` says."""


def options(name: str) -> dict[str, Any]:
    """Arguments of a network as configs/paper has them."""
    told = yaml.safe_load(Path(f"configs/paper/{name}.yaml").read_text())["model"]["init_args"]["net"]["init_args"]
    moe = told.pop("moe")
    return told | {"moe": getattr(presets, moe["class_path"].rsplit(".", 1)[1])(**moe["init_args"])}


def largest(name: str) -> nn.Module:
    """The largest published network of a paper."""
    facts = FACTS[name]
    if name == "promoe_xl":
        return DiT(facts, **options(name))
    if name == "point_moe_l":
        return PointMoE(facts, **options(name))
    moe = presets.unimoe_audio(expansion=2752 / 2048, shared_expansion=1376 / 2048)
    return AudioLM(facts, moe=moe, dim=2048, depth=36, num_heads=16, num_kv_heads=2)


def held(name: str, world: int, rank: int, experts: int, rest: str) -> dict[str, tuple[list[int], list[int]]]:
    """Shape of each weight, whole and as this process has it."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with torch.device("meta"):
            net = largest(name)
        names = {key.replace(".banks.0.", ".").replace(".banks.1.", ".") for key, _ in net.named_parameters()}
        shape = (world // experts, experts)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data_parallel", "tensor_parallel"))
        ModelParallel(experts=experts, rest=rest).place(net, mesh)  # type: ignore[arg-type]
        found = {}
        for key, parameter in net.named_parameters():
            assert parameter.is_meta
            assert key.replace(".banks.0.", ".").replace(".banks.1.", ".") in names
            part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            found[key] = (list(parameter.shape), list(part.shape))
        return found
    finally:
        distributed.destroy_process_group()


def main(file: Path) -> None:
    told: dict[str, Any] = {}
    for name, share in SHARE.items():
        for world in WORLDS:
            for kind, experts, rest in KINDS:
                everybody = world == WORLDS[0] and kind == "ep_fsdp2"
                ranks = range(world) if everybody else (0, world - 1)
                told[f"{name} {kind} {world}"] = [held(name, world, rank, experts or share, rest) for rank in ranks]
    file.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
