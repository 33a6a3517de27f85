# SPDX-License-Identifier: Apache-2.0
"""Banks of meta-learners equal a naive expert written from their equations; limits of context, order, forcing hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeapps.moe import Dense, LinearScore, MoELayer, Router, TopK
from tasks.dynamics.nets.experts import (
    CoDAExperts,
    GEPSExperts,
    MetaExperts,
    NCFExperts,
    PlainExperts,
    ShallowPLRNNExperts,
)
from tasks.dynamics.nets.modulation import SelfModulation, taylor

E, D, C = 3, 2, 6
KINDS: list[type[MetaExperts]] = [GEPSExperts, CoDAExperts, NCFExperts, PlainExperts, ShallowPLRNNExperts]


def bank(kind: type[MetaExperts], **options: object) -> MetaExperts:
    """A bank in float64 whose experts differ from one another and whose shifts are not 0."""
    made = kind(D, E, C, same_init=False, **options).double()  # type: ignore[arg-type]
    if made.shift is not None:
        made.shift.data.normal_()
    return made


def rows(made: MetaExperts, num: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(num, made.in_dim).double(), torch.randn(num, C).double()


def swish(p: dict[str, Tensor], k: int, i: int, x: Tensor, c: Tensor) -> Tensor:
    """x sigmoid(beta x) with a slope that follows the context as a weight does."""
    slope = torch.ones(()) if "slope" not in p else p["slope"][k, 0, i] + p["slope"][k, 1:, i] @ c
    return x * torch.sigmoid(slope * x)


def naive_geps(p: dict[str, Tensor], k: int, x: Tensor, c: Tensor) -> Tensor:
    """W + A diag(c) B as matrices, one row at a time (docs/papers/mixer.md, equation 2)."""
    m = len(c)
    for i in range(3):
        W, B, A, A_b = p[f"root{i}"][k].T, p[f"down{i}"][k].T, p[f"up{i}"][k, :m].T, p[f"up{i}"][k, m:].T
        x = (W + A @ torch.diag(c) @ B) @ x + p[f"bias{i}"][k, 0] + A_b @ c
        x = swish(p, k, i, x, c) if i < 2 else x
    return x


def naive_coda(p: dict[str, Tensor], k: int, x: Tensor, c: Tensor) -> Tensor:
    """theta_0 + V c as a whole weight matrix, one row at a time (docs/papers/mixer.md, equation 3)."""
    for i in range(3):
        n_in = len(x) + 1
        blocks = p[f"weight{i}"][k].view(1 + len(c), n_in, -1)
        theta = blocks[0] + sum(c[j] * blocks[1 + j] for j in range(len(c)))
        x = theta[:-1].T @ x + theta[-1]
        x = swish(p, k, i, x, c) if i < 2 else x
    return x


def naive_ncf(p: dict[str, Tensor], k: int, x: Tensor, c: Tensor) -> Tensor:
    def net(name: str, h: Tensor, depth: int) -> Tensor:
        for i in range(depth):
            h = p[f"{name}_weight{i}"][k].T @ h + p[f"{name}_bias{i}"][k, 0]
            if i + 1 < depth:
                h = h * torch.sigmoid(p[f"{name}_beta{i}"][k, 0] * h)
        return h

    return net("main", torch.cat([net("data", x, 2), net("ctx", c, 2)]), 3)


def naive_plain(p: dict[str, Tensor], k: int, x: Tensor, c: Tensor) -> Tensor:
    for i in range(3):
        x = F.linear(x, p[f"weight{i}"][k].T, p[f"bias{i}"][k, 0])
        x = F.silu(x) if i < 2 else x
    return x


def naive_plrnn(p: dict[str, Tensor], k: int, x: Tensor, c: Tensor) -> Tensor:
    flat = p["map"][k, 0] + c @ p["map"][k, 1:]
    sizes, parts, start = {"A": (D, D), "W1": (16, D), "W2": (D, 16), "h1": (D,), "h2": (16,), "alpha": ()}, {}, 0
    for name, shape in sizes.items():
        stop = start + math.prod(shape)
        parts[name], start = flat[start:stop].view(shape), stop
    alpha = parts["alpha"].clamp(0, 1)
    u = alpha * x[:D] + (1 - alpha) * x[D:]
    A = torch.eye(D) + parts["A"].T
    return A @ u + parts["W1"].T @ torch.relu(parts["W2"].T @ u + parts["h2"]) + parts["h1"]


NAIVE: dict[type[MetaExperts], Callable[..., Tensor]] = {
    GEPSExperts: naive_geps,
    CoDAExperts: naive_coda,
    NCFExperts: naive_ncf,
    PlainExperts: naive_plain,
    ShallowPLRNNExperts: naive_plrnn,
}


def naive(made: MetaExperts, k: int, x: Tensor, context: Tensor) -> Tensor:
    piece = context[k * C // E : (k + 1) * C // E] if made.split_context else context
    piece = piece if made.shift is None else piece + made.shift[k]
    return NAIVE[type(made)](made.stacks(), k, x, piece)


# Rows per expert: equal, padded, too uneven to pad, idle experts, none at all.
COUNTS = [[4, 4, 4], [5, 4, 3], [12, 0, 0], [0, 11, 1], [0, 0, 0]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_equals_the_naive_expert_in_value_and_gradient(kind: type[MetaExperts], counts: list[int]) -> None:
    made = bank(kind)
    x, context = rows(made, sum(counts))
    leaves = [x.requires_grad_(), context.requires_grad_(), *made.parameters()]
    y = made.grouped(x, counts, context)
    owner = [k for k, count in enumerate(counts) for _ in range(count)]
    slow = [naive(made, k, x[i], context[i]) for i, k in enumerate(owner)]
    wanted = torch.stack(slow) if slow else x.new_zeros(0, D)

    torch.testing.assert_close(y, wanted)
    probe = torch.randn_like(y)
    fast = torch.autograd.grad((y * probe).sum(), leaves, allow_unused=True)
    if owner:
        slow_grads = torch.autograd.grad((wanted * probe).sum(), leaves, allow_unused=True)
        for a, b, leaf in zip(fast, slow_grads, leaves, strict=True):
            torch.testing.assert_close(
                torch.zeros_like(leaf) if a is None else a, torch.zeros_like(leaf) if b is None else b
            )


@pytest.mark.parametrize("kind", [GEPSExperts, CoDAExperts])
def test_without_learned_slopes_an_expert_is_the_naive_one_with_slope_1(kind: type[MetaExperts]) -> None:
    made = bank(kind, activation="silu")
    x, context = rows(made)
    assert "slope" not in made.stacks()

    wanted = torch.stack([naive(made, 1, x[i], context[i]) for i in range(len(x))])
    torch.testing.assert_close(made.grouped(x, [0, len(x), 0], context), wanted)
    expert = torch.full((len(x),), 1)
    bound = made.bind(context, expert, torch.ones(len(x)).double())(x[:, None])
    torch.testing.assert_close(bound[:, 0], wanted)


def test_geps_starts_by_the_outputs_as_released_or_by_the_inputs() -> None:
    """Bounds of the uniform draws, from the shapes of A (out, m), B (m, in), A_b (out, m), s (1, m), in this order."""
    for start, bounds in (("published", (1 / 20, 1 / 2, 1 / 20)), ("fan_in", (1 / 2, 1 / 20, 1 / 2))):
        made = GEPSExperts(2, 1, 4, width=400, depth=3, start=start)  # type: ignore[arg-type]
        p = made.stacks()
        up, down = p["up1"], p["down1"]
        for found, bound in zip((up[:, :4], down, up[:, 4:]), bounds, strict=True):
            assert 0.97 * bound < float(found.detach().abs().max()) <= bound
        assert 0.01 <= float(p["slope"][:, 0].detach().min()) <= float(p["slope"][:, 0].detach().max()) <= 1
        assert torch.equal(p["slope"][0, 0, 0], p["slope"][0, 0, 1])  # one activation, used after both layers


def test_slopes_that_follow_the_context_start_from_the_bounds_of_biases() -> None:
    geps = torch.cat([GEPSExperts(2, 1, 4).stacks()["slope"][0, 1:].flatten() for _ in range(60)]).detach()
    coda = torch.cat([CoDAExperts(2, 1, 4).stacks()["slope"][0, 1:].flatten() for _ in range(60)]).detach()

    assert 0.98 < float(geps.abs().max()) <= 1
    assert 0.49 < float(coda.abs().max()) <= 0.5
    assert float(geps.min()) < 0 < float(geps.max())


@pytest.mark.parametrize("wrong", [{"activation": "relu"}, {"start": "zeros"}])
def test_unknown_words_for_geps_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong.values()))!r}; use (swish or silu|published or fan_in)"):
        GEPSExperts(2, 1, 4, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("context", "state", "width"), [(4, 2, 6), (9, 3, 4), (5, 7, 32), (16, 4, 64), (40, 2, 32)])
def test_small_nets_of_ncf_are_as_wide_as_released(context: int, state: int, width: int) -> None:
    """By hand: the geometric mean of the ends, cut to a whole number and raised to even: sqrt(4 x 6) = 4.9 -> 4."""
    made = NCFExperts(state, 1, context, intermediate=width)
    for name, first in (("ctx", context), ("data", state)):
        assert made.stacks()[f"{name}_weight0"].shape[-1] == {
            (4, 6): 4, (2, 6): 4, (9, 4): 6, (3, 4): 4, (5, 32): 12, (7, 32): 14,
            (16, 64): 32, (4, 64): 16, (40, 32): 36, (2, 32): 8,
        }[first, width]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_and_grouped_agree(kind: type[MetaExperts]) -> None:
    made = bank(kind)
    x, context = rows(made)
    y = made.every(x, context)

    for k in range(E):
        counts = [len(x) if j == k else 0 for j in range(E)]
        torch.testing.assert_close(y[:, k], made.grouped(x, counts, context))


@pytest.mark.parametrize("kind", [GEPSExperts, CoDAExperts])
def test_a_context_that_cancels_the_shift_leaves_the_root_perceptron(kind: type[MetaExperts]) -> None:
    made = bank(kind, split_context=False)
    assert made.shift is not None
    x, _ = rows(made)
    context = -made.shift[0].detach().expand(len(x), C)
    h = x
    for i in range(3):
        if kind is GEPSExperts:
            weight, bias = made.stacks()[f"root{i}"][0], made.stacks()[f"bias{i}"][0]
        else:
            whole = made.stacks()[f"weight{i}"][0]
            weight, bias = whole[: h.shape[1]], whole[h.shape[1]]
        h = h @ weight + bias
        h = swish(made.stacks(), 0, i, h, torch.zeros(C).double()) if i < 2 else h

    torch.testing.assert_close(made.grouped(x, [len(x), 0, 0], context), h)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_an_expert_reads_its_own_piece_alone_when_contexts_are_split(kind: type[MetaExperts]) -> None:
    made = bank(kind)
    x, context = rows(made)
    context.requires_grad_()
    made.grouped(x, [0, len(x), 0], context).sum().backward()

    assert context.grad is not None
    read = context.grad.abs().sum(0) > 0
    assert read.tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_start_from_the_same_weights(kind: type[MetaExperts]) -> None:
    for stack in kind(D, E, C).stacks().values():
        assert torch.equal(stack, stack[:1].expand_as(stack))
    assert any(not torch.equal(s, s[:1].expand_as(s)) for s in kind(D, E, C, same_init=False).stacks().values())


@pytest.mark.parametrize("kind", KINDS[:4])
def test_permuting_experts_with_gate_and_pieces_changes_nothing(kind: type[MetaExperts]) -> None:
    made, order = bank(kind), [2, 0, 1]
    layer = MoELayer(Router(LinearScore(C, E, bias=True), TopK(1)), made).double()
    x, context = rows(made)
    y = layer(x, features=context, side=(context,))
    pieces = context.view(-1, E, C // E)[:, order].flatten(1) if made.split_context else context
    score = LinearScore(C, E, bias=True).double()
    whole = layer.router.score.weight.detach()
    weight = whole.view(E, E, C // E)[:, order].flatten(1) if made.split_context else whole
    score.load_state_dict({"weight": weight[order], "bias": layer.router.score.bias[order]})
    permuted = MoELayer(Router(score, TopK(1)), made.select(order))

    torch.testing.assert_close(permuted(x, features=pieces, side=(pieces,)), y)


def test_a_dense_mixture_with_one_hot_weights_is_top_1() -> None:
    made = bank(GEPSExperts)
    x, context = rows(made)
    score = LinearScore(C, E, bias=True).double()
    score.weight.data *= 1e4
    top = MoELayer(Router(score, TopK(1, weighing="ones")), made)
    dense = MoELayer(Router(score, Dense()), made)

    torch.testing.assert_close(dense(x, features=context, side=(context,)), top(x, features=context, side=(context,)))


def test_expansion_of_order_1_is_exact_for_affine_and_order_2_for_quadratic_functions() -> None:
    M, Q = torch.randn(4, C).double(), torch.randn(4, C, C).double()
    c, a = torch.randn(C).double(), torch.randn(C).double()

    def affine(z: Tensor) -> Tensor:
        return M @ z + 1

    def quadratic(z: Tensor) -> Tensor:
        return affine(z) + torch.einsum("oij,i,j->o", Q, z, z)

    torch.testing.assert_close(taylor(affine, c, a, 1), affine(c))
    torch.testing.assert_close(taylor(quadratic, c, a, 2), quadratic(c))
    assert not torch.allclose(taylor(quadratic, c, a, 1), quadratic(c))
    assert not torch.allclose(taylor(affine, c, a, 0), affine(c))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_expansion_about_the_context_itself_is_the_field_and_has_gradients(kind: type[MetaExperts], order: int) -> None:
    made = bank(kind)
    layer = MoELayer(Router(LinearScore(C, E), TopK(1, weighing="ones")).double(), made)
    x, context = rows(made)
    routing = layer.route(context)

    def field(c: Tensor) -> Tensor:
        return layer(x, routing=routing, side=(c,))

    torch.testing.assert_close(taylor(field, context, context, order), field(context))
    context.requires_grad_()
    (taylor(field, context, torch.randn_like(context), order)).square().sum().backward()
    assert order == 0 or (context.grad is not None and bool(context.grad.abs().sum() > 0))


def test_neighbours_are_the_nearest_and_begin_with_the_environment_itself() -> None:
    context = torch.tensor([[0.0], [1.0], [1.2], [5.0]])

    assert SelfModulation(pool=2).choose(context).tolist() == [[0, 1], [1, 2], [2, 1], [3, 2]]
    assert SelfModulation(pool=1, neighbours="nearest_other").choose(context).tolist() == [[1], [2], [1], [2]]
    assert SelfModulation(pool=2, neighbours="smallest").choose(context).tolist() == [[0, 1]] * 4
    assert SelfModulation(pool=2).choose(torch.zeros(3, 2))[:, 0].tolist() == [0, 1, 2]
    assert SelfModulation(pool=9, neighbours="random").choose(context).shape == (4, 4)


def plrnn(alpha: float) -> ShallowPLRNNExperts:
    made = ShallowPLRNNExperts(D, 1, C, shift_context=False).double()
    with torch.no_grad():
        made.map[:, 1:] = 0
        made.map[:, :1].normal_()
        made.map[:, 0, -1] = alpha
    return made


def run(made: ShallowPLRNNExperts, data: Tensor) -> Tensor:
    z, out = data[:1], []
    for t in range(len(data) - 1):
        z = made.grouped(torch.cat([z, data[t : t + 1]], 1), [1], torch.zeros(1, C).double())
        out.append(z)
    return torch.cat(out)


def test_forced_plrnn_is_a_one_step_map_of_the_data_and_a_free_one_ignores_it() -> None:
    data, other = torch.randn(6, D).double(), torch.randn(6, D).double()
    other[0] = data[0]
    made = plrnn(0.0)
    steps = torch.cat([run(made, data[t : t + 2]) for t in range(5)])
    torch.testing.assert_close(run(made, data), steps)
    free = plrnn(1.0)
    torch.testing.assert_close(run(free, data), run(free, other))
    half = plrnn(0.5)
    assert not torch.allclose(run(half, data), run(half, other))


def test_plrnn_starts_from_persistence() -> None:
    data = torch.randn(6, D).double()
    made = ShallowPLRNNExperts(D, 1, C, shift_context=False).double()

    torch.testing.assert_close(run(made, data), data[:-1])


def test_contexts_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match="context_dim=10 cannot be split into 4 equal pieces; use a multiple of 4"):
        GEPSExperts(2, 4, 10)
    assert GEPSExperts(2, 4, 10, split_context=False).piece_dim == 10
    with pytest.raises(ValueError, match="one side input, contexts of 6"):
        bank(GEPSExperts).grouped(torch.zeros(1, D).double(), [1, 0, 0], torch.zeros(1, 5).double())
    for wrong in ({"order": 3}, {"pool": 0}, {"neighbours": "far"}):
        with pytest.raises(ValueError, match="use order 0, 1 or 2"):
            SelfModulation(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [GEPSExperts, CoDAExperts, NCFExperts, PlainExperts])
@pytest.mark.parametrize("num_experts", [1, 3])
def test_experts_bound_to_contexts_are_the_bank_row_by_row_and_so_are_all_gradients(
    kind: type[MetaExperts], num_experts: int
) -> None:
    made = kind(D, num_experts, 6, same_init=False).double()
    if made.shift is not None:
        made.shift.data.normal_()
    context = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    expert = torch.tensor([2, 0, 2, 2, 0]) % num_experts  # of three experts one idles
    x = torch.randn(5, 4, D, dtype=torch.float64, requires_grad=True)

    bound = made.bind(context, expert, weight)(x)

    order = expert.argsort(stable=True)
    sizes = (4 * torch.bincount(expert, minlength=num_experts)).tolist()
    sorted_rows = made.grouped(x[order].flatten(0, 1), sizes, context[order].repeat_interleave(4, 0))
    plain = torch.empty_like(x).index_copy(0, order, sorted_rows.view(5, 4, D)) * weight[:, None, None]
    torch.testing.assert_close(bound, plain)
    wanted = [x, context, weight, *made.parameters()]
    slopes = [torch.autograd.grad(y.sin().sum(), wanted, allow_unused=True) for y in (bound, plain)]
    for one, two in zip(*slopes, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)
