# SPDX-License-Identifier: Apache-2.0
"""Where tensors of a network over several processes lie; nothing here imports what only such networks need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def placement_of(tensor: Any) -> Any:
    """Return mesh and placements of a tensor that is spread over processes (a DTensor), None for others."""
    mesh = getattr(tensor, "device_mesh", None)
    return None if mesh is None else (mesh, tuple(tensor.placements))


def is_placed(module: nn.Module) -> bool:
    """Return whether a module is spread over processes."""
    return any(placement_of(parameter) is not None for parameter in module.parameters())


def local(tensor: Any) -> Any:
    """Return the part of a tensor that lies on this process: all of it, where it is not spread."""
    return tensor if placement_of(tensor) is None else tensor.to_local()


def at_hand(tensor: Any) -> Any:
    """Return a tensor as a plain one where all of it lies on this process, else None."""
    part = local(tensor)
    return part if part.shape == tensor.shape else None


def squares(gradients: Iterable[Any]) -> list[float]:
    """Return sums of squares that add up to that of all gradients; what lies alike is joined over processes at once."""
    alike: dict[Any, list[Any]] = {}
    for gradient in gradients:
        alike.setdefault(placement_of(gradient), []).append(gradient)
    found = []
    for place, members in alike.items():
        if place is None:
            found += [float((g.values() if g.is_sparse else g).double().square().sum()) for g in members]
        else:
            total: Any = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in members]).sum()
            found.append(float(total.full_tensor()))
    return found


def split_by_mesh(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split parameter groups so that each lies on one mesh: torch steps the parameters of a group together."""
    found = []
    for group in groups:
        meshes: dict[Any, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            meshes.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        for i, members in enumerate(meshes.values()):
            found.append({**group, "params": members, "name": f"{group['name']}/{i}" if i else group["name"]})
    return found
