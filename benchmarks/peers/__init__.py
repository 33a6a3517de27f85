# SPDX-License-Identifier: Apache-2.0
"""Whole systems beside other projects': steps, solves, readers and features on equal inputs, one thread, CPU time."""
