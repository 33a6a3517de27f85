# SPDX-License-Identifier: Apache-2.0
"""What a loader hands to its worker processes, also where they begin from nothing (``spawn``, macOS and Windows)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeapps.data.domain import DomainDataModule


class Collate:
    """The ``collate`` of a data module.

    As an argument of a new process it is the settings of the data module alone: the trainer cannot be sent, the data
    sets are sent by the loader, and the state of a random generator lies in memory that is gone when it arrives.

    Args:
        data: the data module.
    """

    def __init__(self, data: DomainDataModule) -> None:
        self.data = data

    def __call__(self, items: Any) -> Any:
        """Make a batch of items."""
        return self.data.collate(items)

    def __reduce__(self) -> tuple[type[Collate], tuple[DomainDataModule]]:
        light = copy.copy(self.data)
        light.__dict__ |= {"trainer": None, "_datasets": {}, "_sampler": None, "_worker_seeds": None}
        return Collate, (light,)
