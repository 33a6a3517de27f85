# SPDX-License-Identifier: Apache-2.0
"""Lightning callbacks of the suite."""

from __future__ import annotations

from moeapps.training.callbacks.state import BestCheckpoint, InterruptCheckpoint, RandomState, SaveRun, TipFilter
from moeapps.training.callbacks.table import EndTable

__all__ = ["BestCheckpoint", "EndTable", "InterruptCheckpoint", "RandomState", "SaveRun", "TipFilter"]
