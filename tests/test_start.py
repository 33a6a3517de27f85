# SPDX-License-Identifier: Apache-2.0
"""A training starts without packages that it does not use; whoever uses them later gets them as they are."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moeapps.commands.later import collect_again, without_collector
from tests.systems import BASES, name, tiny

UNUSED = (
    "torchvision",
    "scipy.signal",
    "scipy.stats",
    "matplotlib",
    "torch._dynamo",
    "sympy",
    "triton",
    "transformers",
    "pandas",
)
# system -> what of these its steps use
USED = {
    "meta_dmoe": ("sympy",),  # torch's multi-head attention checks its sizes by it
    "promoe": ("torchvision",),  # timm's transforms are subclasses of torchvision's
    "point_moe": ("torchvision",),
}

FIRST_STEP = """
import json, os, sys
import moeapps.cli as cli
from moeapps.commands.later import start_quickly

start_quickly()
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop as Loop
advance = Loop.advance

def once(self, *args, **kwargs):
    advance(self, *args, **kwargs)
    print(json.dumps(sorted(sys.modules)), flush=True)
    os._exit(0)

Loop.advance = once
sys.exit(cli.main(json.loads(sys.argv[1])))
"""


def fresh(code: str, *args: str, **variables: str) -> str:
    """The last line that a process of its own writes; its imports are those of a user's."""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTHONWARNINGS": "ignore", **variables}
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES, ids=name)
def test_the_first_step_needs_no_package_that_it_does_not_use(base: Path, tmp_path: Path) -> None:
    words = ["fit", *tiny(base), "--trainer.enable_progress_bar", "false"]

    loaded = set(json.loads(fresh(FIRST_STEP, json.dumps(words), MOEAPPS_RUNS=str(tmp_path))))

    assert not [package for package in UNUSED if package in loaded and package not in USED.get(base.stem, ())]


LATER = """
import sys
from moeapps.commands.later import start_quickly

start_quickly()
import lightning
UNUSED = %r
early = [name for name in UNUSED if name in sys.modules]

import pickle
import torch
from importlib.util import find_spec
from lightning.fabric.wrappers import _unwrap_compiled
from lightning.pytorch.utilities.compile import _maybe_unwrap_optimized
from torch.optim import Adam, SGD
from torchmetrics import MeanMetric
from torchmetrics.utilities import plot

arniqa = sys.modules["torchmetrics.functional.image.arniqa"]
weight = torch.nn.Parameter(torch.ones(2))
moved = []
for kind in (Adam, SGD):
    optimizer = kind([weight], lr=0.5)
    optimizer.zero_grad()
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    moved.append(weight.tolist())
layer = torch.nn.Linear(2, 2)
plain = _unwrap_compiled(layer)[0] is layer
still = [name for name in UNUSED if name in sys.modules]
pickle.loads(pickle.dumps(MeanMetric()))
before = all(find_spec(name) is not None for name in ("torchvision", "scipy.signal", "matplotlib", "torch._dynamo"))

figure, axis = MeanMetric().plot(torch.tensor(0.5))  # torchmetrics' own name of matplotlib
import matplotlib.figure, scipy, scipy.signal, torchvision
real = [type(figure) is matplotlib.figure.Figure, scipy.signal.resample_poly is not None, hasattr(scipy, "signal")]
real += [arniqa.resnet50 is not torchvision.models.resnet50 and arniqa.resnet50(weights=None) is not None]
real += [isinstance(torchvision.models.resnet18(), torch.nn.Module), plot._error_on_missing_matplotlib() is None]

compiled = torch.compile(layer, backend="eager")
x = torch.ones(1, 2)
real += [bool((compiled(x) == layer(x)).all()), _unwrap_compiled(compiled)[0] is layer, hasattr(torch, "_dynamo")]
optimizer = Adam([weight], lr=0.5)
inner = Adam.zero_grad.__wrapped__
step = torch.compile(optimizer.step, backend="eager")
weight.grad = torch.ones(2)
step()
optimizer.zero_grad()
real += ["__dynamo_disable" in vars(inner) and vars(inner)["__dynamo_disable"] is not inner, weight.grad is None]
from moeapps.commands.later import Later
stand_in = Later("collections.OrderedDict", "collections", lambda: False)
import collections, copy
class Own(stand_in): pass
real += [copy.deepcopy(stand_in) is copy.copy(stand_in) is pickle.loads(pickle.dumps(stand_in))]
real += [issubclass(Own, collections.OrderedDict)]
from PIL import Image
from timm.data import create_transform
real += [create_transform(32, is_training=True)(Image.new("RGB", (40, 40))).shape == (3, 32, 32)]
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
with FlopCounterMode(display=False) as counter:
    torch.ones(2, 3) @ torch.ones(3, 4)
real += [counter.get_total_flops() == 48, callable(register_flop_formula([torch.ops.aten.sin])(len))]
import torch_geometric, torch.utils.tensorboard
from tensorboard.compat.tensorflow_stub.io import gfile
real += [not any(name in sys.modules for name in ("torch_geometric.llm", "boto3"))]
from torch_geometric.datasets import web_qsp_dataset
real += [web_qsp_dataset.LargeGraphIndexer._real() is torch_geometric.llm.large_graph_indexer.LargeGraphIndexer]
print({"early": early, "still": still, "moved": moved, "plain": plain, "before": before, "real": real,
       "last": weight.tolist()})
"""


@pytest.mark.slow
def test_what_waits_is_there_when_it_is_used() -> None:
    found: dict[str, Any] = eval(fresh(LATER % (UNUSED,), MPLBACKEND="Agg"))

    assert found["early"] == found["still"] == []
    # Adam's first step is lr in size; SGD's is lr times the gradient; and Adam's first once more, compiled.
    assert found["moved"] == [pytest.approx([0.5, 0.5], abs=1e-6), pytest.approx([0.0, 0.0], abs=1e-6)]
    assert found["last"] == pytest.approx([-0.5, -0.5], abs=1e-4)  # with its step as a float32
    assert found["plain"]
    assert found["before"]
    assert found["real"] == [True] * len(found["real"])


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """The collector as a program finds it; the session has frozen what it holds (tests/conftest.py)."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_the_search_for_cycles_is_off_while_building_and_on_afterwards() -> None:
    assert gc.isenabled()
    with without_collector():
        assert not gc.isenabled()
        with without_collector():  # a command within a command
            assert not gc.isenabled()
        assert not gc.isenabled()
        collect_again()
        assert gc.isenabled()  # a run trains with it
        assert gc.get_freeze_count() > 0
        cycle: list[Any] = []
        cycle.append(cycle)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0  # what a program made that calls us again and again can be freed
    with pytest.raises(ValueError, match="told"), without_collector():
        raise ValueError("told")
    assert gc.isenabled()


@pytest.mark.usefixtures("nothing_frozen")
def test_a_program_with_plans_of_its_own_for_the_collector_keeps_them() -> None:
    gc.disable()
    try:
        with without_collector():
            collect_again()
            assert not gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()
