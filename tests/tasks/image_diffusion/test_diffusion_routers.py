# SPDX-License-Identifier: Apache-2.0
"""Laws of the rivals' routers: how many pairs each takes, what a row depends on, what evaluation may not change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from moeapps.moe import MoELayer, RouterFactory, sort_assignments
from moeapps.moe.presets import promoe, random_router
from tasks.image_diffusion.rivals import routers
from tasks.image_diffusion.rivals.layers import dsmoe
from tests.tasks.image_diffusion.model_common import K, awake, layers, net, noisy

E, D, L = 3, 16, 4
FACTORIES: dict[str, RouterFactory] = {
    "token_choice": routers.token_choice(num_experts=E),
    "expert_choice": routers.expert_choice(num_experts=E),
    "expert_choice_batch": routers.expert_choice(num_experts=E, pool="batch"),
    "expert_race": routers.expert_race(num_experts=E),
    "dsmoe": routers.dsmoe(num_experts=E, top_k=2),
    "prototypes": routers.prototypes(num_experts=E, top_k=2),
    "diffmoe": routers.diffmoe(num_experts=E),
    "diffmoe_batch": routers.diffmoe(num_experts=E, evaluation="batch"),
    "class_domain": routers.class_domain(num_experts=E),
    "class_supervised": routers.class_supervised(num_experts=E),
    "k_means": routers.k_means(num_experts=E),
    "random": random_router(num_experts=E, top_k=1),
}
POOLS = {
    "expert_choice": "group",
    "expert_choice_batch": "batch",
    "diffmoe_batch": "batch",
    "class_supervised": "group",
    "random": "batch",
}


def rival(name: str, *, split: bool = True):
    network = net(promoe(num_experts=E, conditional_split=split, router=FACTORIES[name]), dim=D)
    for module in network.modules():
        if isinstance(module, routers.ClassTable):
            module.use_superclasses([0, 0, 0, 1, 1, 1])
    return awake(network)


def pairs(layer: MoELayer, x: Tensor, group: Tensor) -> Tensor:
    return layer.route(x, group=group).assignment() != 0


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", FACTORIES)
def test_every_router_goes_under_the_split_and_trains(name: str, split: bool) -> None:
    network = rival(name, split=split).train()
    assert layers(network)[0].router.pool == POOLS.get(name, "row")
    network(noisy(6), torch.ones(6), torch.arange(6)).square().sum().backward()
    learned = [n for n, p in network.named_parameters() if "router" in n and p.grad is not None and p.grad.any()]
    fixed = name in ("class_domain", "k_means", "random", "class_supervised")
    assert bool(learned) != fixed  # those have weight 1: what trains them is a loss of their own, or nothing


@pytest.mark.parametrize("name", [name for name in FACTORIES if name != "random"])  # which draws by place
def test_permuting_the_batch_permutes_the_output(name: str) -> None:
    network, order = rival(name), torch.tensor([3, 0, 4, 1, 2])
    x, time, label = noisy(5), torch.tensor([10.0, 300.0, 500.0, 700.0, 999.0]), torch.tensor([0, 3, K, 5, 2])
    y = network(x, time, label)
    torch.testing.assert_close(network(x[order], time[order], label[order]), y[order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in FACTORIES if POOLS.get(name) != "batch" and name != "random"])
def test_batch_mates_change_nothing_in_evaluation(name: str) -> None:
    network = rival(name, split=name != "expert_choice")
    x, time, label = noisy(6), torch.linspace(1, 999, 6), torch.tensor([0, 3, K, 5, 2, K])
    y = network(x, time, label)
    torch.testing.assert_close(network(x[1:4], time[1:4], label[1:4]), y[1:4], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["diffmoe", "expert_race", "expert_choice_batch", "diffmoe_batch"])
def test_batch_mates_change_what_a_pool_of_the_batch_chooses(name: str) -> None:
    layer = layers(rival(name, split=False))[0].train(name != "diffmoe_batch")
    if name == "diffmoe_batch":
        layer.router.threshold.fill_(0.5)
    x, group = torch.randn(40, D), torch.arange(40)
    alone = pairs(layer, x[:20], group[:20])
    assert not torch.equal(pairs(layer, torch.cat([x[:20], 3 * x[20:]]), group)[:20], alone)


def test_token_choice_takes_k_pairs_per_token_with_the_softmax_as_gate() -> None:
    router = routers.token_choice(num_experts=E, top_k=2)(D)
    x = torch.randn(12, D)
    routing = router(x)
    taken = routing.assignment() != 0
    assert taken.sum(1).tolist() == [2] * 12
    torch.testing.assert_close(routing.assignment()[taken], router.score(x).softmax(-1)[taken])


def test_expert_choice_takes_its_share_of_every_image() -> None:
    layer = promoe(num_experts=2, by_expert=True)(D)
    group = torch.arange(3).repeat_interleave(9)
    taken = pairs(layer, torch.randn(27, D), group)[:, :2].view(3, 9, 2)
    assert taken.sum(1).tolist() == [[4, 4]] * 3  # floor(9 / 2)
    few = pairs(promoe(num_experts=12, by_expert=True)(D), torch.randn(4, D), torch.zeros(4, dtype=torch.int64))
    assert few[:, :12].sum(0).tolist() == [1] * 12  # never none
    layer = promoe(num_experts=12, by_expert=True)(8)
    taken = pairs(layer, torch.randn(256, 8), torch.zeros(256, dtype=torch.int64))
    assert taken[:, :12].sum(0).tolist() == [21] * 12  # the paper's 256 tokens and 12 experts


def test_expert_race_takes_exactly_the_largest_pairs_of_the_batch() -> None:
    router = routers.expert_race(num_experts=E, capacity=2.0)(D).train()
    nn.init.normal_(router.score.out.weight)
    x = torch.randn(20, D)
    taken = router(x).assignment() != 0
    assert int(taken.sum()) == 40
    logits = router.score(x)
    assert logits[taken].min() > logits[~taken].max()
    assert len(set(taken.sum(1).tolist())) > 1


def test_diffmoe_takes_exactly_k_tokens_per_expert_and_batch() -> None:
    router = routers.diffmoe(num_experts=E)(D).train()
    routing = router(torch.randn(20, D))
    assert routing.counts().tolist() == [6] * E
    torch.testing.assert_close(routing.assignment().amax(1) > 0, (routing.assignment() > 0).any(1))


def test_diffmoe_threshold_follows_the_quantile_and_evaluation_leaves_it() -> None:
    router = routers.diffmoe(num_experts=E)(D).train()
    x = torch.randn(20, D)
    kth = router.predictor(x).sigmoid().sort(0, descending=True).values[5]
    for n in range(1, 6):
        router(x)
        torch.testing.assert_close(router.threshold, (1 - 0.95**n) * kth, atol=1e-6, rtol=1e-5)
    kept = router.threshold.clone()
    router.eval()(x)
    assert torch.equal(router.threshold, kept)
    assert torch.equal(router.state_dict()["threshold"], kept)


def test_diffmoe_in_bfloat16_routes_as_one_of_its_rounded_parameters_and_moves_its_threshold() -> None:
    low = routers.diffmoe(num_experts=E)(D).bfloat16().train()
    rounded, x = copy.deepcopy(low).float(), torch.randn(20, D).bfloat16()
    for _ in range(30):
        found, wanted = low(x), rounded(x.float())

    torch.testing.assert_close(found.capacity_NE, wanted.capacity_NE)
    assert torch.equal(found.expert_M, wanted.expert_M)
    assert low.threshold.dtype == torch.float32
    torch.testing.assert_close(low.threshold, rounded.threshold)


def test_diffmoe_evaluates_by_threshold_token_by_token_or_by_counts_of_the_batch() -> None:
    x = torch.randn(30, D)
    token = routers.DiffMoERouter(D, E).eval()
    nn.init.normal_(token.score.weight)
    token.threshold.copy_(torch.tensor([0.45, 0.5, 0.55]))
    over = token.predictor(x).sigmoid() > token.threshold
    assert torch.equal(token(x).assignment() != 0, over)
    batch = routers.DiffMoERouter(D, E, evaluation="batch").eval()
    batch.load_state_dict(token.state_dict())
    taken = batch(x).assignment() != 0
    assert taken.sum(0).tolist() == over.sum(0).tolist()
    probs = batch.score(x).softmax(-1)
    for e in range(E):
        assert taken[:, e].all() or not taken[:, e].any() or probs[taken[:, e], e].min() >= probs[~taken[:, e], e].max()
    with pytest.raises(ValueError, match="use token or batch"):
        routers.DiffMoERouter(D, E, evaluation="image")


def test_routers_of_the_batch_survive_small_and_empty_batches() -> None:
    for name in ("diffmoe", "expert_race", "expert_choice_batch", "expert_choice", "k_means", "class_supervised"):
        router = FACTORIES[name](D).train()
        for rows in (0, 1, 2):
            routing = router(torch.randn(rows, D), group=torch.arange(rows))
            assert routing.num_rows == rows


def test_dsmoe_gates_of_a_token_sum_to_the_scale() -> None:
    layer = dsmoe(num_experts=5, top_k=3, scale=2.5)(12)
    routing = layer.route(torch.randn(7, 12))
    torch.testing.assert_close(routing.assignment().sum(1), torch.full((7,), 2.5))
    assert layer.num_shared == 2
    with pytest.raises(ValueError, match="not a multiple"):
        dsmoe(width=0.5, shared_width=0.75)


def test_class_domain_routes_by_the_super_class_alone() -> None:
    layer = layers(rival("class_domain"))[0]
    label = torch.tensor([0, 4, 5, 2])
    routing = layer.route(torch.randn(4, D), group=torch.arange(4) * K + label)
    assert routing.expert_M.tolist() == [0, 1, 1, 0]
    assert routing.weight_M.tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="no table of super-classes"):
        routers.class_domain(num_experts=2)(D)(torch.randn(2, D), group=torch.arange(2))


def test_class_supervised_routing_sends_whole_images_one_way() -> None:
    router = routers.class_supervised(num_experts=E)(D)
    nn.init.normal_(router.score.linear.weight)
    x, group = torch.randn(5 * L, D), torch.tensor([9, 3, -1, 7, 0]).repeat_interleave(L)
    expert = router(x, group=group).expert_M.view(5, L)
    assert torch.equal(expert, expert[:, :1].expand_as(expert))
    mean = x.view(5, L, D).mean(1)
    assert torch.equal(expert[:, 0], router.score.linear(mean).argmax(-1))


def test_k_means_centroids_become_the_means_of_their_tokens() -> None:
    score = routers.KMeansScore(2, 2)
    x = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 4.0]])
    score.train().centroids.copy_(torch.tensor([[1.0, 9.0], [8.0, 9.0]]))
    score.started.fill_(True)
    for _ in range(3):
        logits = score(x)
    found = sorted(score.centroids.tolist())
    assert found == [[0.0, 1.0], [10.0, 2.0]]
    assert torch.equal(logits.argmax(-1)[:2], logits.argmax(-1)[:1].expand(2))
    kept = score.centroids.clone()
    score.eval()(x + 100)
    assert torch.equal(score.centroids, kept)
    assert not any(True for _ in score.parameters())
    fresh = routers.KMeansScore(2, 2).train()
    fresh(x[:2])
    assert sorted(fresh.centroids.tolist()) == [[0.0, 0.0], [0.0, 2.0]]  # it started at tokens, each then its own mean


def test_k_means_of_conditional_tokens_ignores_the_others_and_keeps_idle_centroids() -> None:
    score = routers.KMeansScore(2, 2, conditional_only=True).train()
    score.started.fill_(True)
    score.centroids.copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
    score(torch.tensor([[1.0, 1.0], [3.0, 3.0], [99.0, 99.0]]), group=torch.tensor([0, 1, -1]))
    assert score.centroids.tolist() == [[2.0, 2.0], [50.0, 50.0]]


def test_recomputed_activations_move_no_threshold_and_no_centroid() -> None:
    for name in ("diffmoe", "k_means"):
        layer = layers(rival(name))[0].train()
        twin = copy.deepcopy(layer)
        x, group = torch.randn(8, D, requires_grad=True), torch.arange(8)
        torch.manual_seed(1)
        layer(x, group=group).sum().backward()
        torch.manual_seed(1)
        torch.utils.checkpoint.checkpoint(
            lambda y, twin=twin, group=group: twin(y, group=group), x, use_reentrant=False
        ).sum().backward()
        for (key, one), other in zip(layer.state_dict().items(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, msg=f"{name}: {key}")


def test_the_router_must_have_the_experts_of_the_layer() -> None:
    with pytest.raises(ValueError, match="the router has 3 experts, but num_experts=4"):
        promoe(num_experts=4, router=routers.token_choice(num_experts=3))(D)


def test_a_plan_of_a_capacity_routing_is_that_of_the_plain_one() -> None:
    routing = routers.diffmoe(num_experts=E)(D).train()(torch.randn(12, D))
    assert sort_assignments(routing).counts == routing.counts().tolist()
