# SPDX-License-Identifier: Apache-2.0
"""Multi-seed evidence: ``python -m benchmarks.evidence SYSTEM`` runs a grid of cells and judges the claims of a paper.

`grid` says what to run and what to claim, `runner` runs cells in processes of their own, `cells` keeps one small JSON
per finished cell, `summary` computes intervals and verdicts from cells, `report` writes docs/evidence.md. A system's
grid is the module of its name in this package; it defines ``GRID``.
"""
