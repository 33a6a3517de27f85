# SPDX-License-Identifier: Apache-2.0
"""Multi-seed evidence: ``moeapps evidence GRID.yaml`` runs a grid of cells and judges the claims of a system.

`reading` reads the YAML into a `grid`: what to run and what to claim. `runner` runs cells in processes of their own,
`leases` keeps processes that share a grid out of each other's way, `cells` keeps one small JSON per finished cell,
`summary` computes intervals and verdicts from cells, `report` writes the page, `evidence` ties them together. The
format is in docs/evidence_grids.md.
"""
