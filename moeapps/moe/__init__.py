# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts core: routing, routers, experts, backends, layer, recorder.

Loads torch and nothing else of weight.
"""

from __future__ import annotations

from moeapps.moe.activation import ActivationName
from moeapps.moe.backends import Backend, Plan, run, sort_assignments
from moeapps.moe.balance import CountAccumulator, update_bias
from moeapps.moe.experts import Experts, GLUExperts, MLPExperts, ModuleExperts, NormalisedExperts
from moeapps.moe.losses import (
    AuxLoss,
    BatchEntropyLoss,
    EntropyLoss,
    GlobalBatchBalance,
    ImportanceLoss,
    LoadLoss,
    MutualInformationLoss,
    SwitchBalance,
    ZLoss,
)
from moeapps.moe.record import MoERecorder, Record, record_call
from moeapps.moe.routing import AnyRouting, DenseRouting, Routing, SlotRouting

__all__ = [
    "ActivationName",
    "AnyRouting",
    "AuxLoss",
    "Backend",
    "BatchEntropyLoss",
    "CountAccumulator",
    "DenseRouting",
    "EntropyLoss",
    "Experts",
    "GLUExperts",
    "GlobalBatchBalance",
    "ImportanceLoss",
    "LoadLoss",
    "MLPExperts",
    "MoERecorder",
    "ModuleExperts",
    "MutualInformationLoss",
    "NormalisedExperts",
    "Plan",
    "Record",
    "Routing",
    "SlotRouting",
    "SwitchBalance",
    "ZLoss",
    "record_call",
    "run",
    "sort_assignments",
    "update_bias",
]
