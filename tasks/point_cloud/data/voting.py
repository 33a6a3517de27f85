# SPDX-License-Identifier: Apache-2.0
"""Several looks at one tile: turned, scaled and mirrored views, each cut into fragments of one point per voxel.

A voxel is answered through one of its points. Where every raw point is to be answered for itself, a tile is cut into
fragments: fragment f takes point f of each voxel (counted modulo the voxel's own number), so as many fragments as the
fullest voxel has points reach them all. R raw points of a tile, N voxels, F fragments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch_geometric.data import Data

from tasks.point_cloud.data.features import Features, network_input, voxelise
from tasks.point_cloud.data.scene import Floats, Ints

_HALF_TURN = 180.0


@dataclass(frozen=True)
class Voting:
    """How often a test tile is answered: each view times each fragment is one vote.

    Args:
        rotations: turns about z, degrees.
        scales: factors on all lengths; every turn is looked at in every scale.
        flip: one more view, mirrored in x.
        max_fragments: most fragments of a view. None: as many as the fullest voxel has points, so that each raw point
            is answered for itself (precise, slow). With fewer, points beyond them share the answer of another point
            of their voxel; 1: every voxel is answered once.

    Raises:
        ValueError: no view, a scale that is not positive, or fewer than one fragment.

    Source: the test of Pointcept/Pointcept (13 views: four turns, each in three scales, and one flip).
    """

    rotations: tuple[float, ...] = (0.0, 90.0, 180.0, 270.0)
    scales: tuple[float, ...] = (1.0, 0.95, 1.05)
    flip: bool = True
    max_fragments: int | None = None

    def __post_init__(self) -> None:
        if not self.rotations or not self.scales or min(self.scales) <= 0:
            raise ValueError(
                f"rotations={self.rotations}, scales={self.scales}: give at least one of each, scales above 0; "
                "rotations=[0] and scales=[1] give one view"
            )
        if self.max_fragments is not None and self.max_fragments < 1:
            raise ValueError(f"max_fragments={self.max_fragments} is not allowed; use 1 or more, or null for all")

    def views(self) -> list[npt.NDArray[np.float64]]:
        """Return the [3, 3] matrix of every view; the first is the identity unless turns or scales say otherwise."""
        turned = [_about_z(degrees) * scale for scale in self.scales for degrees in self.rotations]
        return [*turned, np.diag([-1.0, 1.0, 1.0])] if self.flip else turned

    def __str__(self) -> str:
        limit = "all" if self.max_fragments is None else f"at most {self.max_fragments}"
        return f"{len(self.views())} views, {limit} fragments"


def _about_z(degrees: float) -> npt.NDArray[np.float64]:
    cosine, sine = np.cos(np.pi * degrees / _HALF_TURN), np.sin(np.pi * degrees / _HALF_TURN)
    if degrees % 90 == 0:  # exact, so that a quarter turn maps the grid of voxels onto itself
        cosine, sine = np.rint(cosine), np.rint(sine)
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])


@dataclass(frozen=True)
class Fragment:
    """One point per voxel, and which raw points its answers count for.

    Attributes:
        pick: [N] int64 the point of each voxel.
        voted: int64 raw points that get a vote, each once.
        voter: int64 voxel that gives it.
    """

    pick: Ints
    voted: Ints
    voter: Ints


def fragments(
    pos: npt.NDArray[np.floating], size: float, seed: int, max_fragments: int | None = None
) -> Iterator[Fragment]:
    """Cut points into fragments that together give every point at least one vote.

    Within a voxel of c points, in an order drawn from ``seed``, fragment f of F takes point ``f mod min(c, F)``. It
    votes for that point, and for the points whose place is the same modulo F (only where c > F). So a point at place j
    gets as many votes as there are f < F with ``f mod min(c, F) = j mod F``: at least one.

    Args:
        pos: [R, 3] metres, R >= 1.
        size: voxel edge, metres.
        seed: of the order within voxels; the first fragment is what `voxelise` picks with a generator of this seed.
        max_fragments: F at most; None for the number of points of the fullest voxel.
    """
    voxels = voxelise(pos, size, np.random.default_rng(seed))
    drawn = np.random.default_rng(seed).permutation(len(pos))  # the order in which voxelise went through the points
    members = drawn[np.argsort(voxels.inverse[drawn], kind="stable")]
    count = np.bincount(voxels.inverse, minlength=len(voxels.pick))
    start = np.cumsum(count) - count
    place = np.empty(len(pos), np.int64)
    place[members] = np.arange(len(pos)) - np.repeat(start, count)
    number = int(count.max()) if max_fragments is None else min(int(count.max()), max_fragments)
    for f in range(number):
        chosen = f % np.minimum(count, number)
        voted = np.flatnonzero(place % number == chosen[voxels.inverse])
        yield Fragment(members[start + chosen], voted, voxels.inverse[voted])


@dataclass(frozen=True, eq=False)
class TileVotes:
    """The votes of one tile, made one at a time: all of them at once would not fit into memory.

    Args:
        pos: [R, 3] float32 metres.
        light: [R] from ``normalise_light``.
        up: [R] |z| of the normals, which no view changes.
        voxel: voxel edge, metres.
        domain_index: of the tile's domain.
        seed: of the order within voxels.
        voting: views and fragments.
        features: ``common`` or ``paper``.
        indoor: which of the paper's two layouts applies.
    """

    pos: Floats
    light: Floats
    up: Floats
    voxel: float
    domain_index: int
    seed: int
    voting: Voting
    features: Features
    indoor: bool

    @property
    def num_points(self) -> int:
        """Raw points of the tile."""
        return len(self.pos)

    def ballots(self) -> Iterator[tuple[Data, Fragment]]:
        """Yield what the network is to answer, and which raw points each answer counts for."""
        for matrix in self.voting.views():
            pos = np.asarray(self.pos.astype(np.float64) @ matrix.T, np.float32)
            for part in fragments(pos, self.voxel, self.seed, self.voting.max_fragments):
                cell_pos = pos[part.pick]
                grid, x = network_input(
                    *(cell_pos, self.voxel, self.light[part.pick], self.up[part.pick]),
                    features=self.features,
                    indoor=self.indoor,
                )
                data = Data(
                    pos=torch.from_numpy(np.ascontiguousarray(cell_pos)),
                    grid=torch.from_numpy(grid),
                    x=torch.from_numpy(x),
                    domain=torch.tensor([self.domain_index]),
                )
                yield data, part
