# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch

from moeapps.moe import MoERecorder, presets
from tasks.point_cloud.losses import mean_over_domains, segmentation_loss
from tasks.point_cloud.model import PointMoE, Pooling, Unpooling, point_moe_paper, pool_max
from tasks.point_cloud.nets.attention import PatchAttention
from tasks.point_cloud.nets.geometry import finest_level
from tasks.point_cloud.nets.head import LanguageHead
from tasks.point_cloud.nets.norm import BatchNorm
from tasks.point_cloud.nets.serialization import ORDERS, hilbert_encode
from tasks.point_cloud.nets.text import TaxonomyText
from tasks.point_cloud.rivals.baselines import ConvUNet
from tests.tasks.point_cloud.rivals_common import FACTS


def tiny(moe, **options) -> PointMoE:
    sizes = {"enc_depths": (1, 1), "enc_dims": (16, 32), "dec_depths": (1,), "dec_dims": (16,), "patch_size": 8}
    return PointMoE(FACTS, moe=moe, **{**sizes, **options}).double()


def double(batch: Batch) -> Batch:
    batch.x = batch.x.double()
    return batch


def linear(dim: int) -> nn.Module:
    return nn.Linear(dim, dim)


@pytest.mark.parametrize(
    ("moe", "parameters"),
    [("linear", 46_166_272), ("small", 58_726_464), ("large", 99_809_088)],
)
def test_paper_sizes_have_the_published_parameter_counts(moe, parameters, naive_moe) -> None:
    factories = {
        "linear": presets.linear(),
        "small": presets.point_moe(num_experts=4, top_k=2, expansion=1.0),
        "large": presets.point_moe(num_experts=8, top_k=2, expansion=2.0),
    }

    with torch.device("meta"):
        net = point_moe_paper(FACTS, factories[moe])

    assert sum(p.numel() for p in net.parameters()) == parameters


def test_preset_equals_the_equation_of_the_card_inside_the_network(make_batch, naive_moe) -> None:
    batch = double(make_batch([40, 25]))
    by_card, by_core = tiny(naive_moe).eval(), tiny(presets.point_moe()).eval()
    state = by_card.state_dict()
    for name in [name for name in state if name.endswith("proj.gate")]:
        stem = name.removesuffix("gate")
        state[stem + "experts.w_in"] = torch.cat([state.pop(name), state.pop(stem + "up")], dim=2)
        state[stem + "experts.w_out"] = state.pop(stem + "down")
        state[stem + "router.score.weight"] = state.pop(stem + "router.weight")
    by_core.load_state_dict(state)

    torch.testing.assert_close(by_core(batch), by_card(batch))


@pytest.mark.parametrize("placement", ["projection", "mlp"])
def test_mixtures_learn_where_they_are_placed_and_know_their_domain(placement, make_scan) -> None:
    batch = double(Batch.from_data_list([make_scan(30, seed=i, domain=3 - i) for i in range(3)]))
    net = tiny(presets.point_moe(), placement=placement, drop_path=0.0)

    with MoERecorder(net) as recorder:
        net(batch).square().sum().backward()

    place = {"projection": "attn.proj", "mlp": "mlp"}[placement]
    assert [record.name for record in recorder.records] == [
        f"{stage}.blocks.0.{place}" for stage in ("encoder.0", "encoder.1", "decoder.0")
    ]
    for record in recorder.records:
        assert record.group is not None
        assert record.group.unique().tolist() == [1, 2, 3]
        assert len(record.group) == record.routing.num_rows
        assert record.layer.router.score.weight.grad.abs().sum() > 0


def test_table_router_sends_each_domain_to_its_experts(make_scan) -> None:
    batch = double(Batch.from_data_list([make_scan(30, seed=i, domain=i) for i in range(3)]))
    net = tiny(presets.point_moe(router=presets.table_router(num_experts=4))).eval()

    with MoERecorder(net) as recorder:
        net(batch)

    for record in recorder.records:
        assert torch.equal(record.routing.expert_M, record.group)


def test_bf16_autocast_stays_close_and_reaches_every_parameter(make_batch) -> None:
    batch, net = make_batch([60, 30]), tiny(presets.linear(), drop_path=0.0).float()
    exact = net.eval()(batch)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(batch)
    y.float().square().sum().backward()

    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.15)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_attention_in_one_run_equals_softmax_attention_over_the_scan(make_batch) -> None:
    batch = double(make_batch([20]))
    level, _ = finest_level(batch.grid, batch.batch, 1, ORDERS)
    attention = PatchAttention(32, head_dim=16, patch_size=64, projection=linear).double()
    x = torch.randn(20, 32, dtype=torch.float64)

    y = attention(x, level, "hilbert")

    q, k, v = attention.qkv(x).view(20, 3, 2, 16).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(1, 2) / 4).softmax(-1)
    torch.testing.assert_close(y, attention.proj((weights @ v).transpose(0, 1).reshape(20, 32)))


