# SPDX-License-Identifier: Apache-2.0
"""Routers: a score that gives logits, a chooser that turns them into a routing, noise, capacity, combinators."""

from __future__ import annotations

from moeapps.moe.routers.capacity import Capacity
from moeapps.moe.routers.choose import GatedShared, GroupLimitedTopK, TopK
from moeapps.moe.routers.choose_batch import ExpertChoice, Threshold
from moeapps.moe.routers.choose_capped import Capped
from moeapps.moe.routers.choose_dense import Dense, DenseToSparse, Slots
from moeapps.moe.routers.choose_sparse_mixer import SparseMixer
from moeapps.moe.routers.choose_top_p import TopP
from moeapps.moe.routers.chooser import Chooser, RowChooser
from moeapps.moe.routers.combinators import ConditionalSplit, MultiGate, SumRouters
from moeapps.moe.routers.fitted import FittedRouter, LowestLoss, Partition
from moeapps.moe.routers.noise import GaussianNoise, GumbelNoise, Jitter, Noise
from moeapps.moe.routers.router import Router, RouterBase
from moeapps.moe.routers.score import CosineScore, LinearScore, MLPScore, PrototypeScore, Score
from moeapps.moe.routers.score_fixed import ConstantScore, RandomScore, TableScore
from moeapps.moe.routers.score_sequence import AttentionScore, RecurrentScore

__all__ = [
    "AttentionScore",
    "Capacity",
    "Capped",
    "Chooser",
    "ConditionalSplit",
    "ConstantScore",
    "CosineScore",
    "Dense",
    "DenseToSparse",
    "ExpertChoice",
    "FittedRouter",
    "GatedShared",
    "GaussianNoise",
    "GroupLimitedTopK",
    "GumbelNoise",
    "Jitter",
    "LinearScore",
    "LowestLoss",
    "MLPScore",
    "MultiGate",
    "Noise",
    "Partition",
    "PrototypeScore",
    "RandomScore",
    "RecurrentScore",
    "Router",
    "RouterBase",
    "RowChooser",
    "Score",
    "Slots",
    "SparseMixer",
    "SumRouters",
    "TableScore",
    "Threshold",
    "TopK",
    "TopP",
]
