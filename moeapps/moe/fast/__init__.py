# SPDX-License-Identifier: Apache-2.0
"""Faster ways to what `moe/reference.py` says, for stacked two-layer banks on a CPU; nothing here changes a number.

Every file says in its first lines when it is used and what it gains there. Ratios are those of
benchmarks/results/core.json (``make bench``): forward and backward of 4,096 rows of width 256 with 2 of E experts each,
float32, one thread, over one dense network of the same arithmetic.
"""