@pytest.mark.parametrize("num", [1, 7, 8, 9, 40])
def test_attention_equals_a_loop_over_runs(num, make_batch) -> None:
    batch = double(make_batch([num, 3]))
    level, _ = finest_level(batch.grid, batch.batch, 2, ORDERS)
    attention = PatchAttention(16, head_dim=16, patch_size=8, projection=lambda dim: nn.Identity()).double()
    x = torch.randn(num + 3, 16, dtype=torch.float64)

    y = attention(x, level, "z-trans")

    q, k, v = attention.qkv(x).split(16, dim=1)
    order = level.orders["z-trans"]
    for rows in (order[:num], order[num:]):
        for start in range(0, len(rows), 8):
            own = rows[start : start + 8]
            seen = rows[max(0, min(start, len(rows) - 8)) : start + 8]
            torch.testing.assert_close(y[own], (q[own] @ k[seen].T / 4).softmax(-1) @ v[seen])


def test_pooling_of_constants_is_constant_and_unpooling_reads_the_parent(make_batch) -> None:
    batch = make_batch([80, 5])
    level, _ = finest_level(batch.grid, batch.batch, 2, ORDERS)
    coarse = level.coarser()
    ids = torch.arange(len(coarse.batch_N), dtype=torch.float64)[:, None]

    assert torch.equal(pool_max(torch.full((85, 4), 2.5), level), torch.full((len(ids), 4), 2.5))
    assert torch.equal(pool_max(ids[level.parent_N], level), ids)
    unpool = Unpooling(1, 1, 1, 0.1).double().eval()
    no_skip = torch.zeros(85, 1, dtype=torch.float64)
    out = unpool(ids, no_skip, level)
    torch.testing.assert_close(out, unpool(ids, no_skip, level)[level.parent_N.argsort(stable=True)])
    pooled = Pooling(4, 6, 0.1)(torch.ones(85, 4), level)
    torch.testing.assert_close(pooled, pooled[:1].expand_as(pooled))


@pytest.mark.parametrize("sizes", [[1], [7], [8], [9], [60], [1, 8, 200, 9]])
def test_any_scan_size_gives_finite_features_in_the_batch_order(sizes, make_batch, naive_moe) -> None:
    batch = double(make_batch(sizes))

    y = tiny(naive_moe).eval()(batch)

    assert y.shape == (sum(sizes), 16)
    assert y.isfinite().all()


@pytest.mark.parametrize("average", [False, True])
def test_a_scan_is_answered_the_same_whatever_its_batch_mates(average, make_scan, naive_moe) -> None:
    net = tiny(naive_moe, average_orders=average).eval()
    small, mate, far = make_scan(30, seed=1), make_scan(150, seed=2), make_scan(90, side=40, seed=3)

    alone = net(double(Batch.from_data_list([small])))
    together = net(double(Batch.from_data_list([mate, small, far])))

    torch.testing.assert_close(together[150:180], alone)


def test_permuting_points_permutes_features(make_scan, naive_moe) -> None:
    net, scan, permutation = tiny(naive_moe).eval(), make_scan(70), torch.randperm(70)
    shuffled = scan.clone()
    shuffled.grid, shuffled.x = scan.grid[permutation], scan.x[permutation]

    y, z = (net(double(Batch.from_data_list([s]))) for s in (scan, shuffled))

    torch.testing.assert_close(z, y[permutation])


def test_train_path_equals_eval_path_when_nothing_random_is_on(make_batch, naive_moe) -> None:
    batch = double(make_batch([40, 25]))
    net = tiny(naive_moe, drop_path=0.0, orders=("hilbert",), norm_momentum=1.0)

    trained = net(batch)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.eval()
    frozen = net(batch)

    torch.testing.assert_close(net.eval()(batch), frozen)
    # Running variances are unbiased and batch variances are not: equal up to n / (n - 1).
    torch.testing.assert_close(frozen, trained, rtol=0.2, atol=0.2)


def test_orders_are_shuffled_in_training_and_fixed_in_evaluation(make_batch) -> None:
    batch = double(make_batch([60]))
    net = tiny(linear, drop_path=0.0)

    in_training = {round(net(batch).sum().item(), 9) for _ in range(6)}
    net.eval()

    assert len(in_training) > 1
    assert torch.equal(net(batch), net(batch))


def test_average_over_orders_is_the_mean_of_rotated_orders(make_batch) -> None:
    batch = double(make_batch([60]))
    net = tiny(linear, average_orders=True).eval()
    singles = []
    for turn in range(4):
        single = tiny(linear, orders=ORDERS[turn:] + ORDERS[:turn]).eval()
        single.load_state_dict(net.state_dict())
        singles.append(single(batch))

    torch.testing.assert_close(net(batch), torch.stack(singles).mean(0))


