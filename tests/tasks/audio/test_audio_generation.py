# SPDX-License-Identifier: Apache-2.0
"""Generation: draws follow the probabilities, guidance its equation, ends their countdown, steps the full forward."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from audio_net_common import FACTS, K, V, batch_of, network, prompts
from torch import Tensor

from moeapps.moe.presets import unimoe_audio
from tasks.audio.data.batch import NO_CODE
from tasks.audio.model import AudioLM
from tasks.audio.nets.delay import DelayPattern
from tasks.audio.nets.generation import Guided, generate
from tasks.audio.nets.language_model import CodecLM, empty_prompts
from tasks.audio.nets.sampling import Sampling
from tasks.audio.report.drawing import Drawing, draw_codes

# --- draws ------------------------------------------------------------------------------------------------------------


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([1.0, 3.0, -1.0, 2.0, float("-inf")])
    even = (torch.arange(20_000) + 0.5) / 20_000
    for sampling, kept in (
        (Sampling(), [0, 1, 2, 3]),
        (Sampling(0.5), [0, 1, 2, 3]),
        (Sampling(top_k=2), [1, 3]),
        (Sampling(top_p=0.8), [1, 3]),  # 0.657 + 0.242 is the first sum of 0.8 or more
        (Sampling(top_p=0.657), [1]),
        (Sampling(top_k=3, top_p=0.95), [0, 1, 3]),
    ):
        found = torch.bincount(sampling.draw(logits.expand(20_000, -1), even), minlength=5) / 20_000
        weight = torch.zeros(5).index_fill(0, torch.tensor(kept), 1) * (logits / sampling.temperature).exp()
        torch.testing.assert_close(found, weight / weight.sum(), atol=2e-4, rtol=0)


def test_draws_at_the_ends() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5]])
    assert int(Sampling(temperature=0).draw(logits, torch.tensor([0.99]))) == 1
    assert int(Sampling(top_k=1).draw(logits, torch.tensor([0.99]))) == 1
    almost_one = torch.tensor([1 - 2**-24])
    assert int(Sampling().draw(logits, almost_one)) == 0  # the least likely, not one past it
    only = torch.full((1, 4), float("-inf"))
    only[0, 2] = -5.0
    for uniform in (0.0, 0.5, float(almost_one)):
        assert int(Sampling().draw(only, torch.tensor([uniform]))) == 2


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_draws_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="0 < top_p <= 1"):
        Sampling(**options)


# --- a network whose answers are known --------------------------------------------------------------------------------


class Counting(CodecLM):
    """Book k of frame t is (t + k) modulo V; the first book wants to end from frame ``wish`` on, and others always."""

    def __init__(self, delays: list[int], wish: int) -> None:
        super().__init__(DelayPattern(delays, V))
        self.wish = wish
        self.read: list[Tensor] = []

    def logits(self, at: int, num: int) -> Tensor:
        logits = torch.zeros(num, len(self.delay.delays), V + 3)
        logits[..., self.delay.pad] = 60.0  # never to be drawn
        logits[..., self.delay.begin] = 60.0
        logits[:, 1:, self.delay.end] = 60.0
        for book, delay in enumerate(self.delay.delays):
            logits[:, book, (at - delay - 1 + book) % V] = 40.0
        if at - 1 >= self.wish:
            logits[:, 0, self.delay.end] = 60.0
        return logits

    def prefill(
        self, prompt_BS: Tensor, inputs_BKL: Tensor, *, room: int, domain: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        self.read = list(inputs_BKL.unbind(-1))
        return self.logits(len(self.read), len(prompt_BS)), None

    def step(self, token_BK: Tensor, cache: Any, domain: Tensor | None = None) -> Tensor:
        self.read.append(token_BK)
        return self.logits(len(self.read), len(token_BK))


@pytest.mark.parametrize("delays", [[0, 1, 2], [0, 4, 5], [0, 0, 0]])
@pytest.mark.parametrize(("wish", "min_frames", "frames"), [(5, 0, 5), (0, 4, 4), (99, 0, 9), (0, 0, 0), (1, 0, 1)])
def test_clips_end_when_the_first_book_does_within_their_limits(
    delays: list[int], wish: int, min_frames: int, frames: int
) -> None:
    net = Counting(delays, wish)
    (codes,) = generate(net, prompts([2], 2), cfg_scale=0.0, min_frames=min_frames, max_frames=9)
    assert codes.tolist() == [[(t + k) % V for t in range(frames)] for k in range(K)]


@pytest.mark.parametrize("delays", [[0, 1, 2], [0, 4, 5]])
def test_after_the_end_each_book_has_its_codes_then_one_end_then_padding(delays: list[int]) -> None:
    net = Counting(delays, 5)
    generate(net, prompts([2], 2), cfg_scale=0.0, max_frames=9)
    read = torch.stack(net.read, -1)[0]
    for book, delay in enumerate(delays):
        whole = [V + 2] * (delay + 1) + [(t + book) % V for t in range(5)] + [V] + [V + 1] * 9
        assert read[book].tolist() == whole[: read.shape[1]]
    assert read.shape[1] == 1 + 5 + max(delays) - 1  # the step of the last code is drawn, not read


def test_clips_of_a_batch_end_one_by_one() -> None:
    class Uneven(Counting):
        def logits(self, at: int, num: int) -> Tensor:
            logits = super().logits(at, num)
            for clip in range(num):
                logits[clip, 0, self.delay.end] = 60.0 if at - 1 >= 2 * clip + 1 else 0.0
            return logits

    found = generate(Uneven([0, 1, 2], 0), prompts([2] * 3, 2), cfg_scale=0.0, max_frames=9)
    assert [codes.tolist() for codes in found] == [
        [[(t + k) % V for t in range(frames)] for k in range(K)] for frames in (1, 3, 5)
    ]


def test_given_codes_are_kept_and_the_new_ones_follow_them() -> None:
    given = torch.full((2, K, 4), NO_CODE)
    given[0], given[1, :, :2] = 9, 8
    found = generate(Counting([0, 1, 3], 99), prompts([2, 1], 2), continue_codes=given, cfg_scale=0.0, max_frames=3)
    for codes, start, value in zip(found, (4, 2), (9, 8), strict=True):
        assert (codes[:, :start] == value).all()
        assert codes[:, start:].tolist() == [[(t + k) % V for t in range(start, start + 3)] for k in range(K)]


def test_an_end_may_have_to_be_the_best_token() -> None:
    class Torn(Counting):
        def logits(self, at: int, num: int) -> Tensor:
            logits = super().logits(at, num)
            logits[:, 0, self.delay.end] = 39.9  # nearly as likely as the code
            return logits

    frames = {
        best: [c.shape[1] for c in generate(Torn([0, 1, 2], 0), prompts([2] * 20, 2), max_frames=9, end_if_best=best)]
        for best in (False, True)
    }
    assert frames[True] == [9] * 20
    assert min(frames[False]) < 4


# --- the real network -------------------------------------------------------------------------------------------------


def test_best_tokens_are_those_that_the_full_forward_would_choose() -> None:
    net = network()
    prompt = prompts([3, 1], 3)
    options: dict[str, Any] = {"temperature": 0.0, "min_frames": 6, "max_frames": 6, "cfg_scale": 0.7}
    for codes, symbols in zip(generate(net, prompt, **options), prompt, strict=True):
        steps = torch.full((1, K, 1), net.delay.begin)
        alone = symbols[symbols != 0].unsqueeze(0)
        for at in range(1, 6 + net.delay.longest + 1):
            c, u = net(alone, steps)[0, -1], net(empty_prompts(alone), steps)[0, -1]
            logits = c + 0.7 * (c - u)
            best = logits[:, :V].argmax(-1)
            frame = at - torch.tensor(net.delay.delays) - 1
            step = best.where(frame < 6, net.delay.pad).masked_fill(frame == 6, net.delay.end)
            steps = torch.cat([steps, step.where(frame >= 0, net.delay.begin).view(1, K, 1)], -1)
        wanted = [[int(steps[0, k, t + d + 1]) for t in range(6)] for k, d in enumerate(net.delay.delays)]
        assert codes.tolist() == wanted


def test_guidance_is_its_equation_and_nothing_without_a_difference() -> None:
    net, prompt = network(), prompts([3, 2], 3)
    start = torch.full((2, K, 1), net.delay.begin)
    plain, none = Guided(net, prompt, start, 5, 0.0, None), net(prompt, start)[:, -1]
    torch.testing.assert_close(plain.logits, none, rtol=1e-9, atol=1e-9)
    u = net(empty_prompts(prompt), start)[:, -1]
    torch.testing.assert_close(Guided(net, prompt, start, 5, 3.0, None).logits, none + 3 * (none - u))
    empty = empty_prompts(prompt)
    torch.testing.assert_close(Guided(net, empty, start, 5, 3.0, None).logits, u, rtol=1e-9, atol=1e-9)


def test_clips_are_the_same_in_any_batch_and_depend_on_the_seed() -> None:
    net, prompt = network(), prompts([3, 2, 1], 3)
    options: dict[str, Any] = {"min_frames": 5, "max_frames": 12}
    together = generate(net, prompt, seed=3, **options)
    assert all(torch.equal(a, b) for a, b in zip(together, generate(net, prompt, seed=3, **options), strict=True))
    assert torch.equal(together[0], generate(net, prompt[:1], seed=3, **options)[0])
    assert torch.equal(together[0], generate(net, torch.cat([prompt[:1], prompt[2:]]), seed=3, **options)[0])
    assert not all(torch.equal(a, b) for a, b in zip(together, generate(net, prompt, seed=4, **options), strict=True))
    assert all(0 <= int(codes.min()) <= int(codes.max()) < V for codes in together)


def test_a_clip_does_not_depend_on_what_is_drawn_with_it() -> None:
    """Neither on how many are drawn at once, nor on the order, nor on how much of the others is given."""
    net, prompt = network(), prompts([3, 2, 1, 3, 0, 2, 3], 3)
    keep = torch.full((7, K, 5), NO_CODE)
    for clip, length in enumerate([0, 5, 2, 0, 1, 3, 5]):
        keep[clip, :, :length] = clip
    how, order = Drawing(temperature=5, min_seconds=2, max_seconds=20, seed=2), torch.tensor([6, 2, 4, 0, 3, 5, 1])
    for given in (None, keep):
        alone = [
            draw_codes(net, prompt[[i]], 1.0, how, keep=given if given is None else given[[i]], place=torch.tensor([i]))
            for i in range(7)
        ]
        assert len({codes.numel() for (codes,) in alone}) > 1  # they end where they like
        for size in (1, 2, 3, 64):
            found = draw_codes(net, prompt, 1.0, how, keep=given, batch_size=size)
            assert all(torch.equal(a, b) for a, (b,) in zip(found, alone, strict=True))
        mixed = draw_codes(net, prompt[order], 1.0, how, keep=given if given is None else given[order], place=order)
        assert all(torch.equal(a, alone[i][0]) for a, i in zip(mixed, order.tolist(), strict=True))


def test_a_drawn_clip_has_a_frame_and_one_that_goes_on_need_not_grow() -> None:
    how, given = Drawing(cfg=0.0, min_seconds=0, max_seconds=4), torch.full((2, K, 3), NO_CODE)
    given[1] = 5
    (new, old) = draw_codes(Counting([0, 1, 2], wish=0), prompts([2, 2], 2), 1.0, how, keep=given)
    assert new.tolist() == [[k] for k in range(K)]
    assert torch.equal(old, given[1])


def test_a_network_in_training_generates_as_in_evaluation_and_stays_in_training() -> None:
    net = network(unimoe_audio(num_experts=4, jitter=0.5), prompt_dropout=1.0)
    prompt = prompts([3], 3)
    wanted = generate(net, prompt, min_frames=5, max_frames=5)
    assert torch.equal(generate(net.train(), prompt, min_frames=5, max_frames=5)[0], wanted[0])
    assert net.training


def test_requests_that_do_not_fit_are_refused() -> None:
    net, prompt = network(), prompts([3], 3)
    for options, text in (
        ({"cfg_scale": -0.1}, "scale of 0 or more"),
        ({"min_frames": 5, "max_frames": 4}, "min_frames <= max_frames"),
        ({"continue_codes": torch.zeros(1, K + 1, 2, dtype=torch.int64)}, "3 codebooks"),
        ({"continue_codes": torch.full((1, K, 2), V)}, "encode with the tokenizer it was trained on"),
        ({"max_frames": torch.tensor([3, 3])}, "give one for each"),
        ({"place": torch.tensor([0, 1])}, "give one for each"),
    ):
        with pytest.raises(ValueError, match=text):
            generate(net, prompt, **options)
    assert generate(net, prompt[:0]) == []


def test_generation_is_faster_than_real_time_on_one_thread() -> None:
    facts = {**FACTS, "num_codebooks": 4, "num_codes": 256}
    net = AudioLM(facts, moe=unimoe_audio())  # the sizes of configs/unimoe_audio.yaml
    codes = batch_of([4], [True]).codes[:, :1].expand(-1, 4, -1)
    options: dict[str, Any] = {"continue_codes": codes, "min_frames": 40, "max_frames": 40}
    generate(net, prompts([3], 3), **options)
    start = time.process_time()
    generate(net, prompts([3], 3), **options)
    assert time.process_time() - start < 40 / 31.25  # frames of MelRVQ: 8000 samples per second, hop 256
