# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the core and evidence runs of the systems."""
