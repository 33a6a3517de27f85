# SPDX-License-Identifier: Apache-2.0
"""Rivals of ProMoE: their routers and layers."""
