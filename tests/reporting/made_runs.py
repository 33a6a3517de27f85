# SPDX-License-Identifier: Apache-2.0
"""Run folders written by hand, with all that a report page reads, for tests of it."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np

DOMAINS = {"north": "seen", "south": "seen", "east": "validation", "west": "unseen"}


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def write_run(
    folder: Path,
    *,
    system: str = "toy",
    name: str = "base",
    seed: int = 0,
    task: str = "elsewhere.module.Task",
    domains: dict[str, str] | None = None,
    scores: tuple[float, ...] = (0.81, 0.79, 0.7, 0.613),
    layers: dict[str, Any] | None = None,
) -> Path:
    """Write a finished run with two layers, the first even, the second specialised by domain."""
    domains = domains or DOMAINS
    units = [[score - 0.01, score, score + 0.01] for score in scores]
    header = {"task": task, "main_metric": "accuracy", "system": system, "name": name, "seed": seed}
    header |= {"seeds": {"seed_everything": seed}, "config_hash": f"{seed:012x}", "variant_hash": f"of {name}"}
    header |= {"params_total": 4321, "params_active": 1234, "train_flops": 987654321, "train_steps": 77}
    header |= {"fit_seconds": 12.75, "global_step": 77, "epoch": 3, "commit": "c0ffee"}
    header |= {"sources": dict.fromkeys(domains, "generated, seed 0; licence: none needed")}
    rows = [
        {"domain": domain, "role": role, "metric": "accuracy", "value": score, "n": 3, "direction": "max"}
        for (domain, role), score in zip(domains.items(), scores, strict=True)
    ]
    means = {"seen": {"accuracy": 0.8}}
    content = {"header": header, "rows": rows, "summary": means}
    content |= {"units": {domain: {"accuracy": unit} for domain, unit in zip(domains, units, strict=True)}}
    write(folder / "metrics" / "test.json", content)
    if layers is None:
        even, own = np.full((4, 4), 25.0), 80 * np.eye(4) + 5
        layers = {"net.blocks.0.ffn": layer(even.tolist(), 0.0), "net.blocks.1.ffn": layer(own.tolist(), 0.456)}
    write(folder / "metrics" / "routing_test.json", {"domains": list(domains), "layers": layers})
    write(folder / "config.yaml", f"system: {system}\nname: {name}\nseed_everything: {seed}\n")
    write(folder / "run.json", {"system": system, "name": name, "seed": seed})
    lines = ["step,train/loss,val/seen/accuracy,val/unseen/accuracy,moe/net.blocks.1.ffn/load_cv"]
    lines += [f"{step},{2.5 / (1 + step)},," + "," for step in range(5)]
    lines += [f"{step},,{0.5 + step / 100},{0.4 + step / 100},{0.3 - step / 100}" for step in (2, 4)]
    write(folder / "metrics.csv", "\n".join(lines) + "\n")
    return folder


def layer(work: list[list[float]], told: float) -> dict[str, Any]:
    return {"num_experts": len(work[0]), "load_cv": 0.0, "entropy": 0.69, "dead": 0.0, "mi_domain": told, "work": work}


def tone(file: Path, seconds: float = 0.1) -> None:
    """Write a WAV file of a tone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rate = 8000
    samples = (8000 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype("<i2")
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes(samples.tobytes())


def write_scan(file: Path, points: int = 300) -> None:
    """Write what a test of point clouds keeps for its page."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, points)
    np.savez(
        file,
        position=rng.normal(size=(points, 3)).astype(np.float32),
        truth=label.astype(np.int16),
        prediction=((label + (rng.random(points) < 0.2)) % 3).astype(np.int16),
        expert=rng.integers(0, 4, points).astype(np.int16),
        name=np.array(["wall", "floor", "<b>chair</b>"]),
        title=np.array("north (seen)"),
        note=np.array("scan_0"),
    )
