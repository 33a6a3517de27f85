# SPDX-License-Identifier: Apache-2.0
"""Write the table of tasks/dynamics/README.md from the committed cells of MixER: ``python -m benchmarks.mixer_table``.

Errors of roll-outs spread over powers of ten, so that every number is a median over the pairs of seeds that all rows
of the table have.
"""

from __future__ import annotations

import statistics

from benchmarks.evidence_table import Column, EvidenceTable

TABLE = EvidenceTable(
    system="mixer",
    readme="tasks/dynamics/README.md",
    rows={
        "robust": "robust (ours)",
        "mixer_gate": "published gate",
        "mixer": "published gate, 5 environments a step",
        "robust_cold": "robust without random start",
        "oracle": "families told",
        "hard_em": "hard EM",
        "switch": "Switch",
        "soft": "soft mixture, 12 times the FLOPs",
        "frozen": "frozen gate",
        "single": "one learner, an expert's size",
        "single_equal": "the same, equal FLOPs with the gate's fits",
        "single_five": "the same, 5 environments a step",
        "single_params": "one learner, all parameters",
    },
    columns=(
        Column("ARI", "partition/ari", ".2f"),
        Column("purity", "partition/purity", ".2f"),
        Column("MSE", "seen/mse", ".1e"),
        Column("relative", "seen/relative_mse", ".1e"),
        Column("relative, median", "seen/relative_mse_median", ".1e"),
        Column("new inside", "inside/relative_mse_median", ".1e"),
        Column("new outside", "outside/relative_mse_median", ".1e"),
        Column("new family", "pendulum/relative_mse_median", ".1e"),
    ),
    average=statistics.median,
)

if __name__ == "__main__":
    TABLE.write()
