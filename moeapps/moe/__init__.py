# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts core: routing, routers, experts, backends, layer, recorder.

Loads torch and nothing else of weight.
"""

from __future__ import annotations

from moeapps.moe.activation import ActivationName
from moeapps.moe.backends import Backend, Plan, run, sort_assignments
from moeapps.moe.experts import Experts, GLUExperts, MLPExperts, ModuleExperts, NormalisedExperts
from moeapps.moe.record import MoERecorder, Record, record_call
from moeapps.moe.routing import AnyRouting, DenseRouting, Routing, SlotRouting

__all__ = [
    "ActivationName",
    "AnyRouting",
    "Backend",
    "DenseRouting",
    "Experts",
    "GLUExperts",
    "MLPExperts",
    "MoERecorder",
    "ModuleExperts",
    "NormalisedExperts",
    "Plan",
    "Record",
    "Routing",
    "SlotRouting",
    "record_call",
    "run",
    "sort_assignments",
]
