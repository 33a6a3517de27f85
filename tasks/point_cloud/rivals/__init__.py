# SPDX-License-Identifier: Apache-2.0
"""Rivals and controls of Point-MoE that are more than another preset."""
