# SPDX-License-Identifier: Apache-2.0
"""In four passes, where does HoME beat MMoE on rare tasks? ``python -m benchmarks.home_search [--only PATTERN ...]``.

The settings vary the evidence's second regime, four passes over 60,000 rows; one pass over many is the base config.

Every setting trains HoME and MMoE of equal parameters with the same data, epochs and seeds, each with two learning
rates of which it keeps the better; three seeds, on other data than the evidence. What counts is the expected GAUC of
the rare tasks on the VALIDATION domain. After the first seed the settings furthest from a gain stop (``STOPPED``).
All settings are written to benchmarks/results/home_search.json, losses as plainly as wins, the stopped ones with the
seeds they had; interrupted, the same command goes on. About 40 minutes on an idle core.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import track

from moeapps.evaluation.statistics import paired_t_interval
from moeapps.evidence.cells import describe_machine
from moeapps.evidence.evidence import to_json
from moeapps.files import write_text
from moeapps.training.optim import Cosine, OptimizerConfig
from tasks.recommendation.data.multitask_log import MultitaskLog, default_rates
from tasks.recommendation.datamodule import RecommendationData
from tasks.recommendation.metrics import gauc
from tasks.recommendation.model import Ranker, home
from tasks.recommendation.module import RankingTask
from tasks.recommendation.rivals import mmoe

RESULTS = Path(__file__).parent / "results" / "home_search.json"
SEEDS = (101, 102, 103)
RATES = (1e-3, 3e-3)
RARE, DENSE = ("like", "comment", "follow"), ("click", "eview", "lview")
EQUAL_MMOE: dict[str, Any] = {"num_experts": 23, "width": 64}


@dataclass(frozen=True)
class Setting:
    """One thing to try.

    Args:
        text: what is changed.
        epochs: passes over the training rows.
        source: options of the generated log.
        home: options of HoME, where it is changed; its number of parameters stays within 2 per cent.
        mmoe: options of MMoE, where it is changed.
        batch_size: rows per step.
        weight_decay: of AdamW.
    """

    text: str
    epochs: int = 4
    source: Mapping[str, Any] = field(default_factory=dict)
    home: Mapping[str, Any] = field(default_factory=dict)
    mmoe: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 512
    weight_decay: float = 1e-4


def rates(factor: float) -> dict[str, dict[str, float]]:
    """Rates of the log with the rare tasks made rarer or less rare."""
    known = default_rates()
    return {**known, "interaction": {task: rate * factor for task, rate in known["interaction"].items()}}


ALONE = {"weights": (0.2, 0.3, 1.0)}
LAYER = {"norm": "layer"}
SETTINGS: dict[str, Setting] = {
    "base": Setting("the setting of the evidence"),
    "long": Setting("twice the epochs", epochs=8),
    "longer": Setting("three times the epochs", epochs=12),
    "rarer": Setting("half as many positives of the rare tasks", source={"rates": rates(0.5)}),
    "less_rare": Setting("three times as many positives of the rare tasks", source={"rates": rates(3.0)}),
    "few_rows": Setting("a third of the rows, three times the epochs", epochs=12, source={"train_rows": 5000}),
    "many_rows": Setting("twice the rows", source={"train_rows": 30000}),
    "conflict": Setting("categories want opposite things (rho -0.8)", source={"rho": -0.8}),
    "agree": Setting("categories want the same (rho 0.8)", source={"rho": 0.8}),
    "categories": Setting("tasks of a category nearly alike", source={"weights": (0.2, 1.0, 0.3)}),
    "alone": Setting("tasks nearly unrelated", source=ALONE),
    "alone_conflict": Setting("unrelated tasks, opposite categories", source={"weights": (0.0, 0.7, 0.7), "rho": -0.8}),
    "heavy_tails": Setting("log-normal features", source={"heavy_tails": 0.5}),
    "noisy": Setting("a fifth of the labels drawn from the base rate", source={"label_noise": 0.2}),
    "large_batch": Setting("four times the batch, twice the epochs", epochs=8, batch_size=2048),
    "decay": Setting("a hundred times the weight decay", weight_decay=1e-2),
    "no_feature_gates": Setting("HoME without feature-gates", home={"feature_gates": 0, "width": 77}),
    "layer_norm": Setting("HoME with layer norm", home=LAYER),
    "plain_experts": Setting("HoME with plain ReLU experts", home={"norm": "none", "activation": "relu"}),
}
# After the first seed: layer norm in place of batch norm gained most, so it is tried with other data, and against an
# MMoE that has it too.
SETTINGS |= {
    "both_layer_norm": Setting("layer norm and Swish in both", home=LAYER, mmoe={**LAYER, "activation": "silu"}),
    "layer_norm_alone": Setting("HoME with layer norm, tasks nearly unrelated", home=LAYER, source=ALONE),
    "layer_norm_conflict": Setting("HoME with layer norm, opposite categories", home=LAYER, source={"rho": -0.8}),
}
STOPPED = ("long", "longer", "few_rows", "many_rows", "noisy", "large_batch", "decay")
"""Settings that stop after the first seed: furthest from a gain, or (``decay``, ``large_batch``) no different."""


def train(setting: Setting, model: str, lr: float, seed: int) -> dict[str, float]:
    """Train one network and score it on the validation domain.

    Returns:
        ``rare``, ``dense``: expected GAUC, means over tasks; ``cpu_s``.
    """
    start = time.process_time()
    L.seed_everything(seed, verbose=False)
    bank = home(**setting.home) if model == "home" else mmoe(**EQUAL_MMOE, **setting.mmoe)
    source = MultitaskLog(**{"val_rows": 12000, "test_rows": 1, **setting.source, "data_seed": seed})
    data = RecommendationData(source=source, seed=seed, batch_size=setting.batch_size, eval_batch_size=4096)
    data.prepare_data()
    task = RankingTask(
        net=partial(Ranker, bank=bank),
        facts=data.facts,
        optimizer=OptimizerConfig(lr=lr, weight_decay=setting.weight_decay),
        schedule=Cosine(warmup=0.05),
    )
    trainer = L.Trainer(
        max_epochs=setting.epochs,
        accelerator="cpu",
        barebones=True,
        gradient_clip_val=5.0,
        limit_val_batches=0,
    )
    trainer.fit(task, datamodule=data)
    scores = validation_scores(task, data)
    return {**scores, "cpu_s": round(time.process_time() - start, 1)}


@torch.no_grad()
def validation_scores(task: RankingTask, data: RecommendationData) -> dict[str, float]:
    """Expected GAUC on the validation domain, means over rare and dense tasks."""
    task.eval()
    loader = data.val_dataloader()[data.eval_domains("val").index(data.present("validation")[0])]
    batches = list(loader)
    logits = torch.cat([task(batch) for batch in batches]).double()
    truth, user = torch.cat([batch.oracle for batch in batches]).double(), torch.cat([batch.user for batch in batches])
    score = {name: float(gauc(logits[:, t], truth[:, t], user)) for t, name in enumerate(task.tasks)}
    return {
        "rare": statistics.fmean(score[name] for name in RARE),
        "dense": statistics.fmean(score[name] for name in DENSE),
    }


def key(name: str, model: str, lr: float, seed: int) -> str:
    """Name of a run."""
    return f"{name}/{model}/{lr:g}/{seed}"


def alike(one: str, other: str, model: str) -> bool:
    """Whether two settings train the same network of this kind on the same data."""
    own = (replace(SETTINGS[name], text="") for name in (one, other))
    # What the other network is given does not matter to this one.
    a, b = (replace(setting, mmoe={}) if model == "home" else replace(setting, home={}) for setting in own)
    return a == b


def summarise(runs: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One entry per finished setting: each model at its better rate, and the paired difference over seeds."""
    entries = []
    for name, setting in SETTINGS.items():
        seeds = [s for s in SEEDS if all(key(name, m, lr, s) in runs for m in ("home", "mmoe") for lr in RATES)]
        if not seeds:
            continue
        best, values = {}, {}
        for model in ("home", "mmoe"):
            means = {lr: statistics.fmean(runs[key(name, model, lr, s)]["rare"] for s in seeds) for lr in RATES}
            best[model] = max(RATES, key=lambda lr: means[lr])
            values[model] = [runs[key(name, model, best[model], s)] for s in seeds]
        rare = {model: [run["rare"] for run in found] for model, found in values.items()}
        dense = {model: [run["dense"] for run in found] for model, found in values.items()}
        interval = paired_t_interval(rare["home"], rare["mmoe"]) if len(seeds) > 1 else None
        entries.append(
            {
                **{"setting": name, "text": setting.text, "epochs": setting.epochs, "seeds": seeds, "lr": best},
                **{"rare": rare, "dense": dense},
                "rare_diff_mean": round(statistics.fmean(rare["home"]) - statistics.fmean(rare["mmoe"]), 6),
                "rare_ci95": None if interval is None else [round(interval.low, 6), round(interval.high, 6)],
                "dense_diff_mean": round(statistics.fmean(dense["home"]) - statistics.fmean(dense["mmoe"]), 6),
            }
        )
    return entries


