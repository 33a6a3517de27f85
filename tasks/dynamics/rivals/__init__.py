# SPDX-License-Identifier: Apache-2.0
"""Rivals and controls of MixER."""
