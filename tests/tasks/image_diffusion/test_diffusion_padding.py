# SPDX-License-Identifier: Apache-2.0
"""Masked tokens do not exist for the rivals' routers and losses, whatever stands in them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from moeapps.moe import AuxLoss, MoELayer, MoERecorder, Record
from moeapps.moe.presets import promoe
from tasks.image_diffusion.losses import CapacityLoss, RouterSimilarity, RoutingContrast, SuperclassLoss
from tasks.image_diffusion.rivals import routers
from tests.tasks.image_diffusion.test_diffusion_routers import FACTORIES

D, E, K, IMAGES, L = 8, 3, 6, 4, 6
NAMES = [name for name in FACTORIES if name != "random"]  # which draws by place


def layer_of(name: str, *, split: bool) -> MoELayer:
    layer = promoe(num_experts=E, conditional_split=split, router=FACTORIES[name])(D).double()
    for module in layer.modules():
        if isinstance(module, routers.ClassTable):
            module.use_superclasses([0, 0, 0, 1, 1, 1])
    for parameter in layer.router.parameters():
        nn.init.normal_(parameter)
    return layer


def losses_of(record: Record) -> dict[str, Tensor]:
    """Every loss that is defined for this router."""
    superclass = SuperclassLoss()
    superclass.use_superclasses([0, 0, 0, 1, 1, 1])
    kinds: list[AuxLoss] = [RouterSimilarity(), CapacityLoss(), RoutingContrast(), RoutingContrast(per_image=True)]
    found = {}
    for place, loss in enumerate([*kinds, superclass]):
        try:
            found[f"{place} {loss.name}"] = loss.compute(record)
        except ValueError:
            continue
    return found


def step(layer: MoELayer, x: Tensor, group: Tensor, real: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Outputs of the real tokens, losses, gradients, counts and buffers after one pass."""
    torch.manual_seed(4)
    with MoERecorder(layer) as recorder:
        y = layer(x, group=group, token_mask=mask)[real]
    record = recorder.records[0]
    found = losses_of(record)
    total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + sum(found.values())
    leaves = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found |= {f"gradient {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    found |= {f"buffer {name}": b.clone() for name, b in layer.named_buffers()}
    return found | {"y": y, "counts": record.routing.counts(), "weights": record.routing.assignment()[real]}


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_padding_tokens_change_nothing(name: str, split: bool, training: bool, value: float) -> None:
    layer = layer_of(name, split=split).train(training)
    if name == "k_means":  # start from given centroids: the first ones are drawn, which is not what is asked here
        score = next(module for module in layer.modules() if isinstance(module, routers.KMeansScore))
        score.centroids.normal_()
        score.started.fill_(True)
    twin = copy.deepcopy(layer)
    label = torch.tensor([0, 4, K, 2])  # one image without a class, of a group of its own as in the network
    group = torch.where(label == K, -1 - torch.arange(IMAGES), torch.arange(IMAGES) * K + label).repeat_interleave(L)
    x = torch.randn(IMAGES * L, D, dtype=torch.float64)
    real = torch.randperm(4 * len(x))[: len(x)].sort().values  # 75 per cent padding, in all groups
    mask = torch.zeros(4 * len(x), dtype=torch.bool).index_fill(0, real, True)
    padded = torch.full((4 * len(x), D), value, dtype=x.dtype).index_copy(0, real, x)
    groups = group.repeat(4)[torch.randperm(4 * len(x))].index_copy(0, real, group)
    alone = step(layer, x, group, torch.arange(len(x)), None)
    within = step(twin, padded, groups, real, mask)
    assert alone.keys() == within.keys()
    for key, wanted in alone.items():
        torch.testing.assert_close(within[key], wanted, rtol=1e-9, atol=1e-9, msg=lambda text, k=key: f"{k}: {text}")


def test_every_loss_of_the_task_was_met() -> None:
    """The law above would be silent about a loss that is defined for none of its routers."""
    met = set()
    for name in NAMES:
        layer, x, group = layer_of(name, split=False), torch.randn(8, D, dtype=torch.float64), torch.arange(8)
        with MoERecorder(layer) as recorder:
            layer(x, group=group)
        met |= {key.split()[1] for key in losses_of(recorder.records[0])}
    assert met == {"similarity", "capacity", "contrast", "superclass"}


@pytest.mark.parametrize("name", ["diffmoe", "expert_race", "expert_choice_batch", "k_means"])
def test_tokens_without_a_class_do_not_compete_under_the_split(name: str) -> None:
    """By hand: at a capacity of 1 there are as many pairs as tokens with a class; statistics are those of these."""
    layer = layer_of(name, split=True).train()
    inner = copy.deepcopy(layer.router.conditional)
    x, group = torch.randn(40, D, dtype=torch.float64), torch.tensor([-1, 0, -1, 3]).repeat(10)
    torch.manual_seed(2)
    routing = layer.route(x, group=group)
    torch.manual_seed(2)
    alone = inner(x[group >= 0], group=group[group >= 0])
    pairs = 18 if name in ("diffmoe", "expert_choice_batch") else 20  # 20 tokens: 3 times floor(20 / 3), or 20
    assert int(routing.counts()[:E].sum()) == pairs
    torch.testing.assert_close(routing.assignment()[group >= 0, :E], alone.assignment())
    for key, value in inner.named_buffers():
        torch.testing.assert_close(layer.router.conditional.get_buffer(key), value)
