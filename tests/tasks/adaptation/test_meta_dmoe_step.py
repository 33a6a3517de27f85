# SPDX-License-Identifier: Apache-2.0
"""The step that adapts a student: against solutions by hand, finite differences, and what it must not touch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tasks.adaptation.nets.adapt import InnerStep, Weights, batch_statistics
from tasks.adaptation.nets.backbones import SmallCNN, TimmBackbone
from tests.tasks.adaptation.meta_dmoe_common import LinearBackbone, facts, images, net, own

S, D = 7, 5


def linear_case() -> tuple[LinearBackbone, Tensor, Tensor]:
    torch.manual_seed(0)
    return LinearBackbone(facts()).double(), images(S).double(), torch.randn(S, D, dtype=torch.float64)


def test_rate_0_and_0_steps_change_nothing() -> None:
    x, query = images(S), images(9, seed=1)
    for step in (InnerStep(rate=0.0), InnerStep(steps=0)):
        made = net(step)
        with torch.no_grad():
            assert torch.equal(made(query, made.adapt(x)), made(query))


def test_a_target_that_the_student_meets_has_a_gradient_of_exactly_0() -> None:
    made = net(InnerStep(rate=10.0, steps=3))
    x = images(S)
    target = made.student.backbone(x).detach()

    weights = made.step(made.student.backbone, x, target)

    for name, value in made.student.backbone.named_parameters():
        assert torch.equal(weights.parameters[name], value)


def test_the_step_of_a_linear_student_is_that_of_least_squares() -> None:
    backbone, x, target = linear_case()
    w, flat = backbone.linear.weight.detach(), x.flatten(1)
    expected = w - 0.3 * 2 / (S * D) * (w @ flat.T - target.T) @ flat

    found = InnerStep(rate=0.3).bind(backbone)(backbone, x, target).parameters["linear.weight"]

    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_sum_with_a_rate_that_many_times_smaller_is_the_same_step() -> None:
    """The paper's loss is a squared norm; ours is a mean."""
    backbone, x, target = linear_case()
    w = backbone.linear.weight.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad((x.flatten(1) @ w.T - target).square().sum(), w)

    found = InnerStep(rate=0.3).bind(backbone)(backbone, x, target).parameters["linear.weight"]

    torch.testing.assert_close(found, w.detach() - 0.3 / (S * D) * slope, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_several_steps_are_single_ones_in_a_row(steps: int) -> None:
    backbone, x, target = linear_case()
    by_hand, single = backbone.linear.weight.detach(), x.flatten(1)
    for _ in range(steps):
        by_hand = by_hand - 0.3 * 2 / (S * D) * (by_hand @ single.T - target.T) @ single
    step = InnerStep(rate=0.3, steps=steps).bind(backbone)

    torch.testing.assert_close(step(backbone, x, target).parameters["linear.weight"], by_hand, atol=1e-12, rtol=0)
    again = InnerStep(rate=0.3).bind(backbone)
    weights = Weights.of(backbone)
    for _ in range(steps):
        weights = again(backbone, x, target, start=weights)
    torch.testing.assert_close(weights.parameters["linear.weight"], by_hand, atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", ["second", "first"])
def test_weights_follow_targets_as_the_formula_says(order: str) -> None:
    """d W' / d t[s, d] = rate * 2 / (S D) * x[s] in row d, for either order: nothing of it is lost."""
    backbone, x, target = linear_case()
    step = InnerStep(rate=0.3, order=order).bind(backbone)  # type: ignore[arg-type]
    target.requires_grad_()
    moved = step(backbone, x, target, train=True).parameters["linear.weight"]
    probe = torch.randn_like(moved)

    (found,) = torch.autograd.grad((moved * probe).sum(), target)

    torch.testing.assert_close(found, 0.3 * 2 / (S * D) * x.flatten(1) @ probe.T, atol=1e-12, rtol=0)


def test_the_first_order_passes_straight_to_the_student_and_the_second_also_through_its_gradient() -> None:
    backbone, x, target = linear_case()
    flat = x.flatten(1)
    probe = torch.randn(D, flat.shape[1], dtype=torch.float64)
    curved = probe - 0.3 * 2 / (S * D) * probe @ flat.T @ flat
    for order, expected in (("first", probe), ("second", curved)):
        step = InnerStep(rate=0.3, order=order).bind(backbone)  # type: ignore[arg-type]
        moved = step(backbone, x, target, train=True).parameters["linear.weight"]
        (found,) = torch.autograd.grad((moved * probe).sum(), backbone.linear.weight)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def query_loss(**options: object) -> tuple[nn.Module, Callable[[], Tensor]]:
    made = net(InnerStep(rate=0.1, **options)).double()  # type: ignore[arg-type]
    x, query = images(6).double(), images(5, seed=3).double()
    label = torch.arange(5) % 4

    def loss() -> Tensor:
        return cross_entropy(made(query, made.adapt(x, made.tokens(x, own(6, 1)), train=True)), label)

    return made, loss


@pytest.mark.parametrize("part", ["student.backbone", "student.head", "aggregator", "step"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_second_order_is_that_of_finite_differences(part: str, steps: int) -> None:
    made, loss = query_loss(steps=steps, learned=True)
    params = list(made.get_submodule(part).parameters())
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in params]
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(), params), direction, strict=True))

    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p += sign * 1e-5 * d
        values.append(float(loss().detach()))
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p -= sign * 1e-5 * d

    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(slope), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("order", ["second", "first"])
