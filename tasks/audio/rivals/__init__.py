# SPDX-License-Identifier: Apache-2.0
"""Rivals of UniMoE-Audio that are more than another preset: counts of codes, one network per domain."""
