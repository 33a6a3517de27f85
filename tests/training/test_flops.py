# SPDX-License-Identifier: Apache-2.0
"""FLOPs of ordinary layers against arithmetic: forward and backward, in both modes, whatever kernel runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeapps.training.cost import count_flops
from moeapps.training.flops import counting

B, L, D, H = 3, 10, 16, 4
ROWS = B * L
ATTENTION = 2 * 2 * B * L * L * D  # scores and weighted sum, all heads together
PROJECTIONS = 2 * ROWS * 4 * D * D  # query, key, value, output


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class SelfAttention(nn.Module):
    """torch's attention layer on one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return y


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (H, D // H)).transpose(1, 2)


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(x), heads(x), heads(x))


def attend_masked(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(x), heads(x), heads(x), attn_mask=torch.ones(L, L).tril().bool())


def sparse_times(x: Tensor) -> Tensor:
    band = torch.eye(L).to_sparse()  # L numbers are stored
    return torch.sparse.mm(band, x[0]) + torch.mm(band.coalesce(), x[0])


LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear": (lambda: nn.Linear(D, 5), 2 * ROWS * D * 5),
    "attention layer": (SelfAttention, PROJECTIONS + ATTENTION),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(D, H, 40, batch_first=True),
        PROJECTIONS + ATTENTION + 2 * ROWS * 2 * D * 40,
    ),
    "fused attention": (lambda: Called(attend), ATTENTION),
    "masked attention": (lambda: Called(attend_masked), ATTENTION),
    "lstm": (lambda: nn.LSTM(D, 7, batch_first=True), 2 * ROWS * 4 * 7 * (D + 7)),
    "lstm of two layers, both ways": (
        lambda: nn.LSTM(D, 7, num_layers=2, bidirectional=True, batch_first=True),
        2 * (2 * ROWS * 4 * 7 * (D + 7) + 2 * ROWS * 4 * 7 * (14 + 7)),
    ),
    "gru": (lambda: nn.GRU(D, 7, batch_first=True), 2 * ROWS * 3 * 7 * (D + 7)),
    "sparse product": (lambda: Called(sparse_times), 2 * 2 * L * D),
    "matrix times vector": (lambda: Called(lambda x: x[0] @ x[0, 0]), 2 * L * D),
    "inner product": (lambda: Called(lambda x: x[0, 0] @ x[0, 1]), 2 * D),
    "distances": (lambda: Called(lambda x: torch.cdist(x[0], x[1])), 2 * L * L * D),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_what_arithmetic_says(name: str, train: bool) -> None:
    make, wanted = LAYERS[name]
    assert count_flops(make().train(train), torch.randn(B, L, D)) == wanted


def test_a_bilinear_layer_multiplies_all_pairs_for_each_output() -> None:
    assert count_flops(nn.Bilinear(D, 6, 5), torch.randn(B, L, D), torch.randn(B, L, 6)) == 2 * ROWS * D * 6 * 5


def test_sparse_rows_count_what_they_store() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the layout a beta
        band = torch.eye(L).to_sparse_csr()
    assert count_flops(Called(lambda x: torch.sparse.mm(band, x)), torch.randn(L, D)) == 2 * L * D


@pytest.mark.parametrize("name", ["linear", "attention layer", "fused attention", "masked attention", "lstm"])
def test_backward_of_products_is_twice_forward(name: str) -> None:
    make, wanted = LAYERS[name]
    module, x = make(), torch.randn(B, L, D, requires_grad=True)
    with counting(module) as flops:
        y = module(x)
        (y[0] if isinstance(y, tuple) else y).sum().backward()

    assert flops.get_total_flops() == 3 * wanted


def test_backward_of_a_recurrent_layer_asks_for_no_gradient_of_its_first_state() -> None:
    module, x = nn.GRU(D, 7, batch_first=True), torch.randn(B, L, D, requires_grad=True)
    with counting(module) as flops:
        module(x)[0].sum().backward()

    assert flops.get_total_flops() == 3 * LAYERS["gru"][1] - 2 * B * 3 * 7 * 7


def test_counting_leaves_the_fast_path_as_it_was() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    count_flops(SelfAttention().eval(), torch.randn(B, L, D))
    assert torch.backends.mha.get_fastpath_enabled() == before


@torch.library.custom_op("moeapps_test::opaque_product", mutates_args=())
def opaque_product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


class Opaque(nn.Module):
    """A product that no counter sees, beside one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last, self.norm = Called(lambda x: x), nn.Linear(D, D), nn.LayerNorm((L, D))
        self.hidden.weight = nn.Parameter(torch.randn(D, D))
        self.hidden.function = lambda x: opaque_product(x, self.hidden.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.hidden(x.flatten(0, 1)).view(-1, L, D)))
        return y


def test_a_part_with_matrices_that_counts_nothing_is_named() -> None:
    with pytest.warns(UserWarning, match=r"0 FLOPs were counted in hidden \(Called\), though") as told:
        total = count_flops(Opaque(), torch.randn(B, L, D))
    assert len(told) == 1
    assert total == 2 * ROWS * D * D


def test_lookups_norms_and_parts_without_a_row_are_not_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.idle = nn.Embedding(9, D), nn.LayerNorm((L, D)), nn.Linear(D, D)

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.norm(self.table(ids))
            self.idle(y.new_zeros(0, D))
            return y

    assert count_flops(Net(), torch.zeros(B, L, dtype=torch.int64)) == 0


def test_a_parameter_may_be_what_a_module_is_called_with() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.context, self.map = nn.Parameter(torch.zeros(B, D)), nn.Linear(D, D)

        def forward(self) -> Tensor:
            y: Tensor = self.map(self.context)
            return y

    assert count_flops(Net()) == 2 * B * D * D