def main(words: Sequence[str] | None = None, path: Path = RESULTS) -> int:
    """Run what is missing, write, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.home_search", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="only the settings that match one")
    options = parser.parse_args(words)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    runs: dict[str, dict[str, float]] = json.loads(path.read_text())["runs"] if path.exists() else {}
    wanted = [
        (name, model, lr, seed)
        for seed in SEEDS
        for name in SETTINGS
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)
        if seed == SEEDS[0] or name not in STOPPED
        for model in ("home", "mmoe")
        for lr in RATES
    ]
    console = Console(highlight=False)
    missing = [run for run in wanted if key(*run) not in runs]
    for name, model, lr, seed in track(missing, description="searching", console=console, transient=True):
        twin = next(
            (other for other in SETTINGS if alike(other, name, model) and key(other, model, lr, seed) in runs), None
        )
        # An MMoE that another setting trained with the same data and epochs is the same MMoE.
        done = runs[key(twin, model, lr, seed)] if twin else train(SETTINGS[name], model, lr, seed)
        runs[key(name, model, lr, seed)] = done
        about = {
            **{"command": "python -m benchmarks.home_search", "machine": describe_machine(), "seeds": SEEDS},
            **{"rates": RATES, "metric": "validation domain, expected GAUC, mean over like, comment, follow"},
        }
        write_text(path, to_json({**about, "settings": summarise(runs), "runs": dict(sorted(runs.items()))}))
    for entry in summarise(runs):
        shown = " ".join(f"{100 * end:+.2f}" for end in entry["rare_ci95"] or ())
        console.print(f"{entry['setting']}: {100 * entry['rare_diff_mean']:+.2f} [{shown}] {len(entry['seeds'])} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
