# SPDX-License-Identifier: Apache-2.0
"""Dynamical systems: families of differential equations and of series, reconstructed from trajectories."""
