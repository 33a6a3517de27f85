# SPDX-License-Identifier: Apache-2.0
"""Rivals: counts by hand, specialists that learn from their own domain alone."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from audio_net_common import DENSE, FACTS, K, V, batch_of, prompts, scattered

from tasks.audio.model import AudioLM
from tasks.audio.nets.delay import NO_CODE
from tasks.audio.nets.generation import generate
from tasks.audio.nets.language_model import IGNORED, CodecLM
from tasks.audio.rivals.counts import BigramLM, UnigramLM
from tasks.audio.rivals.specialists import Specialists

# Domains by place: voice, piano, voice_b (seen), voice_c (validation, speech), harp (unseen, music).
BATCHES = [
    batch_of([6, 4, 5], [True, True, False], [0, 1, 2], seed=1),
    batch_of([3, 7, 2], [False, True, True], [0, 0, 1], seed=2),
]
POOLS = {0: [0], 1: [1], 2: [2], 3: [0, 2], 4: [1]}


def pairs_by_hand(domains: list[int], book: int) -> list[tuple[int, int]]:
    """All (token before, token) of a book in some domains; V stands for the end, -1 for the begin."""
    found = []
    for batch in BATCHES:
        for clip, end, domain in zip(batch.codes.tolist(), batch.ends.tolist(), batch.domain.tolist(), strict=True):
            if domain in domains:
                codes = [code for code in clip[book] if code != NO_CODE] + ([V] if end and book == 0 else [])
                found += list(zip([-1, *codes], codes, strict=False))
    return found


def fitted(net: CodecLM) -> CodecLM:
    net.train()
    for batch in BATCHES:
        inputs, target = net.targets(batch)
        logits = net(batch.prompt, inputs, batch.domain)
        F.cross_entropy(logits.flatten(0, 2), target.flatten()).backward()  # as training does
    return net.eval()


def unigram_by_hand(domain: int, book: int) -> list[Fraction]:
    counts = Counter(code for _, code in pairs_by_hand(POOLS[domain], book))
    legal = V + 1 if book == 0 else V
    total = sum(counts.values()) + Fraction(legal, 2)
    return [(counts[code] + Fraction(1, 2)) / total for code in range(legal)]


@pytest.mark.parametrize("domain", [0, 1, 2, 3, 4])
def test_a_unigram_is_the_smoothed_share_of_each_code_in_its_domain_or_kind(domain: int) -> None:
    net = fitted(UnigramLM(FACTS))
    logits = net(prompts([0], 1), torch.zeros(1, K, 2, dtype=torch.int64), torch.tensor([domain]))
    assert logits.shape == (1, 2, K, V + 3)
    for book in range(K):
        wanted = unigram_by_hand(domain, book)
        found = logits[0, 0, book].exp()
        assert found.tolist() == pytest.approx([float(p) for p in wanted] + [0.0] * (V + 3 - len(wanted)))
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("domain", [0, 2, 3, 4])
def test_a_bigram_mixes_its_pairs_with_the_unigram(domain: int) -> None:
    net = fitted(BigramLM(FACTS, smoothing=4.0))
    begin = V + 2
    before = torch.tensor([0, 3, V - 1, begin])
    logits = net(prompts([0], 1), before.expand(1, K, -1), torch.tensor([domain]))
    for book in range(K):
        alone = unigram_by_hand(domain, book)
        pairs = pairs_by_hand(POOLS[domain], book)
        for place, token in enumerate(before.tolist()):
            after = Counter(b for a, b in pairs if a == (-1 if token == begin else token))
            total = sum(after.values()) + 4
            wanted = [float((after[code] + 4 * p) / total) for code, p in enumerate(alone)]
            assert logits[0, place, book].exp().tolist()[: len(wanted)] == pytest.approx(wanted)


@pytest.mark.parametrize("kind", [UnigramLM, BigramLM])
def test_evaluation_counts_nothing_and_counts_are_in_the_checkpoint(kind: Any) -> None:
    net = fitted(kind(FACTS))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.targets(BATCHES[0])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    again = kind(FACTS)
    again.load_state_dict(before)
    inputs, _ = net.targets(BATCHES[0])
    domain = torch.tensor([3, 0, 4])
    assert torch.equal(again.eval()(BATCHES[0].prompt, inputs, domain), net(BATCHES[0].prompt, inputs, domain))


def test_what_never_occurred_has_some_probability_and_nothing_counted_is_uniform() -> None:
    net = UnigramLM(FACTS).eval()
    logits = net(prompts([0], 1), torch.zeros(1, K, 1, dtype=torch.int64), torch.tensor([0]))
    assert logits[0, 0, 1, :V].tolist() == pytest.approx([-math.log(V)] * V)
    assert logits[0, 0, 0, : V + 1].tolist() == pytest.approx([-math.log(V + 1)] * (V + 1))


def specialists() -> Specialists:
    net = Specialists(FACTS, net=lambda facts: AudioLM(facts, moe=DENSE, dim=8, depth=1, num_heads=2))
    scattered(net)
    return net.double().eval()


def test_specialists_answer_for_their_domain_and_together_for_their_kind() -> None:
    net = specialists()
    batch = batch_of([5] * 5, [True] * 5, [0, 1, 2, 3, 4])
    inputs, target = net.targets(batch)
    found = net(batch.prompt, inputs, batch.domain).log_softmax(-1)
    own = [part(batch.prompt, inputs).log_softmax(-1) for part in net.nets]
    for clip, experts in ((0, [0]), (1, [1]), (2, [2]), (3, [0, 2]), (4, [1])):
        wanted = sum(own[e][clip] for e in experts) / len(experts)
        torch.testing.assert_close(found[clip], wanted.log_softmax(-1))
    assert torch.equal(target, AudioLM(FACTS, moe=DENSE).targets(batch)[1])


def test_a_specialist_learns_from_its_own_domain_alone() -> None:
    net = specialists().train()
    batch = batch_of([5] * 2, [True] * 2, [2, 2])
    inputs, target = net.targets(batch)
    logits = net(batch.prompt, inputs, batch.domain)
    F.cross_entropy(logits.flatten(0, 2), target.flatten(), ignore_index=IGNORED).backward()
    assert [any(p.grad is not None for p in part.parameters()) for part in net.nets] == [False, False, True]


@pytest.mark.parametrize("kind", ["unigram", "bigram", "specialists"])
def test_rivals_generate_like_the_network_and_need_a_domain(kind: str) -> None:
    net = {"unigram": lambda: fitted(UnigramLM(FACTS)), "bigram": lambda: fitted(BigramLM(FACTS))}.get(
        kind, specialists
    )()
    domain, prompt = torch.tensor([0, 3, 4]), prompts([2, 1, 2], 2)
    codes = generate(net, prompt, domain=domain, cfg_scale=0.0, temperature=0.0, min_frames=4, max_frames=4)
    # The best token of each step is that of the whole sequence, which is read again.
    steps = net.delay.apply(torch.stack(codes), torch.tensor([True] * 3))
    best = net(prompt, steps, domain)[..., :V].argmax(-1)
    for book, delay in enumerate(net.delay.delays):
        assert torch.equal(best[:, delay : delay + 4, book], torch.stack(codes)[:, book])
    with pytest.raises(ValueError, match=r"domain=batch\.domain"):
        net(prompt, steps)


def test_numbers_that_leave_codes_without_probability_are_refused() -> None:
    with pytest.raises(ValueError, match="prior=0"):
        UnigramLM(FACTS, prior=0)
    with pytest.raises(ValueError, match="smoothing=0"):
        BigramLM(FACTS, smoothing=0)
    with pytest.raises(ValueError, match="no seen domain"):
        Specialists({**FACTS, "domains": {"seen": []}}, net=lambda facts: AudioLM(facts, moe=DENSE))