def test_the_aggregator_learns_through_the_step_alone(order: str) -> None:
    made, loss = query_loss(order=order)
    loss().backward()

    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in made.aggregator.parameters())
    assert all(p.grad is None for p in made.layer.parameters())
    without, plain = query_loss(order=order)
    without.step.rate = 0.0
    plain().backward()
    assert all(p.grad is None or not p.grad.any() for p in without.aggregator.parameters())


def test_adapting_touches_nothing_of_the_network_and_domains_do_not_meet() -> None:
    for statistics in (0.0, 1.0):
        made = net(InnerStep(rate=0.5, statistics=statistics))
        before = copy.deepcopy(made.state_dict())
        one, two, query = images(6, seed=1), images(6, seed=2), images(4, seed=3)
        with torch.no_grad():
            first = [made(query, made.adapt(x)) for x in (one, two)]
            second = [made(query, made.adapt(x)) for x in (two, one)][::-1]

        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(first[0], first[1])
        after = made.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not made.training


def test_only_what_the_patterns_name_moves() -> None:
    made = net(InnerStep(rate=0.5, moved=["linear.*", "blocks.2.1.*"]))
    with torch.no_grad():
        weights = made.adapt(images(6))

    moved = {n for n, p in made.student.backbone.named_parameters() if not torch.equal(p, weights.parameters[n])}
    assert moved == {"linear.weight", "linear.bias", "blocks.2.1.weight", "blocks.2.1.bias"}


def test_inference_mode_makes_no_difference() -> None:
    made, x, query = net(InnerStep(rate=0.3, statistics=0.5)), images(6), images(4, seed=1)
    with torch.no_grad():
        expected = made(query, made.adapt(x))
    with torch.inference_mode():
        x, query = images(6), images(4, seed=1)  # tensors of inference mode cannot be saved for a gradient

        assert torch.equal(made(query, made.adapt(x)), expected)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_statistics_of_the_support_are_those_of_the_activations(share: float) -> None:
    made, x = net(InnerStep(rate=0.0, statistics=share)), images(6)
    backbone = made.student.backbone
    assert isinstance(backbone, SmallCNN)
    first = backbone.blocks[0]
    assert isinstance(first, nn.Sequential)
    out = first[0](x).transpose(0, 1).flatten(1)

    buffers = made.step(backbone, x, torch.zeros(6, 8)).buffers

    old = dict(backbone.named_buffers())
    for name, own_value in (("mean", out.mean(1)), ("var", out.var(1))):
        key = f"blocks.0.1.running_{name}"
        torch.testing.assert_close(buffers[key], (1 - share) * old[key] + share * own_value)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.999])
def test_the_statistics_of_deeper_layers_are_those_behind_layers_that_mix(share: float) -> None:
    """What a layer will see from the support is what its share of the support was taken from."""
    made, x = net(InnerStep(rate=0.0, statistics=share)).double(), images(6).double()
    backbone = made.student.backbone
    old = {name: value.clone() for name, value in backbone.named_buffers()}
    expected, kept = {}, x
    for block in range(3):
        weight, scale, shift = (
            backbone.get_parameter(f"blocks.{block}.{name}") for name in ("0.weight", "1.weight", "1.bias")
        )
        kept = nn.functional.conv2d(kept, weight, padding=1)
        flat = kept.transpose(0, 1).flatten(1)
        own = {"mean": flat.mean(1), "var": (flat - flat.mean(1, keepdim=True)).square().sum(1) / (flat.shape[1] - 1)}
        mixed = {n: (1 - share) * old[f"blocks.{block}.1.running_{n}"] + share * value for n, value in own.items()}
        expected |= {f"blocks.{block}.1.running_{name}": value for name, value in mixed.items()}
        mean, var, gamma, beta = (v[:, None, None] for v in (mixed["mean"], mixed["var"], scale, shift))
        kept = nn.functional.max_pool2d(((kept - mean) / (var + 1e-5).sqrt() * gamma + beta).relu(), 2)

    found = made.step(backbone, x, torch.zeros(6, 8, dtype=torch.float64)).buffers

    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
        assert torch.equal(dict(backbone.named_buffers())[name], old[name])
    assert not any(module.training or module._forward_pre_hooks for module in backbone.modules())


def test_one_image_leaves_the_statistics_as_they_are() -> None:
    made = net(InnerStep(statistics=1.0))
    buffers = made.step(made.student.backbone, images(1), torch.zeros(1, 8)).buffers

    assert all(torch.equal(buffers[name], value) for name, value in made.student.backbone.named_buffers())


def test_batch_statistics_are_undone() -> None:
    backbone = net().student.backbone
    with batch_statistics(backbone):
        pass
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_networks_of_timm_have_a_second_derivative(name: str) -> None:
    backbone = TimmBackbone(facts(image_size=160), name=name)
    step = InnerStep(rate=0.1).bind(backbone)
    target = torch.zeros(2, backbone.dim, requires_grad=True)

    weights = step(backbone.eval(), images(2, size=160), target, train=True)
    weights.run(backbone, images(1, seed=1, size=160)).square().sum().backward()

    assert target.grad is not None
    assert bool(target.grad.any())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rate": -1.0}, "rate=-1.0"),
        ({"statistics": 2.0}, "statistics=2.0"),
        ({"order": "third"}, "second or first"),
        ({"learned": True, "rate": 0.0}, "small rate"),
    ],
)
def test_options_out_of_range_are_told(options: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        InnerStep(**options)  # type: ignore[arg-type]


def test_a_pattern_without_a_parameter_is_told() -> None:
    with pytest.raises(ValueError, match=r"'layer9\.\*'.* match no parameter"):
        net(InnerStep(moved=["linear.*", "layer9.*"]))
