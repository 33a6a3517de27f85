# SPDX-License-Identifier: Apache-2.0
"""A compiled layer gives the same numbers, and does not compile again when the routing changes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moeapps.moe import LinearScore, MLPExperts, MoELayer, Router, TopK


# The compiler itself looks at .grad of the tensors that cross a graph break.
@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize(
    "num_rows",
    [16, pytest.param(4096, marks=pytest.mark.slow)],  # grouped_mm, which float32 tracing refuses, and segments
)
def test_compiled_equals_eager_with_one_graph_for_all_routings(num_rows: int) -> None:
    from torch._dynamo.utils import counters

    layer = MoELayer(Router(LinearScore(32, 4), TopK(2)), MLPExperts(4, 32, 512))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, backend="eager")

    for _ in range(3):
        x_ND = torch.randn(num_rows, 32, requires_grad=True)
        inputs = [x_ND, *layer.parameters()]
        eager = layer(x_ND), *torch.autograd.grad(layer(x_ND).square().sum(), inputs)
        traced = compiled(x_ND), *torch.autograd.grad(compiled(x_ND).square().sum(), inputs)
        torch.testing.assert_close(traced, eager)

    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_importing_the_core_does_not_import_the_compiler() -> None:
    code = "import sys, moeapps.moe; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
