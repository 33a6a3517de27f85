# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts core: routing, routers, experts, backends, layer, recorder.

Loads torch and nothing else of weight.
"""

from __future__ import annotations

from moeapps.moe.activation import (
    ActivationName,
)
from moeapps.moe.backends import (
    Backend,
    Plan,
    run,
    sort_assignments,
)
from moeapps.moe.balance import (
    CountAccumulator,
    update_bias,
)
from moeapps.moe.chain import Chain
from moeapps.moe.combine import (
    Combiner,
    Stack,
    Sum,
)
from moeapps.moe.experts import (
    Experts,
    GLUExperts,
    MLPExperts,
)
from moeapps.moe.joined import (
    JoinedExperts,
)
from moeapps.moe.layer import (
    LayerFactory,
    MoELayer,
    RouterFactory,
)
from moeapps.moe.losses import (
    AuxLoss,
    BatchEntropyLoss,
    ChosenBalance,
    EntropyLoss,
    GlobalBatchBalance,
    ImportanceLoss,
    LoadLoss,
    MutualInformationLoss,
    SwitchBalance,
    ZLoss,
)
from moeapps.moe.module_experts import (
    ModuleExperts,
)
from moeapps.moe.normalised import (
    NormalisedExperts,
)
from moeapps.moe.record import (
    MoERecorder,
    Record,
    record_call,
)
from moeapps.moe.routers import (
    AttentionScore,
    Capacity,
    Chooser,
    ConditionalSplit,
    ConstantScore,
    CosineScore,
    Dense,
    DenseToSparse,
    ExpertChoice,
    FittedRouter,
    GatedShared,
    GaussianNoise,
    GroupLimitedTopK,
    GumbelNoise,
    Jitter,
    LinearScore,
    LowestLoss,
    MLPScore,
    MultiGate,
    Noise,
    Partition,
    PrototypeScore,
    RandomScore,
    RecurrentScore,
    Router,
    RouterBase,
    RowChooser,
    Score,
    Slots,
    SparseMixer,
    SumRouters,
    TableScore,
    Threshold,
    TopK,
    TopP,
)
from moeapps.moe.routing import (
    AnyRouting,
    DenseRouting,
    Routing,
    SlotRouting,
)

__all__ = [
    "ActivationName",
    "AnyRouting",
    "AttentionScore",
    "AuxLoss",
    "Backend",
    "BatchEntropyLoss",
    "Capacity",
    "Chain",
    "Chooser",
    "ChosenBalance",
    "Combiner",
    "ConditionalSplit",
    "ConstantScore",
    "CosineScore",
    "CountAccumulator",
    "Dense",
    "DenseRouting",
    "DenseToSparse",
    "EntropyLoss",
    "ExpertChoice",
    "Experts",
    "FittedRouter",
    "GLUExperts",
    "GatedShared",
    "GaussianNoise",
    "GlobalBatchBalance",
    "GroupLimitedTopK",
    "GumbelNoise",
    "ImportanceLoss",
    "Jitter",
    "JoinedExperts",
    "LayerFactory",
    "LinearScore",
    "LoadLoss",
    "LowestLoss",
    "MLPExperts",
    "MLPScore",
    "MoELayer",
    "MoERecorder",
    "ModuleExperts",
    "MultiGate",
    "MutualInformationLoss",
    "Noise",
    "NormalisedExperts",
    "Partition",
    "Plan",
    "PrototypeScore",
    "RandomScore",
    "Record",
    "RecurrentScore",
    "Router",
    "RouterBase",
    "RouterFactory",
    "Routing",
    "RowChooser",
    "Score",
    "SlotRouting",
    "Slots",
    "SparseMixer",
    "Stack",
    "Sum",
    "SumRouters",
    "SwitchBalance",
    "TableScore",
    "Threshold",
    "TopK",
    "TopP",
    "ZLoss",
    "record_call",
    "run",
    "sort_assignments",
    "update_bias",
]
