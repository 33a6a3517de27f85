# SPDX-License-Identifier: Apache-2.0
"""Evidence of the seven systems: ``python -m benchmarks.evidence SYSTEM`` runs its grid and judges a paper's claims.

The grids are the files of `benchmarks.grids`, the overlays that they use lie here, and the runner is
`moeapps.evidence`. `restamp` gives cells the digest of configs that say the same in other words.
"""
