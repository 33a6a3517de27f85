# SPDX-License-Identifier: Apache-2.0
"""Presets: factories by plain options, one layer per call, the published sizes, and twins that match."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jsonargparse
import pytest
import torch
from torch import nn

from moeapps.moe import (
    ConditionalSplit,
    Dense,
    GLUExperts,
    LayerFactory,
    MLPExperts,
    ModuleExperts,
    MoELayer,
    Routing,
    Stack,
    presets,
)
from moeapps.moe.presets import (
    aw_moe,
    compose,
    dense,
    dense_twin,
    linear,
    meta_dmoe,
    point_moe,
    promoe,
    random_router,
    table_router,
    top_k_router,
    top_p_router,
    unimoe_audio,
)

D, N = 8, 12


def fields(dim: int) -> ModuleExperts:
    return ModuleExperts([nn.Linear(dim, dim) for _ in range(3)])


GROUP = torch.arange(N) % 3 - 1

# name -> (factory, further arguments of a call)
FACTORIES: dict[str, tuple[LayerFactory, dict[str, Any]]] = {
    "point_moe": (point_moe(), {}),
    "point_moe_shared": (point_moe(num_shared=1), {}),
    "point_moe_random": (point_moe(router=random_router()), {}),
    "point_moe_table": (point_moe(router=table_router(top_k=2)), {"group": GROUP}),
    "point_moe_cosine": (point_moe(router=top_k_router(cosine=True, jitter=0.01, capacity_factor=1.25)), {}),
    "unimoe_audio": (unimoe_audio(), {}),
    "unimoe_audio_add": (unimoe_audio(shared_weighting="add", num_null=0), {}),
    "unimoe_audio_top_k": (unimoe_audio(top_k=2), {}),
    "unimoe_audio_no_shared": (unimoe_audio(num_shared=0), {}),
    "unimoe_audio_random": (unimoe_audio(router=random_router(num_experts=8)), {}),
    "promoe": (promoe(num_experts=4), {"group": GROUP}),
    "promoe_by_expert": (promoe(num_experts=4, by_expert=True), {"group": GROUP}),
    "promoe_linear": (promoe(num_experts=4, router=top_k_router(top_k=1)), {"group": GROUP}),
    "aw_moe": (
        aw_moe(behaviour_dim=3),
        {"features": (torch.randn(N, 4, 3), torch.randn(N, 3), torch.ones(N, 4))},
    ),
    "aw_moe_softmax": (
        aw_moe(behaviour_dim=3, gate_norm="softmax", out_dim=5),
        {"features": (torch.randn(N, 4, 3), torch.randn(N, 3), torch.ones(N, 4))},
    ),
    "compose": (compose(router=top_p_router(), experts=lambda d: MLPExperts(4, d, 6)), {}),
    "dense": (dense(), {}),
    "dense_twin": (dense_twin(moe=promoe(num_experts=3)), {}),
    "dense_plain": (dense(expansion=2.0, activation="gelu", gated=False), {}),
    "linear": (linear(), {}),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_each_call_makes_a_layer_of_its_own_that_runs_and_learns(name: str) -> None:
    factory, arguments = FACTORIES[name]
    first, second, x = factory(D), factory(D), torch.randn(N, D, requires_grad=True)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    y = first(x, **arguments)
    assert y.shape[-2] == N
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    experts = first.experts if isinstance(first, MoELayer) else first
    assert all(p.grad is not None for p in experts.parameters())


FIXED = {"point_moe_random", "point_moe_table", "unimoe_audio_random", "linear"}


@pytest.mark.parametrize("name", sorted(set(FACTORIES) - FIXED))
def test_the_router_learns_where_it_should(name: str) -> None:
    factory, arguments = FACTORIES[name]
    layer = factory(D)
    layer(torch.randn(N, D), **arguments).square().sum().backward()
    for parameter in layer.router.parameters():
        assert parameter.grad is not None


@pytest.mark.parametrize("name", ["point_moe_random", "point_moe_table"])
def test_controls_have_nothing_to_learn(name: str) -> None:
    layer = FACTORIES[name][0](D)
    assert not any(p.requires_grad for p in layer.router.parameters())


@pytest.mark.parametrize(("num_experts", "expansion"), [(4, 1.0), (8, 2.0)])
@pytest.mark.parametrize("dim", [32, 512])
def test_point_moe_has_the_published_number_of_parameters(num_experts: int, expansion: float, dim: int) -> None:
    with torch.device("meta"):
        layer = point_moe(num_experts=num_experts, expansion=expansion)(dim)
    hidden = int(expansion * dim)
    assert sum(p.numel() for p in layer.parameters()) == 3 * num_experts * dim * hidden + num_experts * dim


def test_unimoe_audio_has_the_published_widths() -> None:
    with torch.device("meta"):
        layer = unimoe_audio(expansion=2752 / 2048, shared_expansion=1376 / 2048)(2048)
    routed, shared = layer.experts.banks
    assert isinstance(routed, GLUExperts)
    assert (routed.num_experts, routed.hidden_dim) == (8, 2752)
    assert (shared.num_experts, shared.hidden_dim) == (2, 1376)
    assert layer.router.score.weight.shape == (8 + 1 + 2, 2048)


def test_promoe_has_the_published_number_of_parameters() -> None:
    dim = 384
    with torch.device("meta"):
        layer = promoe()(dim)
    assert sum(p.numel() for p in layer.parameters()) == 14 * (4 * dim * dim + 3 * dim) + 12 * dim
    assert isinstance(layer.router, ConditionalSplit)


def test_the_dense_twin_of_top_2_has_its_active_operations() -> None:
    moe = point_moe(top_k=2)(64)
    for twin in (dense(expansion=2.0)(64), dense()(64), dense_twin()(64)):
        assert twin.experts.flops_per_row == moe.router.mean_k() * moe.experts.flops_per_row


@pytest.mark.parametrize(
    ("moe", "active", "whole"),
    [  # hidden widths at model width 32: of the experts that work on a row, and of all
        (point_moe(num_experts=6, top_k=3, expansion=0.5), 3 * 16, 6 * 16),
        (point_moe(num_experts=4, top_k=2, num_shared=1, expansion=1.0), 3 * 32, 5 * 32),
        (promoe(num_experts=6, top_k=1, expansion=2.0), 2 * 64, 8 * 64),
        (
            unimoe_audio(num_experts=4, num_null=0, num_shared=2, top_k=2, expansion=1.5),
            2 * 48 + 2 * 16,
            4 * 48 + 2 * 16,
        ),
    ],
)
def test_a_twin_is_as_wide_as_the_experts_it_stands_for(moe: Any, active: int, whole: int) -> None:
    state = torch.get_rng_state()
    with torch.random.fork_rng():
        plain = moe(32)
    twin, wide = dense_twin(moe=moe)(32), dense_twin(moe=moe, match="params")(32)

    assert (twin.experts.hidden_dim, wide.experts.hidden_dim) == (active, whole)
    kind = plain.experts if not hasattr(plain.experts, "banks") else plain.experts.banks[0]
    assert type(twin.experts) is type(kind)
    assert (twin.experts.activation, twin.experts.b_in is None) == (kind.activation, kind.b_in is None)
    assert twin(torch.randn(5, 32)).shape == (5, 32)
    torch.set_rng_state(state)
    drawn = dense_twin(moe=moe)(32).experts.w_in
    torch.set_rng_state(state)
    assert torch.equal(drawn, type(kind)(1, 32, active, activation=kind.activation, bias=kind.b_in is not None).w_in)


def test_a_mixture_without_a_twin_is_refused() -> None:
    with pytest.raises(ValueError, match="match='width': a twin has equal"):
        dense_twin(match="width")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="how many experts a row has"):
        dense_twin(moe=compose(router=top_p_router(), experts=lambda d: MLPExperts(4, d, 6)))(8)
    with pytest.raises(ValueError, match="moe makes a Linear"):
        dense_twin(moe=linear())(8)
    with pytest.raises(ValueError, match="ModuleExperts have no hidden width"):
        dense_twin(moe=compose(router=random_router(num_experts=3), experts=fields))(8)


def test_domain_id_routing_gives_each_domain_its_own_experts() -> None:
    layer = point_moe(num_experts=4, router=table_router(num_experts=4, top_k=2))(D)
    routing = layer.route(torch.randn(3, D), group=torch.tensor([0, 3, 5]))
    assert isinstance(routing, Routing)
    assert routing.expert_M.tolist() == [0, 1, 0, 3, 1, 2]
    assert routing.weight_M.unique().tolist() == [0.5]


def test_meta_dmoe_freezes_its_specialists_and_leaves_out_the_own_domain() -> None:
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)) for _ in range(3)]
    layer = meta_dmoe(specialists=nets, out_dim=4, leave_out=True)(12)
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer.experts.training
    assert isinstance(layer.combiner, Stack)
    x = torch.randn(4, 3, 2, 2)
    y, mask = layer(x, group=torch.tensor([0, 1, 2, 3]))
    assert mask.tolist() == [[False, True, True], [True, False, True], [True, True, False], [True, True, True]]
    torch.testing.assert_close(y[3], torch.stack([net(x)[3] for net in nets]))
    everyone, present = meta_dmoe(specialists=nets, out_dim=4)(12)(x)
    assert present.all()
    torch.testing.assert_close(everyone[3], y[3])


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: unimoe_audio(shared_weighting="half"), "'gated' or 'add'"),
        (lambda: aw_moe(behaviour_dim=3, gate_norm="max"), "'none', 'softmax' or 'sigmoid'"),
        (lambda: point_moe(num_experts=4, top_k=5)(D), "top_k=5, but there are only 4"),
    ],
)
def test_options_that_do_not_fit_are_refused(build: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()


class Host:
    """A network's signature, as the command line sees it."""

    def __init__(self, moe: LayerFactory) -> None:
        self.moe = moe


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("point_moe", {"num_experts": 6, "top_k": 3}),
        ("point_moe", {"router": {"class_path": "moeapps.moe.presets.random_router", "init_args": {"num_experts": 4}}}),
        ("unimoe_audio", {"top_p": 0.5, "shared_weighting": "add"}),
        ("promoe", {"num_experts": 4}),
        ("aw_moe", {"behaviour_dim": 3}),
        ("dense", {"expansion": 2.0, "gated": False}),
        ("linear", {}),
    ],
)
def test_yaml_names_a_preset_by_class_path(preset: str, options: dict[str, Any]) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(Host, "net")
    config = {"net": {"moe": {"class_path": f"moeapps.moe.presets.{preset}", "init_args": options}}}
    host = parser.instantiate(parser.parse_object(config)).net
    layer = host.moe(D)
    assert isinstance(layer, nn.Module)
    if "num_experts" in options and preset == "point_moe":
        assert layer.router.num_experts == 6
    if preset == "dense":
        assert isinstance(layer.router.choose, Dense)


COUNTS = ("num_experts", "top_k", "max_k", "num_slots", "num_groups", "keep_groups")


@pytest.mark.parametrize("name", presets.__all__)
def test_counts_below_one_are_told_by_their_names_when_a_preset_is_made(name: str) -> None:
    preset = getattr(presets, name)
    taken = inspect.signature(preset).parameters
    needed: dict[str, Any] = {"behaviour_dim": 6} if "behaviour_dim" in taken else {}
    for count in [count for count in COUNTS if count in taken]:
        for value in (0, -1):
            with pytest.raises(ValueError, match=f"^{count}={value}, but it must be at least 1"):
                preset(**needed, **{count: value})
