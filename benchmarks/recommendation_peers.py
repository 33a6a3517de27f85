# SPDX-License-Identifier: Apache-2.0
"""Training beside torch-rechub: ``python -m benchmarks.recommendation_peers [--quick]``.

Rows per CPU second of a training step (forward, cross-entropy, backward, Adam) over theirs, on the same rows, tables
and widths: in one process on one thread, pairs in alternating order, median of nine (``--quick``: three). A row is a
candidate. Their networks have a batch norm behind each layer, ours a network on the items' embeddings that theirs lack;
parameters beside the tables are listed. They read a list of five candidates as five rows, each with the history.

torch-rechub is installed into an environment of its own (`benchmarks.peers.environment`). Writes
benchmarks/results/recommendation_peers.json; fails when a gate is missed. About two minutes on an idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from benchmarks.peers.environment import FOLDER, pinned, python_with
from benchmarks.recommendation_speed import cpu_s, facts, make_batch, paired
from moeapps.evidence.cells import describe_machine
from moeapps.files import write_json
from tasks.recommendation.data.lists import Lists, ListSchema
from tasks.recommendation.losses import pointwise
from tasks.recommendation.model import ListRanker, Ranker, aw_moe
from tasks.recommendation.nets.activation_unit import ActivationUnit
from tasks.recommendation.nets.behaviours import ListEncoder
from tasks.recommendation.nets.dice import Dice
from tasks.recommendation.nets.embeddings import FeatureEncoder
from tasks.recommendation.nets.list_banks import BankFactory
from tasks.recommendation.rivals import mmoe
from tasks.recommendation.rivals.list_banks import averaged_experts

RESULTS = Path(__file__).parent / "results" / "recommendation_peers.json"
PACKAGES = ("torch-rechub",)
PAIRS, QUICK_PAIRS, STEPS = 9, 3, 6
ROWS, HISTORY, DIM, ITEMS, QUERIES = 1280, 20, 16, 5000, 20
UNIT, EXPERT, EXPERTS, TOWER = [48, 16], 64, 8, 16
GATE = 0.9

Step = Callable[[], None]


def stepper(module: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """A training step."""
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, weight_decay=1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def beside_tables(module: nn.Module) -> int:
    """Parameters outside of embeddings."""
    tables = {id(p) for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    return sum(p.numel() for p in module.parameters() if id(p) not in tables)


# Lists ----------------------------------------------------------------------------------------------------------------


def lists(candidates: int) -> Lists:
    """Random lists with full histories, `ROWS` candidates in all."""
    g, B = torch.Generator().manual_seed(0), ROWS // candidates
    history = torch.randint(1, ITEMS, (B, HISTORY, 1), generator=g)
    items = torch.randint(1, ITEMS, (B, candidates, 1), generator=g)
    return Lists(
        history=history,
        history_mask=torch.ones(B, HISTORY, dtype=torch.bool),
        history_item=history[..., 0],
        candidates=items,
        candidate_mask=torch.ones(B, candidates, dtype=torch.bool),
        candidate_item=items[..., 0],
        label=(torch.rand(B, candidates, generator=g) < 0.2).float(),
        query=torch.randint(1, QUERIES, (B, 1), generator=g),
        profile=torch.zeros(B, 0, dtype=torch.int64),
        user=torch.arange(B),
        row=torch.arange(B),
        factor=torch.full((B,), -1),
    )


def our_lists(batch: Lists, bank: BankFactory) -> tuple[nn.Module, Step]:
    """A ranker of lists with DIN's units as published."""
    schema = ListSchema({"item": ITEMS}, {"query": QUERIES}, {}, HISTORY, batch.label.shape[1])
    net = ListRanker(
        schema.facts(),
        bank=bank,
        encoder=partial(ListEncoder, dim=DIM, embedding_dim=DIM, hidden=DIM),
        interest=partial(
            ActivationUnit,
            hidden=tuple(UNIT),
            parts=("own", "product", "difference", "key"),
            norm="softmax",
            pooling="sum",
            activation=Dice,
        ),
    )
    return net, stepper(net, lambda: pointwise(net(batch).logits, batch.label, batch.candidate_mask))


def their_din(batch: Lists, width: int) -> tuple[nn.Module, Step]:
    """torch-rechub's DIN, a row per candidate."""
    from torch_rechub.basic.features import SequenceFeature, SparseFeature  # type: ignore[import-not-found]
    from torch_rechub.models.ranking import DIN  # type: ignore[import-not-found]

    net: nn.Module = DIN(
        features=[SparseFeature("query", QUERIES, DIM)],
        history_features=[SequenceFeature("history", ITEMS, DIM, pooling="concat", shared_with="item")],
        target_features=[SparseFeature("item", ITEMS, DIM)],
        mlp_params={"dims": [width]},
        attention_mlp_params={"dims": UNIT, "activation": "dice", "use_softmax": True},
    )
    each = batch.label.shape[1]
    columns = {
        "history": batch.history[..., 0].repeat_interleave(each, 0),
        "item": batch.candidates[..., 0].flatten(),
        "query": batch.query[:, 0].repeat_interleave(each, 0),
    }
    label = batch.label.flatten()
    return net, stepper(net, lambda: F.binary_cross_entropy(net(columns), label))


