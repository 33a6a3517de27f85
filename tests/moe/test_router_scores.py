# SPDX-License-Identifier: Apache-2.0
"""Laws of the scores: a logit per row and column, its range and start, and what each score reads."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeapps.moe import (
    AttentionScore,
    CosineScore,
    LinearScore,
    PrototypeScore,
    RandomScore,
    RecurrentScore,
    Router,
    Score,
    TableScore,
    TopK,
)
from tests.moe.router_common import SCORES, D, E, features


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_every_score_gives_a_logit_per_row_and_column(name: str, num_rows: int) -> None:
    score = SCORES[name]()
    out = score(torch.randn(num_rows, D), group=torch.zeros(num_rows, dtype=torch.int64))
    logits = out[0] if isinstance(out, tuple) else out
    assert logits.shape == (num_rows, E)
    assert score.num_outputs == E
    with pytest.raises(ValueError, match=r"^num_experts=0, but it must be at least 1"):
        Score(0)


@pytest.mark.parametrize("name", ["linear", "mlp", "cosine", "prototype", "recurrent"])
def test_a_score_of_one_tensor_refuses_a_tuple(name: str) -> None:
    with pytest.raises(ValueError, match="reads one tensor"):
        SCORES[name]()((torch.randn(3, D), torch.randn(3, D)))


def test_linear_score_starts_like_a_linear_layer_or_as_told() -> None:
    bound = 1 / math.sqrt(400)
    score = LinearScore(400, 50)
    assert score.weight.abs().max() <= bound
    assert score.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert LinearScore(400, 50, init_std=0.006).weight.std().item() == pytest.approx(0.006, rel=0.05)
    assert not LinearScore(400, 50, init_std=0.0).weight.any()


def test_least_squares_fit_sorts_separable_contexts() -> None:
    label = torch.arange(40) % E
    x = torch.eye(E, D)[label] * 3 + 0.1 * torch.randn(40, D)
    score = LinearScore(D, E, bias=True)
    score.fit(x, F.one_hot(label, E).float(), noise=1e-4)
    assert torch.equal(score(x).argmax(-1), label)
    augmented = torch.cat([x, torch.ones(40, 1)], -1).double()
    wanted = torch.linalg.lstsq(augmented, F.one_hot(label, E).double()).solution
    score.fit(x, F.one_hot(label, E).float())
    torch.testing.assert_close(torch.cat([score.weight.T, score.bias[None]]).double(), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must be"):
        score.fit(x, torch.zeros(40, E + 1))


def test_cosine_scores_ignore_length_and_are_bounded() -> None:
    x = features()
    for score in (CosineScore(D, E, temperature=0.5), PrototypeScore(D, E, alpha=2.0)):
        score = score.double()
        torch.testing.assert_close(score(x), score(3.7 * x))
        assert score(x).abs().max() <= 2.0 + 1e-9
    with torch.no_grad():
        cosine = CosineScore(D, E).double()
        cosine.log_scale.fill_(50.0)
    assert cosine(x).abs().max() <= 100 + 1e-6
    with pytest.raises(ValueError, match="must be above"):
        CosineScore(D, E, temperature=0.01)


def test_rows_along_orthonormal_prototypes_are_routed_there_with_weight_one() -> None:
    router = Router(PrototypeScore(D, 2), TopK(1, weighing="identity"))
    with torch.no_grad():
        router.score.prototypes.copy_(torch.eye(2, D))
    routing = router(torch.tensor([[0.0, 4.0, 0, 0, 0], [0.5, 0, 0, 0, 0]]))
    assert routing.expert_M.tolist() == [1, 0]
    torch.testing.assert_close(routing.weight_M, torch.ones(2))


def test_table_wraps_around_and_says_what_it_needs() -> None:
    score = TableScore(torch.eye(3))
    ids = torch.tensor([0, 2, 5, -1])
    assert score(torch.zeros(4, 1), group=ids).argmax(-1).tolist() == [0, 2, 2, 2]
    assert not list(score.parameters())
    assert [p.shape for p in TableScore(7, E).parameters()] == [(7, E)]
    with pytest.raises(ValueError, match="pass group=ids"):
        score(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="needs both sizes"):
        TableScore(7)
    with pytest.raises(ValueError, match="num_ids"):
        TableScore([[0.0, 1.0]], 3)


def test_random_scores_differ_in_training_and_repeat_in_evaluation() -> None:
    score, x = RandomScore(E, seed=3), torch.zeros(500, D)
    assert not torch.equal(score(x), score(x))
    score.eval()
    assert torch.equal(score(x), score(x))
    counts = Router(RandomScore(E), TopK(1, weighing="ones"))(x).counts()
    assert counts.min() > 80
    batch = RandomScore(E, per="batch")
    assert Router(batch, TopK(1, weighing="ones"))(x).counts().max() == 500
    with pytest.raises(ValueError, match="'row' or 'batch'"):
        RandomScore(E, per="layer")


def test_attention_score_checks_its_features_and_gives_the_prior_to_the_empty_history() -> None:
    score = AttentionScore(3, E)
    with torch.no_grad():
        score.prior.copy_(torch.arange(E))
    empty = (torch.randn(2, 5, 3), torch.randn(2, 3), torch.zeros(2, 5))
    torch.testing.assert_close(score(empty), score.prior.expand(2, -1))
    none = (torch.randn(2, 0, 3), torch.randn(2, 3), torch.zeros(2, 0))
    torch.testing.assert_close(score(none), score.prior.expand(2, -1))
    with pytest.raises(ValueError, match="three tensors"):
        score(torch.randn(2, 3))


def test_recurrent_score_carries_a_state_and_forgets_it_when_its_gates_say_so() -> None:
    cell = nn.GRUCell(6, 6)
    first, second = (Router(RecurrentScore(D, E, state_dim=6, cell=cell), TopK(2)).double() for _ in range(2))
    assert first.score.cell is second.score.cell
    x = features()
    memory = first(x).state
    assert memory.shape == (12, 6)
    assert memory.requires_grad
    assert not torch.allclose(second(x, state=memory).logits_NE, second(x).logits_NE)
    with torch.no_grad():  # update gate "take the new", candidate blind to the past: a memoryless router
        cell.bias_ih[6:12] = -1e4
        cell.weight_hh.zero_()
    torch.testing.assert_close(second(x, state=memory).logits_NE, second(x).logits_NE)
    with pytest.raises(ValueError, match="GRUCell"):
        RecurrentScore(D, E, state_dim=7, cell=cell)


@pytest.mark.parametrize("units", ["both", "gate", "attention", "none"])
@pytest.mark.parametrize("parts", [("own", "product", "key"), ("own", "difference")])
def test_an_attention_score_in_bfloat16_is_that_of_its_rounded_parameters(units: str, parts: tuple[str, ...]) -> None:
    low = AttentionScore(
        3,
        E,
        gate_hidden=(5,) if units in ("both", "gate") else None,
        attention_hidden=(4,) if units in ("both", "attention") else None,
        attention_parts=parts,
    ).bfloat16()
    rounded = copy.deepcopy(low).float()
    features = (torch.randn(2, 5, 3), torch.randn(2, 3), torch.rand(2, 5) > 0.3)
    found, wanted = low(features), rounded(features)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in low.parameters())


def test_a_recurrent_score_in_bfloat16_keeps_its_memory_in_single_precision() -> None:
    low = RecurrentScore(D, E, state_dim=6).bfloat16()
    rounded, x = copy.deepcopy(low).float(), torch.randn(7, D)
    (_, memory), (_, expected) = low(x), rounded(x)
    assert memory.dtype == torch.float32
    torch.testing.assert_close(memory, expected)
    torch.testing.assert_close(low(x, state=memory)[0], rounded(x, state=expected)[0])
    low(x, state=memory.bfloat16())[0].sum().backward()
    assert low.cell.weight_hh.grad.any()
