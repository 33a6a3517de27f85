# SPDX-License-Identifier: Apache-2.0
"""The published sizes that docs/scale.md counts, on the meta device, and what a step of one process is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn

from moeapps.evaluation.scale import NetworkShape, flops_of, shape_of
from moeapps.moe.layer import LayerFactory
from moeapps.moe.presets import point_moe, promoe, unimoe_audio

IMAGES, TOKENS = 32, 256
VOXELS, RUN = 102_400, 1024
CLIPS, STEPS = 8, 1024


@dataclass(frozen=True)
class Size:
    """One published size.

    Attributes:
        name: what the paper calls it.
        step: what a process computes in a step.
        shape: what costs follow from.
    """

    name: str
    step: str
    shape: NetworkShape


def _size(
    name: str, step: str, build: Callable[[], nn.Module], rows: Callable[[str], float], top_k: int, attention: float
) -> Size:
    with torch.device("meta"):
        net = build()
    flops = flops_of(net, rows, top_k, attention)
    return Size(name, step, shape_of(net, lambda place, layer: round(rows(place) * top_k), flops))


def _images(letter: str) -> Size:
    from tasks.image_diffusion.model import SIZES as DITS
    from tasks.image_diffusion.model import dit_paper

    depth, dim, _ = DITS[letter]

    def rows(name: str) -> float:
        once = name.startswith(("time.", "label.")) or ".modulation." in name
        return IMAGES * (1 if once else TOKENS)

    attention = 2.0 * IMAGES * depth * TOKENS * TOKENS * dim
    return _size(f"ProMoE-{letter}", f"{IMAGES} images", lambda: dit_paper(letter, promoe()), rows, 1, attention)


def _points(letter: str, moe: LayerFactory) -> Size:
    from tasks.point_cloud.model import point_moe_paper

    facts = {"in_dim": 6, "domain_names": ["scans"], "label_sets": {"scans": ["floor", "wall"]}}
    depths = {"encoder": (2, 2, 2, 6, 2), "decoder": (2, 2, 2, 2)}
    dims = {"encoder": (32, 64, 128, 256, 512), "decoder": (64, 64, 128, 256)}

    def rows(name: str) -> float:
        level = name.split(".")[1]
        return VOXELS / 4 ** int(level) if level.isdigit() else VOXELS

    attention = sum(
        2.0 * depth * (VOXELS / 4**level) * RUN * dims[part][level]
        for part, each in depths.items()
        for level, depth in enumerate(each)
    )
    step = f"a crop of {VOXELS:,} voxels"
    return _size(f"Point-MoE-{letter}", step, lambda: point_moe_paper(facts, moe), rows, 2, attention)


def _audio() -> Size:
    from tasks.audio.model import AudioLM

    facts = {"num_codebooks": 12, "num_codes": 1024, "num_symbols": 1000}
    moe = unimoe_audio(expansion=2752 / 2048, shared_expansion=1376 / 2048)
    build = partial(AudioLM, facts, moe=moe, dim=2048, depth=36, num_heads=16, num_kv_heads=2)
    attention = 2.0 * 36 * CLIPS * STEPS * STEPS * 2048
    return _size("UniMoE-Audio", f"{CLIPS} clips of {STEPS:,} steps", build, lambda name: CLIPS * STEPS, 2, attention)


@cache
def sizes() -> tuple[Size, ...]:
    """All of them, smallest first within a system."""
    points = (
        _points("S", point_moe(num_experts=4, top_k=2, expansion=1.0)),
        _points("L", point_moe(num_experts=8, top_k=2, expansion=2.0)),
    )
    return (*(_images(letter) for letter in ("S", "B", "L", "XL")), *points, _audio())