# Several tasks --------------------------------------------------------------------------------------------------------


def our_mmoe() -> tuple[nn.Module, Step]:
    """Our MMoE on the generated log's columns."""
    batch = make_batch(ROWS)
    net = Ranker(
        facts(),
        bank=mmoe(num_experts=EXPERTS, width=EXPERT, tower_dim=TOWER),
        encoder=partial(FeatureEncoder, dim=DIM),
    )
    return net, stepper(net, lambda: F.binary_cross_entropy_with_logits(net(batch), batch.label))


def their_mmoe() -> tuple[nn.Module, Step]:
    """torch-rechub's MMOE on the same columns."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE  # type: ignore[import-not-found]

    batch, known = make_batch(ROWS), facts()
    fields = [SparseFeature(name, size, DIM) for name, size in known["fields"].items()]
    dense = [DenseFeature(f"x{k}") for k in range(known["dense_dim"])]
    towers = [{"dims": [TOWER]} for _ in known["tasks"]]
    net: nn.Module = MMOE([*fields, *dense], ["classification"] * len(towers), EXPERTS, {"dims": [EXPERT]}, towers)
    columns = {name: batch.ids[:, k] for k, name in enumerate(known["fields"])}
    columns |= {f"x{k}": batch.dense[:, k] for k in range(known["dense_dim"])}
    return net, stepper(net, lambda: F.binary_cross_entropy(net(columns), batch.label))


def measure(pairs: int) -> list[dict[str, Any]]:
    """All rows of the result."""
    rows = []

    def compare(name: str, ours: tuple[nn.Module, Step], theirs: tuple[nn.Module, Step], gate: float | None) -> None:
        ratios = paired(theirs[1], ours[1], pairs, STEPS)
        value = statistics.median(ratios)
        seconds = [statistics.median(cpu_s(step, 1) for _ in range(STEPS)) for _, step in (ours, theirs)]
        rows.append(
            {
                **{"name": name, "ratio": round(value, 3), "spread": [round(min(ratios), 3), round(max(ratios), 3)]},
                **{"gate": gate, "ok": gate is None or value >= gate, "pairs": pairs},
                "rows_per_cpu_second": {"ours": round(ROWS / seconds[0]), "theirs": round(ROWS / seconds[1])},
                "parameters_beside_tables": {"ours": beside_tables(ours[0]), "theirs": beside_tables(theirs[0])},
            }
        )

    one = averaged_experts(num_experts=1, hidden_dim=EXPERT)
    for candidates, gate in ((5, GATE), (1, None)):
        batch = lists(candidates)
        name = f"DIN, lists of {candidates}: ours / torch-rechub's"
        compare(name, our_lists(batch, one), their_din(batch, EXPERT), gate)
    batch = lists(5)
    mixture = aw_moe(num_experts=4, hidden_dim=EXPERT)
    compare("AW-MoE, lists of 5 / torch-rechub's DIN", our_lists(batch, mixture), their_din(batch, 4 * EXPERT), None)
    compare("MMoE, six tasks: ours / torch-rechub's", our_mmoe(), their_mmoe(), GATE)
    return rows


def main(words: list[str] | None = None) -> int:
    """Measure in the peers' environment, print, write; return 1 where a gate is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recommendation_peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few pairs, nothing is written")
    parser.add_argument("--inside", action="store_true", help="measure in this environment and print JSON alone")
    options = parser.parse_args(words)
    if options.inside:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        print(json.dumps(measure(QUICK_PAIRS if options.quick else PAIRS)))
        return 0
    root = str(Path(__file__).resolve().parents[1])
    command = [str(python_with(PACKAGES, FOLDER / "systems")), "-m", "benchmarks.recommendation_peers", "--inside"]
    done = subprocess.run(
        [*command, *(["--quick"] if options.quick else [])],
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    console = Console(highlight=False)
    for row in rows:
        bound = "" if row["gate"] is None else f" (at least {row['gate']:g}){'' if row['ok'] else ' MISSED'}"
        console.print(f"{row['ratio']:.2f}{bound}  {row['name']}")
    if not options.quick:
        about = {"command": "python -m benchmarks.recommendation_peers", "machine": describe_machine()}
        write_json(
            RESULTS,
            {
                **about,
                "torch": torch.__version__,
                "peers": [f"{name}=={pinned()[name]}" for name in PACKAGES],
                "rows": rows,
            },
        )
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
