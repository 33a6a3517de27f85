# SPDX-License-Identifier: Apache-2.0
"""Banks of meta-learners ``f_k(x, context)`` with stacked weights, one kind per class."""

from __future__ import annotations

from tasks.dynamics.nets.experts.adapted import CoDAExperts, GEPSExperts
from tasks.dynamics.nets.experts.base import ExpertsFactory, MetaExperts
from tasks.dynamics.nets.experts.fields import NCFExperts, PlainExperts
from tasks.dynamics.nets.experts.maps import ShallowPLRNNExperts

__all__ = [
    "CoDAExperts",
    "ExpertsFactory",
    "GEPSExperts",
    "MetaExperts",
    "NCFExperts",
    "PlainExperts",
    "ShallowPLRNNExperts",
]
