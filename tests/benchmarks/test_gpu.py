# SPDX-License-Identifier: Apache-2.0
"""``make gpu-check`` where there is no accelerator: what it says, what it keeps, and that every part runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_layers
from benchmarks.gpu_device import Device, relative_error, too_far, verdict
from tests.systems import BASES

# The kernels of scattermoe as plain products: (x, W, k, sorted experts, order, ends) as its parallel_linear takes them.
SCATTERMOE = """
import torch

def flatten_sort_count(expert_NK, num_experts):
    sorted_M, order_M = expert_NK.flatten().sort()
    return sorted_M, order_M, expert_NK.flatten().bincount(minlength=num_experts).cumsum(0)

def parallel_linear(x, weight, k, sorted_M, order_M, ends, gates=None, grouped_in=False, grouped_out=False):
    rows = x if grouped_in else x[order_M // k]
    y = torch.stack([row @ weight[e] for row, e in zip(rows, sorted_M.tolist())])
    if grouped_out:
        return y
    back = torch.empty_like(y).index_copy(0, order_M, y)
    return (back.view(*gates.shape, -1) * gates.unsqueeze(-1)).sum(1)
"""
# sonic-moe's layer: a router, rows of gate and value in turn, and weights that are a softmax over the chosen.
SONIC = """
import torch
from torch import nn
from sonicmoe.enums import ActivationType

class Stack(nn.Module):
    def __init__(self, e, out, into):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(e, out, into))

class MoE(nn.Module):
    def __init__(self, num_experts, num_experts_per_tok, hidden_size, intermediate_size, activation, add_bias, std):
        super().__init__()
        assert activation is ActivationType.SWIGLU and not add_bias
        self.k, self.router = num_experts_per_tok, nn.Linear(hidden_size, num_experts, bias=False)
        self.c_fc = Stack(num_experts, 2 * intermediate_size, hidden_size)
        self.c_proj = Stack(num_experts, hidden_size, intermediate_size)

    def forward(self, x):
        value, chosen = self.router(x).float().topk(self.k)
        rows = []
        for row, weights, ids in zip(x, value.softmax(-1), chosen.tolist()):
            parts = []
            for weight, e in zip(weights, ids):
                h = self.c_fc.weight[e] @ row
                parts.append(weight * (self.c_proj.weight[e] @ (nn.functional.silu(h[::2]) * h[1::2])))
            rows.append(sum(parts))
        return torch.stack(rows).to(x.dtype), None
"""


class Parts:
    """Stands in for processes: what each part gives, and which were asked."""

    def __init__(self, **given: dict[str, Any]) -> None:
        self.given, self.asked = given, []  # type: ignore[var-annotated]

    def __call__(self, name: str, seconds: float, device: str) -> dict[str, Any]:
        self.asked.append(name)
        return self.given.get(name, {"ok": True})


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_without_a_device_it_says_so_and_that_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, parts = tmp_path / "gpu.json", Parts(device={"ok": True, "name": None})

    assert gpu.check(file, "cuda", ["layers"], run=parts) == 0
    assert read(file) == {"command": "make gpu-check", "device": "no device", "told": capsys.readouterr().out.strip()}
    assert parts.asked == ["device"]


def test_without_a_device_the_results_of_one_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, here = tmp_path / "gpu.json", {"ok": True, "name": "a device"}
    assert gpu.check(file, "cuda", ["layers"], run=Parts(device=here)) == 0
    before = file.read_text()
    assert gpu.check(file, "cuda", ["layers"], run=Parts(device={"ok": True, "name": None})) == 0

    assert file.read_text() == before
    assert read(file)["device"]["name"] == "a device"
    assert "keeps the results of the last check" in capsys.readouterr().out


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = Parts(device={"ok": True, "name": "a device"}, mixtral={"ok": False, "reason": "out of memory"})

    assert gpu.check(tmp_path / "gpu.json", "cuda", ["layers", "mixtral", "kernels"], run=parts) == 1
    found = read(tmp_path / "gpu.json")
    assert {name: part["ok"] for name, part in found["parts"].items()} == {
        "layers": True,
        "mixtral": False,
        "kernels": True,
    }
    assert found["parts"]["mixtral"]["reason"] == "out of memory"
    assert found["ok"] is False
    assert "mixtral: failed: out of memory" in capsys.readouterr().out


def test_the_parts_fit_into_ten_minutes_and_none_begins_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum(gpu.BUDGETS.values()) <= gpu.WHOLE == 600
    clock = iter([0.0, 10.0, 590.0, 600.0, 600.0])
    limits = []

    def run(name: str, seconds: float, device: str) -> dict[str, Any]:
        limits.append((name, seconds))
        return {"ok": True}

    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    assert gpu.check(tmp_path / "gpu.json", "cpu", ["layers", "mixtral", "kernels"], run=run) == 1
    assert limits == [("layers", gpu.BUDGETS["layers"]), ("mixtral", 10.0)]
    assert read(tmp_path / "gpu.json")["parts"]["kernels"]["reason"] == "no time was left"


def test_every_system_has_a_part() -> None:
    assert {f"step {base.stem}" for base in BASES} == {name for name in gpu.BUDGETS if name.startswith("step ")}
    assert {f"compile {system}" for system in gpu_layers.SYSTEMS} == {n for n in gpu.BUDGETS if "compile" in n}


def test_what_a_part_raises_is_its_reason_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: Device) -> dict[str, Any]:
        raise ValueError("the first line\nand more")

    monkeypatch.setattr(gpu, "work_of", lambda name: work)
    found = gpu.done("layers", "cpu")

    assert (found["ok"], found["reason"]) == (False, "ValueError: the first line")


def test_a_plain_block_of_mixtrals_form_is_our_layer() -> None:
    size = gpu_layers.mixtral_size(Device("cpu"))
    ours = gpu_layers.swiglu_layer(size)
    plain, x = gpu_layers.PlainMixtral(ours, size.k), torch.randn(size.n, size.d)

    torch.testing.assert_close(plain(x), ours(x))


def test_kernels_that_are_not_installed_are_named() -> None:
    assert gpu_layers.kernels(Device("cpu")) == {
        "scattermoe": "not installed",
        "sonicmoe": "not installed",
        "ok": True,
    }


@pytest.fixture
def packages_of_the_test() -> Iterator[None]:
    """Forget, after the test, packages that it has made."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("scattermoe", "sonicmoe")]:
        del sys.modules[name]


