# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts core: routing, routers, experts, backends, layer, recorder. Loads torch and nothing else of weight."""

from __future__ import annotations

from moeapps.moe.record import MoERecorder, Record, record_call
from moeapps.moe.routing import AnyRouting, DenseRouting, Routing, SlotRouting

__all__ = ["AnyRouting", "DenseRouting", "MoERecorder", "Record", "Routing", "SlotRouting", "record_call"]
