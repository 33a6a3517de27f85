# SPDX-License-Identifier: Apache-2.0
"""MMoE, PLE and DIN beside torch-rechub's and DeepCTR-Torch's, on the same rows, tables and widths.

A step is forward, cross-entropy, backward and Adam. torch-rechub has a batch norm behind each layer; DeepCTR-Torch
reads one matrix of floats, and adds its weight decay in ``fit`` alone, which is not run here.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import recommendation_peers as ours
from benchmarks.peers.rows import Race
from benchmarks.recommendation_speed import facts, make_batch
from tasks.recommendation.model import Ranker
from tasks.recommendation.nets.embeddings import FeatureEncoder
from tasks.recommendation.rivals import ple as our_ple
from tasks.recommendation.rivals.list_banks import averaged_experts

LEVELS, SHARED, OWN = 2, 2, 2
"""Of PLE; DeepCTR-Torch makes as many shared experts as each task has of its own."""


def mmoe(package: str) -> Race:
    """Eight experts of 64 units, six tasks with towers of 16, linear gates."""
    _, theirs = ours.their_mmoe() if package == "torch-rechub" else _deepctr("MMOE", num_experts=ours.EXPERTS)
    return Race(ours.our_mmoe()[1], theirs, f"{ours.ROWS} rows, {ours.EXPERTS} experts, 6 tasks; our dense columns too")


def ple(package: str) -> Race:
    """Two levels, two experts of each task's own and two shared."""
    batch = make_batch(ours.ROWS)
    bank = our_ple(levels=LEVELS, shared_experts=SHARED, task_experts=OWN, width=ours.EXPERT, tower_dim=ours.TOWER)
    net = Ranker(facts(), bank=bank, encoder=partial(FeatureEncoder, dim=ours.DIM))
    mine = ours.stepper(net, lambda: F.binary_cross_entropy_with_logits(net(batch), batch.label))
    if package == "torch-rechub":
        theirs = _rechub_ple()
    else:
        sizes = {"num_levels": LEVELS, "shared_expert_num": SHARED, "specific_expert_num": OWN}
        theirs = _deepctr("PLE", **sizes)[1]
    return Race(mine, theirs, f"{ours.ROWS} rows, {LEVELS} levels, {SHARED} shared and {OWN} own experts, 6 tasks")


def din(package: str) -> Race:
    """Histories of 20 items; ours ranks lists of five candidates that share one, which theirs read five times."""
    batch = ours.lists(5)
    mine = ours.our_lists(batch, averaged_experts(num_experts=1, hidden_dim=ours.EXPERT))[1]
    theirs = ours.their_din(batch, ours.EXPERT)[1] if package == "torch-rechub" else _deepctr_din(batch)
    return Race(mine, theirs, f"{ours.ROWS} candidates, histories of {ours.HISTORY}; theirs read lists as rows")


def _rechub_ple() -> ours.Step:
    from torch_rechub.basic.features import DenseFeature, SparseFeature  # type: ignore[import-not-found]
    from torch_rechub.models.multi_task import PLE  # type: ignore[import-not-found]

    batch, known = make_batch(ours.ROWS), facts()
    fields = [SparseFeature(name, size, ours.DIM) for name, size in known["fields"].items()]
    dense = [DenseFeature(f"x{k}") for k in range(known["dense_dim"])]
    tasks = ["classification"] * len(known["tasks"])
    towers = [{"dims": [ours.TOWER]} for _ in tasks]
    net: nn.Module = PLE([*fields, *dense], tasks, LEVELS, OWN, SHARED, {"dims": [ours.EXPERT]}, towers)
    columns = {name: batch.ids[:, k] for k, name in enumerate(known["fields"])}
    columns |= {f"x{k}": batch.dense[:, k] for k in range(known["dense_dim"])}
    return ours.stepper(net, lambda: F.binary_cross_entropy(net(columns), batch.label))


def _quietly() -> Any:
    """DeepCTR-Torch asks the package index for newer versions as it is imported; nothing is asked here."""
    import requests

    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise requests.ConnectionError("no question is asked while we measure")

    return patch.object(requests, "get", refuse)


def _deepctr(name: str, **options: Any) -> tuple[nn.Module, ours.Step]:
    with _quietly():
        from deepctr_torch import models
        from deepctr_torch.inputs import DenseFeat, SparseFeat

    batch, known = make_batch(ours.ROWS), facts()
    columns = [SparseFeat(field, size, ours.DIM) for field, size in known["fields"].items()]
    columns += [DenseFeat(f"x{k}", 1) for k in range(known["dense_dim"])]
    tasks = list(known["tasks"])
    net: nn.Module = getattr(models, name)(
        columns,
        expert_dnn_hidden_units=(ours.EXPERT,),
        gate_dnn_hidden_units=(),
        tower_dnn_hidden_units=(ours.TOWER,),
        task_types=["binary"] * len(tasks),
        task_names=tasks,
        **options,
    )
    matrix = torch.cat([batch.ids.float(), batch.dense], 1)
    return net, ours.stepper(net, lambda: F.binary_cross_entropy(net(matrix), batch.label))


def _deepctr_din(batch: Any) -> ours.Step:
    with _quietly():
        from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
        from deepctr_torch.models import DIN

    shared = partial(SparseFeat, vocabulary_size=ours.ITEMS, embedding_dim=ours.DIM, embedding_name="item")
    columns = [
        SparseFeat("query", ours.QUERIES, ours.DIM),
        shared("item"),
        VarLenSparseFeat(shared("hist_item"), ours.HISTORY, length_name="length"),
    ]
    net: nn.Module = DIN(
        columns,
        ["item"],
        dnn_hidden_units=(ours.EXPERT,),
        att_hidden_size=tuple(ours.UNIT),
        att_activation="dice",
        att_weight_normalization=True,
    )
    each = batch.label.shape[1]
    parts: list[Tensor] = [
        batch.query.repeat_interleave(each, 0),
        batch.candidates.flatten(0, 1),
        batch.history[..., 0].repeat_interleave(each, 0),
        torch.full((batch.label.numel(), 1), ours.HISTORY),
    ]
    matrix, label = torch.cat([part.float() for part in parts], 1), batch.label.flatten()
    return ours.stepper(net, lambda: F.binary_cross_entropy(net(matrix).squeeze(1), label))
