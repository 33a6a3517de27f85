# SPDX-License-Identifier: Apache-2.0
"""Banks of experts: each expert is the network its name says, alone and in the stack."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeapps.moe.experts import Experts, GLUExperts, MLPExperts
from moeapps.moe.module_experts import ModuleExperts
from moeapps.moe.normalised import NormalisedExperts

E, D, H = 4, 6, 10
OUT = 3


def modules() -> ModuleExperts:
    wide = nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, OUT))
    return ModuleExperts([nn.Linear(D, OUT), wide, nn.Linear(D, OUT, bias=False), copy.deepcopy(wide)])


unknown: Any = "swoosh"

BANKS: dict[str, Callable[[], Experts]] = {
    "mlp": lambda: MLPExperts(E, D, H, out_dim=OUT),
    "mlp_no_bias": lambda: MLPExperts(E, D, H, out_dim=OUT, bias=False, activation="relu"),
    "glu": lambda: GLUExperts(E, D, H, out_dim=OUT, bias=True),
    "modules": modules,
}


def alone(experts: Any, e: int, x: Tensor) -> Tensor:
    """Expert e by ordinary layers with its own rows of the stacks."""
    if isinstance(experts, ModuleExperts):
        y: Tensor = experts.experts[e](x)
        return y
    b_in, b_out = (None if b is None else b[e] for b in (experts.b_in, experts.b_out))
    h = F.linear(x, experts.w_in[e].T, b_in)
    functions: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
    function = functions[experts.activation]
    a = function(h[:, :H]) * h[:, H:] if isinstance(experts, GLUExperts) else function(h)
    return F.linear(a, experts.w_out[e].T, b_out)


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 0, 5], [0, 0, 0, 0]])
def test_grouped_gives_each_expert_its_own_rows(bank: str, counts: list[int]) -> None:
    experts = BANKS[bank]().double()
    x_MD = torch.randn(sum(counts), D, dtype=torch.float64)
    pieces = [alone(experts, e, rows) for e, rows in enumerate(x_MD.split(counts)) if rows.shape[0]]
    expected = torch.cat([x_MD.new_zeros(0, OUT), *pieces])

    torch.testing.assert_close(experts.grouped(x_MD, counts), expected)
    torch.testing.assert_close(experts.grouped(x_MD, torch.tensor(counts)), expected)


@pytest.mark.parametrize("bank", BANKS)
def test_every_gives_all_rows_or_its_own_view_to_each_expert(bank: str) -> None:
    experts = BANKS[bank]().double()
    x_ND, x_END = torch.randn(5, D, dtype=torch.float64), torch.randn(E, 5, D, dtype=torch.float64)

    shared, own = experts.every(x_ND), experts.every(x_END)

    torch.testing.assert_close(shared, torch.stack([alone(experts, e, x_ND) for e in range(E)], dim=1))
    torch.testing.assert_close(own, torch.stack([alone(experts, e, x_END[e]) for e in range(E)], dim=1))


@pytest.mark.parametrize("bank", BANKS)
def test_idle_experts_get_gradients_that_are_exactly_zero(bank: str) -> None:
    experts = BANKS[bank]()

    for counts in ([0, 4, 0, 0], [0, 0, 0, 0]):
        experts.zero_grad()
        experts.grouped(torch.randn(sum(counts), D), counts).sum().backward()
        for name, parameter in experts.named_parameters():
            assert parameter.grad is not None
            if isinstance(experts, ModuleExperts):
                assert bool(parameter.grad.any()) == (name.startswith("experts.1") and sum(counts) > 0)
            else:
                assert not parameter.grad[[0, 2, 3]].any()


@pytest.mark.parametrize("bank", BANKS)
def test_select_keeps_the_named_experts_in_order_and_leaves_the_bank_alone(bank: str) -> None:
    experts = BANKS[bank]()
    next(experts.parameters()).requires_grad_(False)
    x_ND = torch.randn(5, D)
    before = experts.every(x_ND)

    chosen = experts.select([3, 1, 1])
    for parameter in chosen.parameters():
        parameter.data.add_(0.0)

    assert chosen.num_experts == 3
    torch.testing.assert_close(chosen.every(x_ND), before[:, [3, 1, 1]])
    with torch.no_grad():
        for parameter in chosen.parameters():
            parameter.zero_()
    torch.testing.assert_close(experts.every(x_ND), before)


def test_select_keeps_what_is_frozen_frozen_and_copies_buffers() -> None:
    experts = MLPExperts(E, D, H)
    experts.w_in.requires_grad_(False)
    normalised = NormalisedExperts(E, D, OUT)
    normalised.running_mean.copy_(torch.arange(E)[:, None].expand(E, OUT))

    assert [p.requires_grad for p in experts.select([2]).parameters()] == [False, True, True, True]
    assert normalised.select([3, 0]).get_buffer("running_mean")[:, 0].tolist() == [3, 0]


@pytest.mark.parametrize("ids", [[], [4], [-1]])
def test_select_refuses_ids_that_do_not_exist(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="each from 0 to 3"):
        MLPExperts(E, D, H).select(ids)


def test_initial_weights_are_those_of_a_linear_layer_of_the_same_fan_in() -> None:
    torch.manual_seed(3)
    experts = MLPExperts(64, 32, 128)

    for stack, fan_in in ((experts.w_in, 32), (experts.b_in, 32), (experts.w_out, 128), (experts.b_out, 128)):
        bound = fan_in**-0.5
        assert stack is not None
        assert stack.abs().max() <= bound
        assert stack.abs().max() > 0.98 * bound
        torch.testing.assert_close(stack.std().item(), bound / 3**0.5, rtol=0.05, atol=0)
        assert not torch.equal(stack[0], stack[1])


def test_reset_draws_anew() -> None:
    for bank in BANKS.values():
        experts = bank()
        before = [p.detach().clone() for p in experts.parameters()]
        experts.reset_parameters()
        assert all(not torch.equal(a, b) for a, b in zip(before, experts.parameters(), strict=True))


def test_flops_count_two_per_multiply_add() -> None:
    assert MLPExperts(E, D, H, out_dim=OUT).flops_per_row == 2 * (D * H + H * OUT)
    assert GLUExperts(E, D, H, out_dim=OUT).flops_per_row == 2 * (2 * D * H + H * OUT)
    assert NormalisedExperts(E, D, OUT).flops_per_row == 2 * D * OUT
    assert NormalisedExperts(E, D, OUT, hidden_dim=H).flops_per_row == 2 * (D * H + H * OUT)
    assert modules().flops_per_row == 2 * (2 * D * OUT + 2 * (D * 12 + 12 * OUT)) // 4
    assert ModuleExperts([nn.Linear(D, OUT)], flops_per_row=7).flops_per_row == 7


@pytest.mark.parametrize("hidden_dim", [None, H])
def test_normalised_experts_equal_linear_layers_with_batch_norm_and_swish(hidden_dim: int | None) -> None:
    experts = NormalisedExperts(E, D, OUT, hidden_dim=hidden_dim).double()
    nn.init.normal_(experts.gamma)
    nn.init.normal_(experts.beta)
    norms = [nn.BatchNorm1d(OUT).double() for _ in range(E)]
    for e, norm in enumerate(norms):
        norm.load_state_dict({**norm.state_dict(), "weight": experts.gamma[e], "bias": experts.beta[e]})

    def naive(x_ND: Tensor) -> Tensor:
        outputs = []
        for e, norm in enumerate(norms):
            z = x_ND
            if experts.w_hidden is not None and experts.b_hidden is not None:
                z = F.silu(z @ experts.w_hidden[e] + experts.b_hidden[e])
            outputs.append(F.silu(norm(z @ experts.weight[e])))
        return torch.stack(outputs, dim=1)

    for _ in range(2):  # the second step starts from other running statistics
        x_ND = torch.randn(7, D, dtype=torch.float64)
        torch.testing.assert_close(experts.every(x_ND), naive(x_ND))
    experts.eval()
    for norm in norms:
        norm.eval()
    torch.testing.assert_close(experts.every(x_ND), naive(x_ND))
    torch.testing.assert_close(experts.running_var, torch.stack([norm.get_buffer("running_var") for norm in norms]))


def test_normalised_experts_have_outputs_of_one_scale_whatever_their_weights() -> None:
    experts = NormalisedExperts(E, D, OUT, activation="identity")
    with torch.no_grad():
        experts.weight.mul_(torch.tensor([1.0, 10.0, 100.0, 0.1]).view(E, 1, 1))

    y_NEO = experts.every(torch.randn(256, D))

    torch.testing.assert_close(y_NEO.std(0, correction=0), torch.ones(E, OUT), rtol=0.01, atol=0)


def test_normalised_experts_refuse_sparse_work_and_single_rows() -> None:
    experts = NormalisedExperts(E, D, OUT)

    assert not experts.supports_grouped
    with pytest.raises(ValueError, match="use a Dense chooser"):
        experts.grouped(torch.zeros(4, D), [1, 1, 1, 1])
    with pytest.raises(ValueError, match="at least 2"):
        experts.every(torch.zeros(1, D))
    assert experts.eval().every(torch.zeros(1, D)).shape == (1, E, OUT)


def test_modules_take_rows_of_any_shape_and_side_inputs() -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, image: Tensor, time: Tensor) -> Tensor:
            y: Tensor = self.layer(torch.cat([image.mean((2, 3)), time], dim=1))
            return y

    experts = ModuleExperts([Field(), Field()], in_dim=4, out_dim=2, row_dims=3)
    images, time = torch.randn(6, 4, 3, 3), torch.randn(6, 1)

    every = experts.every(images, time)
    grouped = experts.grouped(images, [2, 4], time)

    assert every.shape == (6, 2, 2)
    torch.testing.assert_close(grouped, torch.cat([every[:2, 0], every[2:, 1]]))
    torch.testing.assert_close(experts.every(images.expand(2, 6, 4, 3, 3), time), every)


@pytest.mark.parametrize("bank", [*BANKS, "normalised"])
def test_state_dict_pickle_and_copy_keep_the_function(bank: str) -> None:
    make = {**BANKS, "normalised": lambda: NormalisedExperts(E, D, OUT)}[bank]
    experts = make().eval()
    x_ND = torch.randn(5, D)
    other = make().eval()
    other.load_state_dict(experts.state_dict())
    file = io.BytesIO()
    torch.save(experts, file)
    file.seek(0)

    for twin in (other, copy.deepcopy(experts), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin.every(x_ND), experts.every(x_ND))


def test_a_copied_bank_has_an_activation_module_of_its_own() -> None:
    experts = MLPExperts(E, D, H, activation=nn.PReLU())
    twin = copy.deepcopy(experts)
    x_ND = torch.randn(5, D)
    before = twin.every(x_ND)

    with torch.no_grad():
        experts.get_parameter("activation.weight").fill_(3.0)

    torch.testing.assert_close(twin.every(x_ND), before)
    assert not torch.equal(experts.every(x_ND), before)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MLPExperts(0, D, H), "num_experts=0, but it must be at least 1"),
        (lambda: MLPExperts(E, D, 0), "hidden_dim=0"),
        (lambda: GLUExperts(E, D, H, activation=unknown), "use one of relu, gelu"),
        (lambda: NormalisedExperts(E, D, OUT, hidden_dim=0), "or None for one layer"),
        (lambda: ModuleExperts([]), "at least one module"),
        (lambda: ModuleExperts([nn.Identity()]), "pass in_dim and out_dim"),
        (lambda: ModuleExperts([(layer := nn.Linear(2, 2)), layer]), "same module twice"),
        (lambda: MLPExperts(E, D, H).every(torch.zeros(1, D), torch.zeros(1, 1)), "take no side inputs"),
    ],
)
def test_errors_say_what_to_do(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
