# SPDX-License-Identifier: Apache-2.0
"""Surgery keeps what a network computes: copies, granules and fused specialists against the dense network itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeapps.moe import Dense, GLUExperts, JoinedExperts, LinearScore, MLPExperts, MoELayer, Router
from moeapps.moe.presets import dense, unimoe_audio
from moeapps.moe.surgery import fuse, split, upcycle

D, WIDE = 6, 12
BANKS: list[Callable[[int], GLUExperts | MLPExperts]] = [
    lambda num: GLUExperts(num, D, WIDE, out_dim=5),
    lambda num: GLUExperts(num, D, WIDE, activation="relu", bias=True),
    lambda num: MLPExperts(num, D, WIDE, out_dim=5),
    lambda num: MLPExperts(num, D, WIDE, bias=False),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def by_hand(bank: GLUExperts | MLPExperts, expert: int, x_ND: Tensor) -> Tensor:
    """One expert, written out with plain products."""
    act = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}[str(bank.activation)]
    h = x_ND @ bank.w_in[expert] + (0 if bank.b_in is None else bank.b_in[expert])
    wide = bank.hidden_dim
    h = act(h[:, :wide]) * h[:, wide:] if isinstance(bank, GLUExperts) else act(h)
    return h @ bank.w_out[expert] + (0 if bank.b_out is None else bank.b_out[expert])


@pytest.mark.parametrize("make", BANKS)
@pytest.mark.parametrize("slices", [1, 2, 3, 12])
def test_granules_add_up_to_the_expert_they_were_cut_from(
    make: Callable[[int], GLUExperts | MLPExperts], slices: int
) -> None:
    bank, x_ND = make(3), torch.randn(7, D)
    cut = split(bank, slices)

    assert (cut.num_experts, cut.hidden_dim) == (3 * slices, WIDE // slices)
    for e in range(3):
        granules = [by_hand(cut, e * slices + i, x_ND) for i in range(slices)]
        torch.testing.assert_close(sum(granules), by_hand(bank, e, x_ND), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cut.every(x_ND)[:, e * slices], granules[0])


def test_each_hidden_unit_goes_to_one_granule() -> None:
    bank = GLUExperts(2, D, WIDE)
    cut = split(bank, 4)

    for granule in range(8):
        expert, start = granule // 4, 3 * (granule % 4)
        units = slice(start, start + 3)
        assert torch.equal(cut.w_in[granule, :, :3], bank.w_in[expert, :, units])
        assert torch.equal(cut.w_in[granule, :, 3:], bank.w_in[expert, :, WIDE:][:, units])
        assert torch.equal(cut.w_out[granule], bank.w_out[expert, units])


def test_splitting_draws_no_random_numbers_and_shares_no_weights() -> None:
    bank = MLPExperts(1, D, WIDE)
    before, state = bank.w_in.clone(), torch.random.get_rng_state()
    cut = split(bank, 2)
    with torch.no_grad():
        cut.w_in.zero_()

    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(bank.w_in, before)


@pytest.mark.parametrize("make", BANKS)
def test_upcycled_copies_under_weights_that_sum_to_one_are_the_dense_expert(
    make: Callable[[int], GLUExperts | MLPExperts],
) -> None:
    ffn, x_ND = make(1), torch.randn(7, D)
    weight_NE = torch.rand(7, 5)
    weight_NE = weight_NE / weight_NE.sum(1, keepdim=True)
    out_NEO = upcycle(ffn, 5).every(x_ND)

    torch.testing.assert_close((weight_NE.unsqueeze(-1) * out_NEO).sum(1), by_hand(ffn, 0, x_ND), rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """A residual block between two linear layers: the smallest network with something outside its MoE layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.ffn, self.norm, self.last = nn.Linear(4, D), layer, nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.ffn(self.norm(h)))


def specialist(expansion: float = 2.0) -> Block:
    return Block(dense(expansion=expansion, activation="silu")(D))


def equal_gates(num: int, bank: GLUExperts | MLPExperts) -> MoELayer:
    score = LinearScore(D, num)
    nn.init.zeros_(score.weight)
    return MoELayer(Router(score, Dense("softmax")), bank)


def test_equal_specialists_under_equal_gates_give_back_the_specialist() -> None:
    one, x = specialist(), torch.randn(9, 4)
    mixture = Block(equal_gates(8, GLUExperts(8, D, D, activation="silu")))
    mixture.load_state_dict(fuse([one.state_dict()] * 4, mixture))
    torch.testing.assert_close(mixture(x), one(x), rtol=1e-5, atol=1e-6)

    mixture.load_state_dict(fuse([one.state_dict()] * 4, mixture, rescale=False))
    h = one.first(x)
    half = one.last(h + one.ffn(one.norm(h)) / 2)
    torch.testing.assert_close(mixture(x), half, rtol=1e-5, atol=1e-6)


