# SPDX-License-Identifier: Apache-2.0
"""Statistics of runs: intervals, verdicts, and the matrix of seen and unseen domains."""
