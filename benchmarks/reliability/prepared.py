# SPDX-License-Identifier: Apache-2.0
"""Import what every training needs: processes that are forked from here begin with it."""

from __future__ import annotations

from importlib import import_module

import moeapps.commands.curriculum
import moeapps.commands.run  # noqa: F401
from moeapps.commands.tasks import extend_path, task_names

extend_path()
for _name in task_names():
    import_module(f"tasks.{_name}")