@pytest.mark.parametrize("fault", ["", "scattermoe", "sonicmoe"])
def test_kernels_that_are_installed_compute_our_layer_or_are_told(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages_of_the_test: None
) -> None:
    files = {
        "scattermoe": {"__init__": "", "parallel_experts": SCATTERMOE},
        "sonicmoe": {"__init__": SONIC, "enums": "import enum\nActivationType = enum.Enum('ActivationType', 'SWIGLU')"},
    }
    if fault == "scattermoe":
        files["scattermoe"]["parallel_experts"] = SCATTERMOE.replace("weight[e]", "weight[0]")
    if fault == "sonicmoe":
        files["sonicmoe"]["__init__"] = SONIC.replace("h[::2]) * h[1::2]", "h[1::2]) * h[::2]")
    for package, modules in files.items():
        (tmp_path / package).mkdir()
        for name, text in modules.items():
            (tmp_path / package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))

    found = gpu_layers.kernels(Device("cpu"))

    for package in files:
        assert (found[package]["relative_error"] < 0.02) is (package != fault)
        assert found[package]["ratio_time"] > 0
    assert found["ok"] is (fault == "")
    assert fault in found.get("reason", "")


def test_a_host_that_waits_is_told_in_torchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits() -> None:
        if modes:
            raise RuntimeError("called a synchronizing CUDA operation\nat some place")

    assert Device("cuda").wait_told(waits) == "called a synchronizing CUDA operation"
    assert modes == ["error", "default"]
    assert Device("cuda").wait_told(lambda: None) is None


def test_errors_of_bfloat16_have_a_bound() -> None:
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)
    assert verdict({}, too_far(0.049, "it"), None) == {"ok": True}
    assert verdict({}, too_far(0.06, "it")) == {"ok": False, "reason": "it differs by 6.00%, allowed are 5%"}


@pytest.mark.slow
def test_every_part_runs_in_its_small_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gpu.json"
    # The limits are those of a device; here other work may be on the same processor.
    code = "from benchmarks import gpu; gpu.WHOLE = 1e4; gpu.BUDGETS = dict.fromkeys(gpu.BUDGETS, 1e3); "
    code += f"raise SystemExit(gpu.main(['--device', 'cpu', '--json', {str(file)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)

    found = read(file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(found["parts"]) == set(gpu.BUDGETS) - {"device"}
    for name, part in found["parts"].items():
        assert part["ok"], name
        assert not name.startswith("step ") or part["steps"] == 2
        assert not name.startswith("compile ") or part["graph_breaks"] == 0


@pytest.mark.slow
def test_a_part_ends_with_its_time() -> None:
    found = gpu.in_process("step promoe", 0.01, "cpu")

    assert (found["ok"], found["reason"]) == (False, "it was not done after 0 s")
