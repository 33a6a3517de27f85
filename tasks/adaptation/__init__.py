# SPDX-License-Identifier: Apache-2.0
"""Adaptation of a classifier to a new domain at test time: Meta-DMoE, its rivals and their data."""
