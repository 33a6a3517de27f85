# SPDX-License-Identifier: Apache-2.0
"""Ways to compute a sparse routing behind one function, ``run``; they differ in speed alone."""

from __future__ import annotations

from moeapps.moe.backends.auto import Backend, apply, choose_backend, run
from moeapps.moe.plan import Plan, sort_assignments

__all__ = ["Backend", "Plan", "apply", "choose_backend", "run", "sort_assignments"]
