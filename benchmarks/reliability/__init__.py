# SPDX-License-Identifier: Apache-2.0
"""What the promises of docs/reliability.md are worth in figures: faults, cases of fuzzing, memory.

``python -m benchmarks.reliability`` measures what is missing in benchmarks/results/reliability.json and writes the
section "Measured" of the page from it.
"""
