# SPDX-License-Identifier: Apache-2.0
"""Environments and their trajectories: generated, read from files, batched."""
