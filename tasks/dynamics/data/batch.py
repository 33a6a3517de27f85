# SPDX-License-Identifier: Apache-2.0
"""The batches of this task: trajectories of several environments, each environment with its own time step.

S environments, N trajectories per environment, T samples, D state size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeapps.data.gather import Rows


@dataclass
class Trajectories(Rows):
    """Trajectories of S environments; rows stand in the order of ``env``.

    Attributes:
        x: states, float32 [S, N, T, D]; 0 where ``mask`` is False.
        dt: seconds between samples, float32 [S]; T is the same for all environments, so horizons differ by dt.
        env: number among the TRAINED environments, int64 [S]; -1 for an environment to adapt to.
        family: hidden label for metrics only, index into the facts' ``families``, int64 [S]; -1 where it is unknown.
        mask: bool [S, N, T], False where a sample is missing; None where nothing is.
        scale: root mean squared increment of the observed (training or support) trajectories, float32 [S].
        num_support: the first ``num_support`` trajectories are for fitting a new environment's context, the others are
            scored; 0 for trained environments.
        num_given: leading samples that a prediction may use; 1, the initial condition, unless a series is continued.
    """

    x: Tensor
    dt: Tensor
    env: Tensor
    family: Tensor
    mask: Tensor | None
    scale: Tensor
    num_support: int = 0
    num_given: int = 1

    @property
    def support(self) -> Trajectories:
        """The trajectories that a new environment's context is fitted to."""
        return self._trajectories(slice(0, self.num_support))

    @property
    def query(self) -> Trajectories:
        """The trajectories that are scored: all of a trained environment, those after the support of a new one."""
        return self._trajectories(slice(self.num_support, None))

    def environments(self, rows: Tensor) -> Trajectories:
        """Keep some environments.

        Args:
            rows: int64 row numbers or bool [S].
        """
        return self.each(lambda part: part[rows])

    def _trajectories(self, part: slice) -> Trajectories:
        mask = None if self.mask is None else self.mask[:, part]
        return replace(self, x=self.x[:, part], mask=mask, num_support=0)


def form_of(batch: Trajectories) -> tuple[tuple[int, ...], int, int]:
    """Trajectories, samples and state size, support and given samples: the same in all environments of a batch."""
    return tuple(batch.x.shape[1:]), batch.num_support, batch.num_given


def join_environments(parts: Sequence[Trajectories]) -> Trajectories:
    """Lay batches of one form end to end; one of them without a mask counts as whole where another has one."""
    mask = None
    if any(part.mask is not None for part in parts):
        whole = [torch.ones(part.x.shape[:3], dtype=torch.bool) if part.mask is None else part.mask for part in parts]
        mask = torch.cat(whole)
    joined = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in ("x", "dt", "env", "family", "scale")
    }
    return Trajectories(**joined, mask=mask, num_support=parts[0].num_support, num_given=parts[0].num_given)


def collate_environments(items: Sequence[Trajectories]) -> Trajectories:
    """Join environments (items of S = 1) into one batch, in the order of ``env`` and else as they come.

    Raises:
        ValueError: they differ in number of trajectories, samples or state size, or in what of them is given.
    """
    kinds = {form_of(item) for item in items}
    if len(kinds) > 1:
        raise ValueError(
            f"environments of one batch differ in (trajectories, samples, state size), support or given samples: "
            f"{sorted(kinds)}; give each batch environments of one form"
        )
    return join_environments(sorted(items, key=lambda item: int(item.env[0])))
