# SPDX-License-Identifier: Apache-2.0
"""Controlled shifts: the scenes of a simulated domain again, with one thing about them changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from tasks.point_cloud.data.domains import DOMAINS, DomainSpec, Split, generate_scan, scene_seed
from tasks.point_cloud.data.features import normal_z
from tasks.point_cloud.data.labels import label_set
from tasks.point_cloud.data.scans import ScanArrays
from tasks.point_cloud.data.scene import Bools, Floats
from tasks.point_cloud.data.sources import PointSource


class Shifted(PointSource):
    """A simulated domain whose density, completeness, noise, light, sensor or vocabulary is changed.

    Scene i of a split is the very scene i of ``base`` (for one ``data_seed``), so scores differ by the shift alone.
    Points are masked first, then thinned, then moved.

    Args:
        base: simulated domain whose scenes are used.
        keep: share of the points kept, in (0, 1].
        mask_ratio: share of occupied blocks that lose all their points, in [0, 1).
        mask_size: edge of a block, metres.
        noise: sigma of Gaussian noise added to every coordinate, metres.
        light: keep luminance or intensity (True), or set it constant.
        sensor: fields of the base's sensor to change, e.g. {beams: 16, height: 3.0}.
        answer_in: domain whose label set is used instead; its world must be of the same kind.
        scenes: scenes per split.
        data_seed: seed of the scenes; use the one of ``PointCloudData``.

    Raises:
        ValueError: an unknown domain or sensor field, a share or size out of range, worlds of different kinds.

    Source: the masking and thinning tests follow STAR's study of Point-MoE (block 0.6 - 0.8 m, ratio 0.5 - 0.8; 10 per
    cent of the points), as reported there; the other shifts are ours.
    """

    optional = False

    def __init__(
        self,
        *,
        base: str,
        keep: float = 1.0,
        mask_ratio: float = 0.0,
        mask_size: float = 0.6,
        noise: float = 0.0,
        light: bool = True,
        sensor: Mapping[str, float] | None = None,
        answer_in: str | None = None,
        scenes: int = 10,
        data_seed: int = 0,
    ) -> None:
        for name in (base, answer_in or base):
            if name not in DOMAINS:
                raise ValueError(f"unknown simulated domain {name!r}; allowed: {', '.join(DOMAINS)}")
        if not 0 < keep <= 1 or not 0 <= mask_ratio < 1:
            raise ValueError(f"keep={keep} must be in (0, 1] and mask_ratio={mask_ratio} in [0, 1)")
        if mask_size <= 0 or noise < 0 or scenes < 1:
            raise ValueError(
                f"mask_size={mask_size} must be above 0, noise={noise} at least 0, scenes={scenes} at least 1"
            )
        self.base, self.keep, self.mask_ratio, self.mask_size = base, keep, mask_ratio, mask_size
        self.noise, self.light, self.scenes, self.data_seed = noise, light, scenes, data_seed
        self.spec = _changed(DOMAINS[base], dict(sensor or {}), answer_in or base)
        self.voxel, self.indoor, self.label_set = self.spec.voxel, self.spec.indoor, label_set(self.spec.name)

    @override
    def missing(self, cache: Path | None) -> str | None:
        return None

    @override
    def scans(self, split: Split, cache: Path | None, domain: str = "") -> list[ScanArrays]:
        return [self._scan(scene_seed(self.data_seed, self.base, split, index)) for index in range(self.scenes)]

    def _scan(self, seed: tuple[int, ...]) -> ScanArrays:
        scan = generate_scan(self.spec, seed)
        rng = np.random.default_rng((*seed, 2))
        rows = np.flatnonzero(self._unmasked(scan.pos, rng))
        if self.keep < 1:
            rows = np.sort(rng.permutation(rows)[: max(1, round(self.keep * len(rows)))])
        pos = scan.pos[rows] + (self.noise * rng.standard_normal((len(rows), 3))).astype(np.float32)
        light = scan.light[rows] if self.light else np.zeros(len(rows), np.float32)
        return replace(
            scan,
            name=f"{scan.name}-shifted",
            pos=pos,
            light=light,
            up=normal_z(pos, self.voxel),
            label=scan.label[rows],
        )

    def _unmasked(self, pos: Floats, rng: np.random.Generator) -> Bools:
        """[R] false in the blocks that are masked; at least one block stays."""
        block = np.floor(pos / self.mask_size).astype(np.int64)
        _, inverse = np.unique(block, axis=0, return_inverse=True)
        count = int(inverse.max()) + 1
        masked = rng.permutation(count) < min(count - 1, round(self.mask_ratio * count))
        return np.asarray(~masked[inverse.reshape(-1)])

    @override
    def describe(self) -> str:
        parts = [
            f"keep {self.keep:g}" if self.keep < 1 else "",
            f"mask {self.mask_ratio:g} of {self.mask_size:g} m blocks" if self.mask_ratio else "",
            f"noise {self.noise:g} m" if self.noise else "",
            "" if self.light else "constant light",
            "other sensor" if self.spec.sensor != DOMAINS[self.base].sensor else "",
            f"in the words of {self.spec.name}" if self.spec.name != self.base else "",
        ]
        return f"simulated {self.base}, data_seed {self.data_seed}: {', '.join(p for p in parts if p) or 'unchanged'}"


def _changed(spec: DomainSpec, sensor: dict[str, float], answer_in: str) -> DomainSpec:
    known = {item.name: item.type for item in fields(spec.sensor)}
    unknown = sorted(set(sensor) - set(known))
    if unknown:
        raise ValueError(f"sensor fields {unknown} do not exist; {spec.name} has {', '.join(known)}")
    if type(DOMAINS[answer_in].world) is not type(spec.world):
        raise ValueError(f"{spec.name} cannot answer in the words of {answer_in}: their scenes hold other classes")
    values: dict[str, Any] = {
        name: int(value) if known[name] == "int" else float(value) for name, value in sensor.items()
    }
    return replace(spec, name=answer_in, sensor=replace(spec.sensor, **values))
