# SPDX-License-Identifier: Apache-2.0
"""``moeapps export RUN``: weights, a description, and where the network allows one a program, as files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeapps.loading import Trained
    from moeapps.training.inputs import Program

ABOUT, PROGRAM = "about.json", "program.pt2"
ONNX = (
    "No ONNX file is written: its operators have no product per expert of rows that the data sort, so every expert "
    "would run on every row, at E / k times the work, and drawing, solvers and adaptation would be missing. Use "
    "program.pt2, or moeapps.load."
)
# What the outputs of a program and of its network may differ by, over the largest output.
TOLERANCE = 1e-4


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="moeapps export",
        description="Write a trained run for other programs: model.safetensors (all weights), about.json (what it is, "
        "its sizes, scores, versions and files), config.yaml, what inputs need besides (a tokenizer), and program.pt2 "
        "(torch.export) where the network is a graph of operations on tensors; about.json says what it covers, or why "
        "there is none. Weights and graph are compared with the run before the command ends. moeapps.load(DIR) "
        "reads the folder like a run.",
        epilog=ONNX,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or runs/<system>/<name>: its newest version")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write into (default: RUN/export)")
    parser.add_argument("--ckpt_path", type=Path, metavar="FILE", help="checkpoint (default: best, else last)")
    parser.add_argument("--trust", metavar="none|PACKAGE,...", help="what its config may import (docs/reliability.md)")
    return parser


def main(args: list[str]) -> int:
    """Export a run and say what was written."""
    options = parser().parse_args(args)
    from moeapps.commands.trust import take_trust
    from moeapps.loading import load_run
    from moeapps.text import lines

    try:
        trust = take_trust([] if options.trust is None else ["--trust", options.trust])[1]
        trained = load_run(options.run, checkpoint=options.ckpt_path, trust=trust)
        folder = options.out or trained.run / "export"
        about = export(trained, folder)
    except (ValueError, OSError) as error:
        print(f"error: {lines(error)}", file=sys.stderr)
        return 2
    print(f"{folder}: {', '.join(about['files'])}")
    print(about["program"].get("covers") or f"no {PROGRAM}: {about['program']['why_not']}")
    return 0


def export(trained: Trained, folder: Path) -> dict[str, Any]:
    """Write a loaded run into a folder and compare what was written with it.

    Returns:
        What about.json holds.

    Raises:
        ValueError: the folder is the run itself, or what was written differs.
    """
    from moeapps.files import finite, write_text

    if folder.resolve() == trained.run.resolve():
        raise ValueError(f"--out {folder} is what is exported; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", (trained.run / "config.yaml").read_text(encoding="utf-8"))
    files = [_write_weights(trained, folder), "config.yaml", *trained.data.save_parts(folder)]
    found = trained.task.program()
    program: dict[str, Any] = {"why_not": found} if isinstance(found, str) else _write_program(found, folder)
    if "why_not" in program:
        (folder / PROGRAM).unlink(missing_ok=True)  # of an earlier export
    else:
        files.append(PROGRAM)
    about = _about(trained, [*files, ABOUT], program)
    write_text(folder / ABOUT, json.dumps(finite(about), indent=1, allow_nan=False, default=str) + "\n")
    return about


def _write_weights(trained: Trained, folder: Path) -> str:
    """Write all weights, read them again, and compare bit by bit."""
    import torch
    from safetensors.torch import load_file, save_file

    from moeapps.files import WholeFile
    from moeapps.loading import WEIGHTS

    # Copies: some weights are views of one memory, which the format does not hold.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in trained.task.state_dict().items()}
    with WholeFile(folder / WEIGHTS) as temporary:
        save_file(state, temporary, {"format": "pt"})
    again = load_file(folder / WEIGHTS)
    if any(not torch.equal(again[name].nan_to_num(), value.nan_to_num()) for name, value in state.items()):
        raise ValueError(f"{folder / WEIGHTS} does not hold what was written; look at the disk")
    return WEIGHTS


def _write_program(program: Program, folder: Path) -> dict[str, Any]:
    """Trace, write, read again and compare with the module; or say why not.

    The first dimension is free where the tracer allows, and compared at two sizes; else it is that of the examples.
    """
    import torch
    from torch.export import Dim

    module, reasons = program.module.eval(), []
    for batch in ("batch", None):
        # Copies: a trace that fails leaves its free sizes marked on the tensors, so that the next would fail, too.
        inputs = tuple(part.clone() for part in program.inputs.values())
        shapes = None if batch is None else _shapes(module, inputs, Dim.DYNAMIC)
        sizes = [inputs] if batch is None else [inputs, tuple(torch.cat([part, part[:1]]) for part in inputs)]
        try:
            with torch.no_grad():
                torch.export.save(torch.export.export(module, inputs, dynamic_shapes=shapes), folder / PROGRAM)
                again = torch.export.load(folder / PROGRAM).module()
                pairs = [(module(*other), again(*other)) for other in sizes]
        except Exception as error:  # whatever the tracer meets: about.json carries its first line
            reasons.append(next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error)))
            continue
        for wanted, found in pairs:
            size = wanted.abs().max().clamp(min=1e-6)
            if found.shape != wanted.shape or not bool((found - wanted).abs().max() <= TOLERANCE * size):
                raise ValueError(f"{folder / PROGRAM} answers otherwise than the network; report this")
        described = {
            name: {"shape": [batch or len(part), *part.shape[1:]], "dtype": str(part.dtype)}
            for name, part in program.inputs.items()
        }
        return {"covers": program.covers, "inputs": described}
    return {"why_not": f"torch.export cannot trace {type(module).__name__}: {reasons[-1][:200]}"}


def _shapes(module: Any, inputs: tuple[Any, ...], free: Any) -> Any:
    """One entry per tensor; those of a star argument stand in a tuple of their own."""
    import inspect

    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    each = [{0: free} for _ in inputs]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        star = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        return (*each[:star], tuple(each[star:])) if each[star:] else tuple(each)
    return tuple(each)


def _about(trained: Trained, files: list[str], program: dict[str, Any]) -> dict[str, Any]:
    """What there is to know of the files without opening them."""
    from moeapps.bounds import read_yaml
    from moeapps.training.run import versions

    task, data = trained.task, trained.data
    config = read_yaml(trained.run / "config.yaml")
    return {
        "format": 1,
        "system": config.get("system"),
        "name": config.get("name"),
        "task": f"{type(task).__module__}.{type(task).__qualname__}",
        "data": f"{type(data).__module__}.{type(data).__qualname__}",
        "parameters": sum(p.numel() for p in task.parameters()),
        "checkpoint": trained.checkpoint.name,
        "facts": task.facts,
        "sources": data.sources,
        "run": _json(trained.run / "run.json"),
        "scores": _scores(trained.run),
        "versions": versions(),
        "files": files,
        "program": program,
        "onnx": ONNX,
    }


def _scores(run: Path) -> Any:
    """The scores of the test, metric -> domain -> value; None where there was none."""
    from moeapps.evaluation.results import read_results

    try:
        return read_results(run).values
    except ValueError:
        return None


def _json(path: Path) -> Any:
    """What a file of the run holds; None where there is none."""
    from moeapps.bounds import read_json

    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
