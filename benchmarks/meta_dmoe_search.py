# SPDX-License-Identifier: Apache-2.0
"""Which setting of Meta-DMoE adapts best? ``python -m benchmarks.meta_dmoe_search [--only PATTERN ...]``.

On real digits, with seeds (of model and data) that the evidence does not use. The first three stages are trained once
per seed and kind of student, then every setting from copies of them. What counts is the accuracy of the adapted student
on the VALIDATION domains; no unseen domain is read. Rivals are tried at several rates by the same rule. All settings
are written to benchmarks/results/meta_dmoe_search.json, losses as plainly as wins; interrupted, the same command goes
on. About an hour on an idle core.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console

from moeapps.evidence.cells import describe_machine
from moeapps.files import write_json
from moeapps.moe.presets import point_moe
from moeapps.training.optim import Cosine, OptimizerConfig, ParamGroup
from tasks.adaptation.data.digits_real import RealDigits
from tasks.adaptation.datamodule import AdaptationData
from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.module import AdaptationTask, AggregatorTask, ExpertsTask, MetaTask, StudentTask
from tasks.adaptation.nets.adapt import InnerStep
from tasks.adaptation.nets.adapters import Adapter, Distil, Unadapted
from tasks.adaptation.nets.backbones import SmallCNN
from tasks.adaptation.rivals.entropy import Shot, Tent
from tasks.adaptation.rivals.experts import BestExpert, Ensemble, ExpertByDomain, Teacher
from tasks.adaptation.rivals.prototypes import T3A
from tasks.adaptation.rivals.statistics import BatchStatistics

RESULTS = Path(__file__).parent / "results" / "meta_dmoe_search.json"
SEEDS = (101, 102, 103)
ROWS, META_STEPS = 64, 300


@dataclass(frozen=True)
class Setting:
    """One thing to try.

    Args:
        text: what is changed.
        student: how the student's stage takes its batches: ``balanced`` (ERM), or ``one_domain`` (ARM-BN's).
        net: options of the network, where they are changed; each kind needs stages of its own.
        step: options of the step, in meta-training and test.
        support: images to adapt to.
        steps: of meta-training; 0 tests the step on the student as it was.
        lr: rate of the student in meta-training.
        aggregator_lr: rate of the aggregator there.
        experts: epochs of the experts' stage.
        student_lr: rate of the student's stage.
    """

    text: str
    student: str = "balanced"
    net: tuple[tuple[str, Any], ...] = ()
    step: Mapping[str, Any] = field(default_factory=dict)
    support: int = 24
    steps: int = META_STEPS
    lr: float = 3e-4
    aggregator_lr: float = 1e-3
    experts: int = 6
    student_lr: float = 3e-3


ARM: dict[str, Any] = {"student": "one_domain"}
BATCH: dict[str, Any] = {**ARM, "net": (("expert_statistics", "batch"),)}
SETTINGS: dict[str, Setting] = {
    "base": Setting("rate 0.02, one step, second order, all parameters"),
    "rate_0.005": Setting("a rate of 0.005", step={"rate": 0.005}),
    "rate_0.05": Setting("a rate of 0.05", step={"rate": 0.05}),
    "rate_0.1": Setting("a rate of 0.1", step={"rate": 0.1}),
    "steps_3": Setting("three steps", step={"steps": 3}),
    "learned": Setting("a learned rate for each parameter", step={"learned": True}),
    "first_order": Setting("first-order derivatives", step={"order": "first"}),
    "norms": Setting("only scale and shift of batch normalisation move", step={"moved": ["blocks.?.1.*"], "rate": 0.1}),
    "last": Setting("only the last convolution and the linear layer move", step={"moved": ["blocks.2.*", "linear.*"]}),
    "support_50": Setting("50 support images", support=50),
    "no_meta": Setting("no meta-training", steps=0),
    "long": Setting("twice the steps of meta-training", steps=2 * META_STEPS),
    "statistics_0.5": Setting("half of the support's batch statistics", step={"statistics": 0.5}),
    "statistics_1": Setting("the support's batch statistics", step={"statistics": 1.0}),
    "statistics_1_no_meta": Setting("the same without meta-training", step={"statistics": 1.0}, steps=0),
    "statistics_1_steps_0": Setting("the same, meta-trained without a step", step={"statistics": 1.0, "steps": 0}),
    "statistics_1_50": Setting("the support's batch statistics, 50 images", step={"statistics": 1.0}, support=50),
    "statistics_1_rate_0.1": Setting("the same at 24 and a rate of 0.1", step={"statistics": 1.0, "rate": 0.1}),
    "arm": Setting("ARM-BN's student, the support's statistics", **ARM, step={"statistics": 1.0}),
    "arm_steps_0": Setting("the same without a step", **ARM, step={"statistics": 1.0, "steps": 0}),
    "arm_0.05": Setting("ARM-BN's student, rate 0.05", **ARM, step={"statistics": 1.0, "rate": 0.05}),
    "arm_0.1": Setting("ARM-BN's student, rate 0.1", **ARM, step={"statistics": 1.0, "rate": 0.1}),
    "arm_share_0.7": Setting("ARM-BN's student, 0.7 of the support's statistics", **ARM, step={"statistics": 0.7}),
    "arm_lr_1e-3": Setting("ARM-BN's student, its rate 1e-3", **ARM, step={"statistics": 1.0}, lr=1e-3),
    "arm_steps_3": Setting("ARM-BN's student, three steps", **ARM, step={"statistics": 1.0, "steps": 3}),
    "arm_no_meta": Setting("ARM-BN's student, no meta-training", **ARM, step={"statistics": 1.0}, steps=0),
    "arm_50": Setting("ARM-BN's student, 50 support images", **ARM, step={"statistics": 1.0}, support=50),
    "arm_50_lr": Setting("the same, a student's rate of 1e-3", **ARM, step={"statistics": 1.0}, support=50, lr=1e-3),
    "batch": Setting("as arm, and experts use the support's statistics, too", **BATCH, step={"statistics": 1.0}),
    "batch_0.005": Setting("the same, rate 0.005", **BATCH, step={"statistics": 1.0, "rate": 0.005}),
    "batch_0.05": Setting("the same, rate 0.05", **BATCH, step={"statistics": 1.0, "rate": 0.05}),
    "batch_learned": Setting("the same, learned rates", **BATCH, step={"statistics": 1.0, "learned": True}),
    "batch_no_meta": Setting("the same, no meta-training", **BATCH, step={"statistics": 1.0}, steps=0),
    "batch_lr_1e-3": Setting("the same, a student's rate of 1e-3", **BATCH, step={"statistics": 1.0}, lr=1e-3),
    "batch_long": Setting("the same, twice the steps", **BATCH, step={"statistics": 1.0}, steps=2 * META_STEPS),
    "batch_student_1e-2": Setting(
        "the same as batch, a rate of 0.01 in the student's stage", **BATCH, step={"statistics": 1.0}, student_lr=1e-2
    ),
    "batch_student_1e-2_lr": Setting(
        "the same, a student's rate of 1e-3 in meta-training",
        **BATCH,
        step={"statistics": 1.0},
        student_lr=1e-2,
        lr=1e-3,
    ),
    "batch_student_1e-2_no_meta": Setting(
        "the same, no meta-training", **BATCH, step={"statistics": 1.0}, student_lr=1e-2, steps=0
    ),
    "batch_student_1e-2_steps_0": Setting(
        "the same, meta-trained without a step", **BATCH, step={"statistics": 1.0, "steps": 0}, student_lr=1e-2
    ),
    "no_norm": Setting("no LayerNorm on the features", net=(("normalise", False),)),
    "depth_2": Setting("an aggregator of two blocks", net=(("depth", 2),)),
    "depth_0": Setting("the mean of the experts in place of an aggregator", net=(("depth", 0),)),
    "unmasked": Setting("own experts are asked", net=(("mask_mode", "none"),)),
    "diverse": Setting("experts trained three times as long", experts=18),
}


def data_of(seed: int, **options: Any) -> AdaptationData:
    """Real digits; nothing of an unseen domain is read."""
    module = AdaptationData(
        source=RealDigits(), seed=seed, unseen=[], evaluation="episodes", eval_batch_size=512, **options
    )
    module.prepare_data()
    return module


def network(facts: dict[str, Any], changed: Mapping[str, Any], step: Mapping[str, Any]) -> MetaDMoE:
    """The network of configs/meta_dmoe.yaml with changes."""
    own = dict(changed)
    normalise, moe = own.pop("normalise", True), own.pop("moe", None)
    made = InnerStep(**{"rate": 0.02, **step})
    return MetaDMoE(facts, backbone=lambda told: SmallCNN(told, normalise=normalise, moe=moe), step=made, **own)


def train(
    kind: type[AdaptationTask], net: MetaDMoE, data: AdaptationData, epochs: int, lr: float, **more: float
) -> None:
    """Train one stage of a network in place."""
    groups = [ParamGroup("net.aggregator.*", lr=rate) for rate in more.values() if list(net.aggregator.parameters())]
    optimizer = OptimizerConfig(lr=lr, weight_decay=0.0, groups=groups)
    task = kind(net=lambda facts: net, facts=data.facts, optimizer=optimizer, schedule=Cosine(warmup=0.05))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data)


def score(net: MetaDMoE, data: AdaptationData, adapter: Adapter) -> dict[str, float]:
    """Accuracy on the validation domains: with adaptation (mean, worst) and without (mean)."""
    task = StudentTask(net=lambda facts: net, facts=data.facts, adapter=adapter).eval()
    after, before = [], []
    for domain in data.roles["validation"]:
        episodes = data.episodes(domain, "val")
        answers = [task.answer(episodes[number], domain) for number in range(len(episodes))]
        label = torch.cat([answer.query.label for answer in answers])
        after.append(float((torch.cat([a.after for a in answers]).argmax(1) == label).float().mean()))
        before.append(float((torch.cat([a.before for a in answers]).argmax(1) == label).float().mean()))
    return {"mean": statistics.mean(after), "worst": min(after), "before": statistics.mean(before)}


@cache
def student(seed: int, mixing: str, normalise: bool, lr: float = 3e-3, mixture: bool = False) -> MetaDMoE:
    """Stage 1; or a mixture behind one backbone, trained likewise."""
    L.seed_everything(seed)
    data = data_of(seed, mode="rows", batch_size=ROWS, mixing=mixing)
    moe = point_moe(num_experts=10, top_k=2) if mixture else None
    net = network(data.facts, {"normalise": normalise, "moe": moe}, {})
    train(StudentTask, net, data, 10, lr)
    return net


@cache
def specialists(seed: int, mixing: str, normalise: bool, epochs: int, lr: float) -> MetaDMoE:
    """Stages 1 and 2."""
    net = copy.deepcopy(student(seed, mixing, normalise, lr))
    data = data_of(seed, mode="rows", batch_size=10 * ROWS, mixing="balanced")
    net.specialise()
    train(ExpertsTask, net, data, epochs, 1e-3)
    return net


@cache
def taught(seed: int, mixing: str, changed: tuple[tuple[str, Any], ...], epochs: int, lr: float = 3e-3) -> MetaDMoE:
    """Stages 1 to 3."""
    options = dict(changed)
    before = specialists(seed, mixing, options.get("normalise", True), epochs, lr)
    by_domain = options.get("expert_statistics") == "batch"
    data = data_of(seed, mode="rows", batch_size=ROWS, mixing="one_domain" if by_domain else "balanced")
    L.seed_everything(seed)
    net = network(data.facts, options, {})
    for part in ("student", "layer", "expert_heads"):
        net.get_submodule(part).load_state_dict(before.get_submodule(part).state_dict())
    train(AggregatorTask, net, data, 4, 1e-3)
    return net


def run(setting: Setting, seed: int) -> dict[str, float]:
    """All stages of a setting; its score on the validation domains."""
    before = taught(seed, setting.student, setting.net, setting.experts, setting.student_lr)
    data = data_of(
        seed, mode="episodes", support=setting.support, episodes_per_step=3, steps_per_epoch=setting.steps or 1
    )
    net = network(data.facts, dict(setting.net), setting.step)
    net.load_state_dict(before.state_dict(), strict=False)  # learned rates begin as given
    if setting.steps:
        L.seed_everything(seed)
        train(MetaTask, net, data, 1, setting.lr, aggregator=setting.aggregator_lr)
    return score(net.eval(), data, Distil())


RATES = {f"{kind}_lr_{rate:g}": (kind, rate) for kind in ("erm", "arm_bn") for rate in (1e-3, 1e-2, 3e-2)}
"""Students of rivals at other rates than 3e-3; their stage is also the first of Meta-DMoE."""
JOINT = {f"joint_moe_lr_{rate:g}": rate for rate in (3e-3, 1e-2)}
"""The jointly trained mixture."""
RIVALS: dict[str, tuple[str, Adapter]] = {
    "erm": ("balanced", Unadapted()),
    "bn_batch": ("balanced", BatchStatistics()),
    "bn_support": ("balanced", BatchStatistics(form="support")),
    "bn_support_0.5": ("balanced", BatchStatistics(form="support", share=0.5)),
    "arm_bn": ("one_domain", BatchStatistics()),
    "arm_bn_support": ("one_domain", BatchStatistics(form="support")),
    **{f"tent_{rate:g}": ("balanced", Tent(rate=rate)) for rate in (1e-4, 1e-3, 5e-3)},
    **{f"shot_{rate:g}": ("balanced", Shot(rate=rate)) for rate in (1e-4, 3e-4, 1e-3)},
    **{f"t3a_{keep}": ("balanced", T3A(keep=keep)) for keep in (5, 20, 100)},
    "ensemble": ("balanced", Ensemble()),
    "domain_id": ("balanced", ExpertByDomain()),
    "best_expert": ("balanced", BestExpert()),
    "teacher": ("balanced", Teacher()),
}


def rival(name: str, seed: int) -> dict[str, float]:
    """The score of a rival."""
    data = data_of(seed, mode="episodes")
    if name in JOINT:
        return score(student(seed, "balanced", True, JOINT[name], True).eval(), data, Unadapted())
    if name in RATES:
        kind, rate = RATES[name]
        return score(student(seed, RIVALS[kind][0], True, rate).eval(), data, RIVALS[kind][1])
    mixing, adapter = RIVALS[name]
    return score(taught(seed, mixing, (), 6).eval(), data, adapter)


def summary(found: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """One row per setting and rival, the best first."""
    rows = []
    for name, seeds in found.items():
        mean = {key: statistics.mean(each[key] for each in seeds.values()) for key in ("mean", "worst", "before")}
        text = SETTINGS[name].text if name in SETTINGS else f"rival: {_adapter(name)}"
        rows.append({"setting": name, "text": text, "seeds": len(seeds), **{k: round(v, 4) for k, v in mean.items()}})
    return sorted(rows, key=lambda row: -row["mean"])


def _adapter(name: str) -> str:
    if name in JOINT:
        return "a mixture trained jointly"
    return type(RIVALS[RATES[name][0] if name in RATES else name][1]).__name__


def main(args: list[str]) -> int:
    """Run what is missing; print and write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of settings and rivals")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args(args)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    held = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {"runs": {}}
    found: dict[str, dict[str, dict[str, float]]] = held["runs"]
    console = Console()
    for seed in options.seeds:
        for name in (*RIVALS, *RATES, *JOINT, *SETTINGS):
            if str(seed) in found.get(name, {}) or not any(fnmatch.fnmatch(name, p) for p in options.only):
                continue
            begun = time.process_time()
            result = run(SETTINGS[name], seed) if name in SETTINGS else rival(name, seed)
            result["cpu_s"] = round(time.process_time() - begun, 1)
            found.setdefault(name, {})[str(seed)] = result
            console.print(seed, name, {key: round(value, 4) for key, value in result.items()})
            rule = "mean accuracy on the two validation domains over the seeds; unseen domains are not read"
            told = {"rule": rule, "seeds": list(SEEDS), "machine": describe_machine(), "table": summary(found)}
            write_json(options.json, {**told, "runs": found})
    for row in summary(found):
        console.print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
