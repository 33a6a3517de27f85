# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts models outside language: one core, seven published systems."""

__version__ = "0.2.0"
