# SPDX-License-Identifier: Apache-2.0
"""Generation against the same written token by token, on networks whose logits hang on every token before.

The networks here draw their logits from a hash of the prompt and of all steps so far: one token elsewhere changes all.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tasks.audio.nets.delay import NO_CODE, DelayPattern
from tasks.audio.nets.generation import generate
from tasks.audio.nets.language_model import CodecLM
from tasks.audio.nets.sampling import Sampling


class Hashed(CodecLM):
    """Logits from a hash of the salt, the prompt, and every token so far."""

    def __init__(self, delay: DelayPattern, salt: int) -> None:
        super().__init__(delay)
        self.salt = salt

    def logits_of(self, prompt_S: Tensor, steps_KL: Tensor) -> Tensor:
        key = self.salt
        for value in [*prompt_S.tolist(), *steps_KL.T.flatten().tolist()]:
            key = (key * 1_000_003 + value + 7) % (2**61 - 1)
        generator = torch.Generator().manual_seed(key)
        return 2 * torch.randn(len(self.delay.delays), self.delay.num_tokens, generator=generator)

    @override
    def prefill(self, prompt_BS: Tensor, inputs_BKL: Tensor, *, room: int, domain: Tensor | None = None) -> Any:
        cache = [prompt_BS, inputs_BKL, room]
        return torch.stack([self.logits_of(*pair) for pair in zip(prompt_BS, inputs_BKL, strict=True)]), cache

    @override
    def step(self, token_BK: Tensor, cache: Any, domain: Tensor | None = None) -> Tensor:
        cache[1] = torch.cat([cache[1], token_BK[..., None]], -1)
        cache[2] -= 1
        assert cache[2] >= 0
        return torch.stack([self.logits_of(*pair) for pair in zip(cache[0], cache[1], strict=True)])


def one_by_one(net: Hashed, prompt: Tensor, given: Tensor, scale: float, least: int, most: int, best: bool) -> Tensor:
    """The best tokens of one clip, each book of each step in turn."""
    delays, size = net.delay.delays, net.delay.num_codes
    codes: list[list[int]] = [list(map(int, row)) for row in given]
    start, end = given.shape[1], given.shape[1] + most
    empty = torch.tensor([0] * (len(prompt) - 1) + [1])
    steps = [[size + 2] * len(delays)]
    while not all(len(book) >= end for book in codes):
        logits = net.logits_of(prompt, torch.tensor(steps).T)
        if scale > 0:
            logits = logits + scale * (logits - net.logits_of(empty, torch.tensor(steps).T))
        step = []
        for book, delay in enumerate(delays):
            frame = len(steps) - delay - 1
            if frame < 0:
                step.append(size + 2)
            elif frame >= end:
                step.append(size if frame == end else size + 1)
            elif frame < start:
                step.append(codes[book][frame])
            else:
                allowed = logits[book, :size].tolist()
                stops = (
                    book == 0 and start + least <= frame and (not best or int(logits[0, : size + 1].argmax()) == size)
                )
                token = max(range(size), key=allowed.__getitem__)
                if stops and float(logits[0, size]) > allowed[token]:
                    token, end = size, frame
                else:
                    codes[book].append(token)
                step.append(token)
        steps.append(step)
    return torch.tensor([book[:end] for book in codes]).reshape(len(delays), end)


def case(seed: int) -> tuple[Hashed, Tensor, Tensor | None, dict[str, Any]]:
    """A network, prompts, clips to go on with (or None), and options."""
    draw = random.Random(seed)
    books, clips = draw.randint(1, 4), draw.randint(1, 3)
    net = Hashed(DelayPattern([0, *(draw.randint(0, 4) for _ in range(books - 1))], draw.randint(1, 5)), seed)
    prompt = torch.tensor([[draw.randint(3, 9) for _ in range(3)] for _ in range(clips)])
    most = draw.randint(1, 6)
    options = {"cfg_scale": draw.choice([0.0, 0.7]), "max_frames": most, "min_frames": draw.randint(0, most)}
    options["end_if_best"] = draw.random() < 0.3
    given = torch.full((clips, books, draw.randint(0, 5)), NO_CODE)
    for clip in given:
        for frame in range(draw.randint(0, given.shape[2])):
            clip[:, frame] = torch.tensor([draw.randrange(net.delay.num_codes) for _ in range(books)])
    return net, prompt, given if draw.random() < 0.7 else None, options


@pytest.mark.parametrize("seed", range(40))
def test_the_best_tokens_are_those_found_one_by_one(seed: int) -> None:
    net, prompt, given, options = case(seed)

    found = generate(net, prompt, continue_codes=given, temperature=0, **options)

    for place, clip in enumerate(found):
        start = torch.zeros(len(net.delay.delays), 0) if given is None else given[place]
        start = start[:, : int((start[0] != NO_CODE).sum())]
        scale, best = options["cfg_scale"], options["end_if_best"]
        expected = one_by_one(net, prompt[place], start, scale, options["min_frames"], options["max_frames"], best)
        assert torch.equal(clip, expected)


@pytest.mark.parametrize("seed", range(20))
def test_a_clip_is_drawn_alike_alone_and_among_others(seed: int) -> None:
    net, prompt, given, options = case(100 + seed)

    among = generate(net, prompt, continue_codes=given, seed=seed, **options)[0]
    if given is not None:
        given = given[:1, :, : int((given[0, 0] != NO_CODE).sum())]

    assert torch.equal(generate(net, prompt[:1], continue_codes=given, seed=seed, **options)[0], among)


@pytest.mark.parametrize("hole", [(0, 1), (1, 1), (1, 3)])
def test_a_clip_with_a_hole_is_refused(hole: tuple[int, int]) -> None:
    net = Hashed(DelayPattern([0, 1], 5), 0)
    given = torch.ones(1, 2, 4, dtype=torch.int64)
    given[0, hole[0], hole[1]] = NO_CODE

    with pytest.raises(ValueError, match="a clip with a hole: -1 may stand only after a clip's end"):
        generate(net, torch.ones(1, 3, dtype=torch.int64), continue_codes=given)


def test_a_network_that_diverged_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Hashed(DelayPattern([0, 1], 5), 0)
    monkeypatch.setattr(net, "logits_of", lambda *_: torch.full((2, 8), float("nan")))

    with pytest.raises(ValueError, match="logits are not finite: its training diverged"):
        generate(net, torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), -0.5])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="cfg_scale="):
        generate(Hashed(DelayPattern([0], 5), 0), torch.ones(1, 3, dtype=torch.int64), cfg_scale=scale)


@pytest.mark.parametrize("temperature", [1e-3, 1e-40])
def test_the_coldest_draw_is_the_best_token(temperature: float) -> None:
    logits = torch.tensor([[0.1, 3.0, float("-inf"), 2.0], [-5.0, -6.0, float("-inf"), -7.0]])

    for uniform in (0.0, 0.5, 0.999):
        assert Sampling(temperature).draw(logits, torch.full((2,), uniform)).tolist() == [1, 0]
