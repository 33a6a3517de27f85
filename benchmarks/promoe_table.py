# SPDX-License-Identifier: Apache-2.0
"""Write the table of tasks/image_diffusion/README.md from ProMoE's cells: ``python -m benchmarks.promoe_table``.

Every number is a mean over the pairs of seeds that all rows of the table have.
"""

from __future__ import annotations

import statistics

from benchmarks.evidence_table import Column, EvidenceTable

TABLE = EvidenceTable(
    system="promoe",
    readme="tasks/image_diffusion/README.md",
    rows={
        "promoe": "ProMoE",
        "dense": "dense twin, equal FLOPs",
        "dense_params": "dense twin, equal parameters",
        "prototypes": "prototypes alone",
        "no_rcl": "no contrastive loss",
        "no_split": "no split",
        "softmax": "softmax of the cosines",
        "sigmoid": "sigmoid of the cosines",
        "balance": "with a balance loss",
        "by_expert": "ProMoE-EC",
        "tc": "token choice",
        "tc_split": "token choice, split",
        "k_means_no_split": "k-means",
        "k_means": "k-means, split",
        "class_supervised": "class-supervised",
        "ec": "EC-DiT",
        "diffmoe": "DiffMoE",
        "expert_race": "Expert Race",
        "dsmoe": "DSMoE",
        "domain": "domain told",
        "random": "chance",
    },
    columns=(
        Column("loss", "seen/loss", ".4f"),
        Column("with class", "seen/conditional", ".4f"),
        Column("without", "seen/null", ".4f"),
        Column("unseen, without", "unseen/null", ".4f"),
        Column("Fréchet", "generation/frechet", ".0f"),
        Column("classes", "generation/class_accuracy", ".2f"),
    ),
    average=statistics.fmean,
)

if __name__ == "__main__":
    TABLE.write()
