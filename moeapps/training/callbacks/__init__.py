# SPDX-License-Identifier: Apache-2.0
"""Lightning callbacks of the suite."""

from __future__ import annotations

from moeapps.training.callbacks.averaging import AveragedWeights
from moeapps.training.callbacks.balance import BiasBalancing
from moeapps.training.callbacks.experts import ExpertReport
from moeapps.training.callbacks.finite import DivergedError, StopDiverged
from moeapps.training.callbacks.first_losses import FirstLosses
from moeapps.training.callbacks.interrupts import InterruptCheckpoint, has_begun
from moeapps.training.callbacks.pictures import EpochPictures
from moeapps.training.callbacks.predictions import PredictionWriter
from moeapps.training.callbacks.progress import ProgressLines, progress_bar
from moeapps.training.callbacks.report import Report
from moeapps.training.callbacks.router_fit import RouterFit
from moeapps.training.callbacks.routing import RoutingMonitor
from moeapps.training.callbacks.side import SideReport
from moeapps.training.callbacks.state import BestCheckpoint, RandomState, SaveRun, TipFilter
from moeapps.training.callbacks.summary import MoESummary
from moeapps.training.callbacks.table import EndTable

__all__ = [
    "AveragedWeights",
    "BestCheckpoint",
    "BiasBalancing",
    "DivergedError",
    "EndTable",
    "EpochPictures",
    "ExpertReport",
    "FirstLosses",
    "InterruptCheckpoint",
    "MoESummary",
    "PredictionWriter",
    "ProgressLines",
    "RandomState",
    "Report",
    "RouterFit",
    "RoutingMonitor",
    "SaveRun",
    "SideReport",
    "StopDiverged",
    "TipFilter",
    "has_begun",
    "progress_bar",
]