def test_with_all_experts_chosen_the_network_equals_a_dense_mixture(make_batch, naive_moe) -> None:
    batch = double(make_batch([40]))
    top = tiny(partial(naive_moe, num_experts=2, top_k=2)).eval()

    class Mixture(naive_moe):
        def forward(self, x):
            weight = self.router(x).softmax(-1)
            return sum(
                weight[:, e, None] * ((x @ self.gate[e]).relu() * (x @ self.up[e]) @ self.down[e]) for e in range(2)
            )

    soft = tiny(partial(Mixture, num_experts=2)).eval()
    soft.load_state_dict(top.state_dict())

    torch.testing.assert_close(top(batch), soft(batch))


def test_every_parameter_gets_a_gradient_and_no_two_blocks_share_one(make_batch, naive_moe) -> None:
    batch = double(make_batch([60, 60]))
    net = tiny(naive_moe, drop_path=0.0)

    net(batch).square().sum().backward()

    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias before a batch norm has no effect, up to rounding; attention does not see the bias of its keys.
    assert not without
    assert len({p.data_ptr() for p in net.parameters()}) == len(list(net.parameters()))


def test_wrong_sizes_are_errors_that_say_what_to_give() -> None:
    with pytest.raises(ValueError, match="n, n, n - 1, n - 1"):
        PointMoE(FACTS, moe=linear, enc_depths=(1, 1))
    with pytest.raises(ValueError, match="head_dim"):
        PointMoE(FACTS, moe=linear, head_dim=20)
    with pytest.raises(ValueError, match="at least one of"):
        PointMoE(FACTS, moe=linear, orders=())
    with pytest.raises(ValueError, match="patch_size"):
        PointMoE(FACTS, moe=linear, patch_size=0)


def test_the_default_size_is_small(naive_moe) -> None:
    assert 1.2e6 < sum(p.numel() for p in PointMoE(FACTS, moe=naive_moe).parameters()) < 2e6


def test_loss_halves_in_sixty_tiny_steps(make_scan, naive_moe) -> None:
    sets = {"room": ["wall", "floor", "chair"], "street": ["road", "car", "wall"]}
    batch = Batch.from_data_list([make_scan(80, seed=i, domain=i % 2) for i in range(4)])
    net = tiny(naive_moe).float()
    head = LanguageHead(net.out_dim, sets, TaxonomyText(), scale=30.0)
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=3e-3)

    losses = []
    for _ in range(60):
        features, domain = net(batch), batch.domain[batch.batch]
        per_domain = {
            name: segmentation_loss(head(features[domain == i], name), batch.y[domain == i])["loss"]
            for i, name in enumerate(sets)
        }
        loss = mean_over_domains(per_domain)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("build", [tiny, partial(ConvUNet, FACTS)], ids=["PointMoE", "ConvUNet"])
@pytest.mark.parametrize("sizes", [[1], [1, 1], [1, 30]])
def test_crops_of_one_voxel_train(build, sizes: list[int], make_batch) -> None:
    batch = double(make_batch(sizes))
    net = (build(linear) if build is tiny else build()).double().train()

    net(batch).square().sum().backward()

    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm1d)):
        assert torch.isfinite(norm.running_var).all()


def test_one_row_is_normalised_by_the_running_statistics_and_several_as_ever() -> None:
    norm, plain = BatchNorm(3), nn.BatchNorm1d(3)
    x = torch.randn(20, 3) * 3 + 1
    torch.testing.assert_close(norm(x), plain(x), rtol=0, atol=0)

    one = norm(x[:1])

    expected = (x[:1] - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(one, expected)
    torch.testing.assert_close(norm.running_mean, plain.running_mean, rtol=0, atol=0)


def test_curves_have_the_depth_of_the_batch_on_request(make_batch) -> None:
    """The public code: the bit length of the largest coordinate of the batch; here never below one per halving."""
    for side, depth in ((2, 1), (12, 4), (40, 6)):
        batch = double(make_batch([8, 6], side=side))
        assert int(batch.grid.max()).bit_length() == depth
        net = tiny(linear, curve_depth="batch")

        (level, _), row = net._levels(batch)

        assert level.depth == depth
        expected = torch.argsort(batch.batch * 8**depth + hilbert_encode(batch.grid, depth))
        torch.testing.assert_close(level.orders["hilbert"], row[expected])
        assert tiny(linear)._levels(batch)[0][0].depth == 16


def test_scans_stay_apart_however_shallow_the_curve(make_batch) -> None:
    batch = double(make_batch([1, 1, 1]))
    net = tiny(
        linear, curve_depth="batch", enc_depths=(1, 1, 1), enc_dims=(16, 16, 16), dec_depths=(1, 1), dec_dims=(16, 16)
    )

    levels, _ = net._levels(batch)

    assert [len(level.batch_N) for level in levels] == [3, 3, 3]
    assert torch.isfinite(net.eval()(batch)).all()


def test_an_unknown_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="curve_depth='official': choose constant or batch"):
        tiny(linear, curve_depth="official")
