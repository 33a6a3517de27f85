# SPDX-License-Identifier: Apache-2.0
"""Worlds, sensors and readers of point clouds; numpy only."""
