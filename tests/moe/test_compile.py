# SPDX-License-Identifier: Apache-2.0
"""Compiled layers route, learn and are recorded like plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moeapps.moe import (
    Capacity,
    Dense,
    ExpertChoice,
    LinearScore,
    MLPExperts,
    MoELayer,
    MoERecorder,
    Router,
    TopK,
    TopP,
    ZLoss,
)

D, E = 6, 4


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo reads it of a non-leaf
def test_a_compiled_layer_is_recorded_like_a_plain_one() -> None:
    x = torch.randn(16, D)
    for choose in (Dense(), TopK(2)):
        layer = MoELayer(Router(LinearScore(D, E), choose), MLPExperts(E, D, 8))
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=isinstance(choose, Dense))
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            with MoERecorder(layer) as recorder:
                y = run(x)
            (y.square().mean() + ZLoss(weight=1.0)(recorder.records)).backward()
            assert [r.name for r in recorder.records] == ["MoELayer"]
            results.append([y, *(p.grad.clone() for p in layer.parameters())])
        for plain, traced in zip(*results, strict=True):
            torch.testing.assert_close(plain, traced)


@pytest.mark.medium
@pytest.mark.parametrize(
    "choose", [TopK(2, balance_bias=True), TopP(0.7), ExpertChoice(1.0)], ids=["top_k", "top_p", "expert_choice"]
)
def test_routers_compile_into_one_graph_without_a_host_synchronisation(choose: nn.Module) -> None:
    capacity = Capacity(1.0, minimum=1) if isinstance(choose, TopK) else None
    router, x = Router(LinearScore(D, E), choose, capacity=capacity), torch.randn(16, D)
    compiled = torch.compile(lambda f: router(f).assignment(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), router(x).assignment())