def test_top_p_of_one_without_null_and_shared_experts_gives_it_back_too() -> None:
    one, x = specialist(), torch.randn(9, 4)
    mixture = Block(unimoe_audio(num_experts=8, num_null=0, num_shared=0, top_p=1.0, jitter=0.0)(D))
    nn.init.zeros_(mixture.ffn.router.score.weight)
    mixture.load_state_dict(fuse([one.state_dict()] * 4, mixture))

    torch.testing.assert_close(mixture(x), one(x), rtol=1e-5, atol=1e-6)


def test_specialists_are_cut_in_order_and_the_rest_is_their_mean() -> None:
    ones = [specialist() for _ in range(2)]
    mixture = Block(unimoe_audio(num_experts=4, num_shared=2)(D))
    before = {key: value.clone() for key, value in mixture.state_dict().items()}
    state = fuse([one.state_dict() for one in ones], mixture)

    assert list(state) == list(before)
    bank = state["ffn.experts.banks.0.w_out"]
    for number, one in enumerate(ones):
        for half in range(2):
            expected = 2 * one.ffn.experts.w_out[0, half * D : (half + 1) * D]
            assert torch.equal(bank[2 * number + half], expected)
    for key in ("first.weight", "norm.bias", "last.bias"):
        mean = (ones[0].state_dict()[key] + ones[1].state_dict()[key]) / 2
        torch.testing.assert_close(state[key], mean, rtol=0, atol=1e-7)
    for key in ("ffn.router.score.weight", "ffn.experts.banks.1.w_in", "ffn.experts.banks.1.w_out"):
        assert torch.equal(state[key], before[key])
    assert all(torch.equal(value, before[key]) for key, value in mixture.state_dict().items())


@pytest.mark.parametrize("joined", [True, False], ids=["a bank of their own", "last in the one bank"])
def test_shared_experts_can_start_from_the_first_units_of_the_specialists_in_turn(joined: bool) -> None:
    ones = [specialist() for _ in range(2)]
    banks = [GLUExperts(4, D, D, activation="silu"), GLUExperts(3, D, 4 if joined else D, activation="silu")]
    bank = JoinedExperts(banks) if joined else GLUExperts(7, D, D, activation="silu")
    mixture = Block(MoELayer(Router(LinearScore(D, 4), Dense("softmax")), bank, num_shared=3))
    state = fuse([one.state_dict() for one in ones], mixture, shared="first_slice")

    width = 4 if joined else D
    stack_in = state["ffn.experts.banks.1.w_in"] if joined else state["ffn.experts.w_in"][4:]
    stack_out = state["ffn.experts.banks.1.w_out"] if joined else state["ffn.experts.w_out"][4:]
    for i, number in enumerate((0, 1, 0)):
        source = ones[number].ffn.experts
        gate, up = source.w_in[0].chunk(2, dim=-1)
        assert torch.equal(stack_in[i], torch.cat([gate[:, :width], up[:, :width]], 1))
        assert torch.equal(stack_out[i], source.w_out[0, :width])


def test_what_does_not_fit_is_told_in_a_sentence() -> None:
    one, mixture = specialist().state_dict(), Block(unimoe_audio(num_experts=4)(D))

    with pytest.raises(ValueError, match="no specialist"):
        fuse([], mixture)
    with pytest.raises(ValueError, match="4 routed experts cannot be shared out among 3 specialists"):
        fuse([one] * 3, mixture)
    with pytest.raises(ValueError, match=r"4 slices of the mixture's width 6 .* hidden width of 24"):
        fuse([one], mixture)
    with pytest.raises(ValueError, match="Linear has no MoE layer"):
        fuse([one], nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"lacks nothing and has extra beside"):
        fuse([{**one, "extra": torch.zeros(1)}] * 2, mixture)
    with pytest.raises(ValueError, match=r"first.weight is \(2, 4\) in specialist 0 and \(6, 4\)"):
        fuse([{**one, "first.weight": torch.zeros(2, 4)}] * 2, mixture)
    with pytest.raises(ValueError, match=r"no ffn.experts.w_in, ffn.experts.w_out"):
        fuse([Block(nn.Linear(D, D)).state_dict()] * 2, mixture)
    with pytest.raises(ValueError, match="slices=5 does not divide the hidden width 12"):
        split(GLUExperts(1, D, WIDE), 5)
    with pytest.raises(ValueError, match="has no hidden width to cut"):
        split(JoinedExperts([GLUExperts(1, D, WIDE)]), 2)
    with pytest.raises(ValueError, match="2 experts, but one dense expert is copied"):
        upcycle(GLUExperts(2, D, WIDE), 4)
    with pytest.raises(ValueError, match="shared='first'"):
        fuse([one] * 2, mixture, shared="first")  # type: ignore[arg-type]
