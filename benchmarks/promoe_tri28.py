# SPDX-License-Identifier: Apache-2.0
"""What ten minutes of two CPU cores draw: ``python -m benchmarks.promoe_tri28 [--only PATTERN] [--jobs 1]``.

Trains configs/promoe.yaml on digits, clothes and animals (configs/data/tri28.yaml) and has 600 drawn images judged;
then one thing at a time is changed, to see what made small compute count. The images of ``recipe`` are drawn again with
other samplers, and the first of each class are put in docs/figures/promoe_tri28.png. Every training has one thread; the
minutes of ``recipe``, which runs first and alone, are held to a gate, all others run as many at a time as ``--jobs``
says. What is done is written to benchmarks/results/promoe_tri28.json at once and not done again. About eight
minutes each on a busy core.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from moeapps.files import write_json, write_text
from moeapps.training.folders import newest_version, runs_root
from moeapps.training.run import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "promoe_tri28.json"
README = ROOT / "tasks" / "image_diffusion" / "README.md"
FIGURE = ROOT / "docs" / "figures" / "promoe_tri28.png"
BLOCK = re.compile(r"(<!-- tri28:begin -->\n).*?(<!-- tri28:end -->)", re.DOTALL)
CONFIGS = ("--config", "configs/promoe.yaml", "--config", "configs/data/tri28.yaml")
NET, FIT = "--model.init_args.net.init_args", "--trainer.max_epochs"

VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "recipe": ("as configs/data/tri28.yaml says", ()),
    "rate_1.5e-3": ("a rate of 1.5e-3", ("--model.init_args.optimizer.lr=1.5e-3",)),
    "constant": ("the rate stays, without warm-up", ("--model.init_args.schedule=moeapps.training.optim.Constant",)),
    "patch_4": ("patches of 4 pixels, 49 tokens; 2 epochs", (f"{NET}.patch_size=4", f"{FIT}=2")),
    "batch_64": ("64 images a step; 6 epochs", ("--data.init_args.batch_size=64", f"{FIT}=6")),
    "wide": ("192 wide, 6 heads; 3 epochs", (f"{NET}.dim=192", f"{NET}.num_heads=6", f"{FIT}=3")),
    "shift_2": ("times shifted towards noise by 2", ("--model.init_args.process.init_args.shift=2.0",)),
}
"""Name -> what is changed, flags."""
SAMPLERS = (
    ("euler", 25, 1.0),
    ("euler", 25, 2.0),
    ("euler", 25, 4.0),
    ("euler", 25, 6.0),
    ("euler", 10, 4.0),
    ("euler", 50, 4.0),
    ("heun", 13, 4.0),
)
"""Solver, steps, guidance."""
GATES: dict[str, tuple[str, str, float]] = {
    "minutes": ("minutes", "at most", 10.0),
    "class accuracy": ("generation/class_accuracy", "at least", 0.80),
    "class accuracy of digits": ("generation.digits/class_accuracy", "at least", 0.75),
    "domain accuracy": ("generation/domain_accuracy", "at least", 0.98),
    "distance to the nearest training image": ("generation/nearest_ratio", "at least", 0.9),
}
"""What the recipe is held to."""


def train(name: str) -> dict[str, Any]:
    """Train and test one variant; its minutes, and what its drawn images are like.

    Raises:
        RuntimeError: the run failed; its last lines are in the message.
    """
    text, flags = VARIANTS[name]
    words = ["fit", *CONFIGS, *flags, "--name", f"tri28_{name}"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    start = time.monotonic()
    command = [sys.executable, "-m", "moeapps.cli", *words]
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    minutes = (time.monotonic() - start) / 60
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n" + "\n".join(done.stdout.splitlines()[-15:]))
    metrics = newest(name) / "metrics"
    drawn = json.loads((metrics / "generation.json").read_text(encoding="utf-8"))
    tested = json.loads((metrics / "test.json").read_text(encoding="utf-8"))
    return {
        "text": text,
        "flags": list(flags),
        "minutes": round(minutes, 2),
        "how": drawn["how"],
        "seen_loss": tested["summary"]["seen"]["loss"],
        **flat(drawn),
    }


def newest(name: str) -> Path:
    """The folder of the newest run of a variant."""
    return newest_version(runs_root() / "promoe" / f"tri28_{name}")


def flat(drawn: Mapping[str, Any]) -> dict[str, float]:
    """``generation.digits/class_accuracy`` and so on."""
    groups = {key: value for key, value in drawn.items() if key.startswith("generation")}
    return {f"{group}/{key}": round(value, 4) for group, found in groups.items() for key, value in found.items()}


def draw(run: Path) -> list[dict[str, Any]]:
    """Draw the images of a run again with every sampler, and have them judged; the first of each class in a picture."""
    import torch

    from moeapps.commands.checkpoints import checkpoint_of
    from moeapps.commands.trained import build, load_weights
    from tasks.image_diffusion.nets.samplers import sample
    from tasks.image_diffusion.report.judge import get_judge, training_images
    from tasks.image_diffusion.report.judgement import RealImages, judge_images
    from tasks.image_diffusion.report.pictures import grid, write_png

    built = build(run)
    data, task = built.datamodule, built.model
    data.prepare_data()
    data.setup("test")
    load_weights(task, checkpoint_of(run))
    # Three rows of each domain, ten classes wide.
    first = torch.arange(30).view(3, 1, 10).expand(3, 3, 10).flatten()
    write_png(FIGURE, grid(sample(task.eval(), first, cfg=4.0, steps=25, seed=0), 10, enlarge=2))
    real = RealImages(training_images(data), training_images(data, "test"), data.domain_names)
    judge, label = get_judge(data, None, images=real.train), real.labels(600)
    rows = []
    for solver, steps, cfg in track(SAMPLERS, description="samplers", transient=True):
        image = sample(task.eval(), label, cfg=cfg, steps=steps, seed=0, solver=solver, batch_size=128)
        found = flat(judge_images(image, label, real, judge))
        rows.append({"solver": solver, "steps": steps, "cfg": cfg, **found})
    return rows


def table(report: Mapping[str, Any]) -> str:
    """The Markdown of the README."""
    numbers = {
        "classes": "generation/class_accuracy",
        "digits": "generation.digits/class_accuracy",
        "domains": "generation/domain_accuracy",
        "nearest": "generation/nearest_ratio",
        "Fréchet": "generation/frechet",
        "recall": "generation/recall",
    }
    lines = ["| | minutes | loss | " + " | ".join(numbers) + " |", "|---" * (len(numbers) + 3) + "|"]
    drawn = [(f"{row['solver']}, {row['steps']} steps, guidance {row['cfg']:g}", row) for row in report["samplers"]]
    trained = [(f"`{name}`: {row['text']}", row) for name, row in report["variants"].items()]
    for text, row in [*trained, *drawn]:
        minutes = f"{row['minutes']:.1f}" if "minutes" in row else ""
        loss = f"{row['seen_loss']:.3f}" if "seen_loss" in row else ""
        shown = (f"{row[key]:.1f}" if "frechet" in key else f"{row[key]:.2f}" for key in numbers.values())
        lines.append(f"| {text} | {minutes} | {loss} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def complaints(report: Mapping[str, Any]) -> list[str]:
    """The gates that the recipe misses."""
    recipe = report["variants"].get("recipe")
    if recipe is None:
        return ["recipe is not run"]
    found = []
    for text, (key, direction, bound) in GATES.items():
        value = recipe[key]
        if (value > bound) if direction == "at most" else (value < bound):
            found.append(f"{text}: {value:.3f}, but it must be {direction} {bound:g}")
    return found


def show(report: Mapping[str, Any]) -> None:
    """Print what was measured."""
    table = Table("variant", "minutes", "loss", "classes", "digits", "domains", "nearest", "Fréchet")
    keys = ("/class_accuracy", ".digits/class_accuracy", "/domain_accuracy", "/nearest_ratio", "/frechet")
    for name, row in report["variants"].items():
        numbers = (f"{row['generation' + key]:.3f}" for key in keys)
        table.add_row(name, f"{row['minutes']:.1f}", f"{row['seen_loss']:.4f}", *numbers)
    for row in report["samplers"]:
        numbers = (f"{row['generation' + key]:.3f}" for key in keys)
        table.add_row(f"{row['solver']} {row['steps']}, cfg {row['cfg']:g}", "", "", *numbers)
    Console(highlight=False).print(table)


def main(args: list[str] | None = None) -> int:
    """Run what is not there yet; 1 when the recipe misses a gate."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.promoe_tri28", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results are")
    parser.add_argument("--only", default="*", help="variants to run, e.g. 'recipe'; 'samplers' draws again")
    parser.add_argument("--jobs", type=int, default=1, help="variants at a time, one thread each; not the recipe")
    options = parser.parse_args(args)
    report: dict[str, Any] = {"command": "python -m benchmarks.promoe_tri28", "machine": machine(), "threads": 1}
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    report |= {"variants": known.get("variants", {}), "samplers": known.get("samplers", [])}
    missing = [name for name in VARIANTS if name not in report["variants"] and fnmatch.fnmatch(name, options.only)]

    def run(name: str) -> None:
        report["variants"][name] = train(name)
        report["variants"] = {key: report["variants"][key] for key in VARIANTS if key in report["variants"]}
        write_json(options.json, report)

    if "recipe" in missing:
        run("recipe")
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(run, name) for name in missing if name != "recipe"]
        for job in track(jobs, description="variants", transient=True):
            job.result()
    if not report["samplers"] and "recipe" in report["variants"] and fnmatch.fnmatch("samplers", options.only):
        report["samplers"] = draw(newest("recipe"))
        write_json(options.json, report)
    show(report)
    if options.json == RESULTS:
        text = README.read_text(encoding="utf-8")
        write_text(README, BLOCK.sub(lambda found: found[1] + table(report) + found[2], text))
    problems = complaints(report)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
