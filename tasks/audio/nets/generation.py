# SPDX-License-Identifier: Apache-2.0
"""Audio from a prompt, or the continuation of a clip: step by step, with guidance, until the first book ends.

Shape legend: B clips, K codebooks, T frames, L steps, S symbols of a prompt, V codes of a book.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.audio.nets.delay import NO_CODE, DelayPattern
from tasks.audio.nets.language_model import CodecLM, empty_prompts
from tasks.audio.nets.sampling import Sampling


@torch.no_grad()
def generate(
    net: CodecLM,
    prompt_BS: Tensor,
    *,
    continue_codes: Tensor | None = None,
    domain: Tensor | None = None,
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = 45,
    top_p: float = 1.0,
    min_frames: int | Tensor = 0,
    max_frames: int | Tensor = 96,
    end_if_best: bool = False,
    seed: int = 0,
    place: Tensor | None = None,
) -> list[Tensor]:
    """Codes of new clips.

    A clip draws by numbers of its own that depend on the seed and its place alone, so that it is the same in any batch.

    Args:
        net: in training mode, it is put into evaluation mode meanwhile.
        prompt_BS: symbols, 0 at the left of a shorter one.
        continue_codes: int64 [B, K, T], `NO_CODE` beyond a clip's end: the clips to go on with; None starts afresh.
        domain: int64 [B], for networks that have something of their own for each domain.
        cfg_scale: s in c + s (c - u), with c the logits and u those of an empty prompt; 0 is no guidance.
        temperature: of the draws; 0 takes the best token.
        top_k: only the k best tokens can be drawn; None means all.
        top_p: only the fewest tokens that hold this probability can be drawn.
        min_frames: new frames before a clip may end, one number or int64 [B]; with 0 it may have none.
        max_frames: new frames after which it ends in any case, one number or int64 [B].
        end_if_best: end only where that is the first book's best token (as released), not whenever it is drawn.
        seed: of the draws.
        place: int64 [B], number of each clip among all that share the seed; None counts those given.

    Returns:
        One int64 [K, T_b] per clip: the frames given and the new ones, real codes only.

    Raises:
        ValueError: a negative scale, frames that do not fit each other, codes, domains or places for another number of
            clips, clips with holes, or a network whose logits are not finite.

    Source: UniMoE-Audio (docs/papers/unimoe_audio.md, equations 12 to 14). Differs: the logit of the end is not
        multiplied by 0.6 for music, which raises it where it is negative.
    """
    least_B, most_B = (_of_each(frames, prompt_BS, "frames") for frames in (min_frames, max_frames))
    if not 0 <= cfg_scale < float("inf") or not bool(((least_B >= 0) & (least_B <= most_B) & (most_B >= 1)).all()):
        raise ValueError(
            f"cfg_scale={cfg_scale}, min_frames={min_frames}, max_frames={max_frames}: use a scale of 0 or more, and "
            "0 <= min_frames <= max_frames with at least 1"
        )
    if not len(prompt_BS):
        return []
    given_BKT = _given(continue_codes, prompt_BS, net.delay)
    place_B = torch.arange(len(prompt_BS)) if place is None else _of_each(place, prompt_BS, "place")
    draws = Draws(
        net.delay, given_BKT, Sampling(temperature, top_k, top_p), least_B, most_B, end_if_best, seed, place_B.tolist()
    )
    with _evaluating(net):
        guided = Guided(net, prompt_BS, draws.known(), draws.num_steps, cfg_scale, domain)
        if not guided.logits.isfinite().all():
            raise ValueError("the network's logits are not finite: its training diverged; take an earlier checkpoint")
        while not draws.add(guided.logits):
            guided.step(draws.last)
    return draws.codes()


class Guided:
    """A network with guidance: the prompts and, with a scale above 0, empty ones beside them.

    Args:
        net: the network.
        prompt_BS: symbols.
        inputs_BKL: the steps to start from.
        num_steps: steps there may be in the end.
        scale: s.
        domain: int64 [B] or None.

    Source: docs/papers/unimoe_audio.md, equation 12.
    """

    def __init__(
        self,
        net: CodecLM,
        prompt_BS: Tensor,
        inputs_BKL: Tensor,
        num_steps: int,
        scale: float,
        domain: Tensor | None,
    ) -> None:
        self.net, self.scale, self.twice = net, scale, scale > 0
        prompt_BS = torch.cat([prompt_BS, empty_prompts(prompt_BS)]) if self.twice else prompt_BS
        self.domain = domain if domain is None else self._both(domain)
        room = num_steps - inputs_BKL.shape[-1]
        logits, self.cache = net.prefill(prompt_BS, self._both(inputs_BKL), room=room, domain=self.domain)
        self.logits = self._joined(logits)

    def step(self, token_BK: Tensor) -> None:
        """Go one step further."""
        self.logits = self._joined(self.net.step(self._both(token_BK), self.cache, self.domain))

    def _both(self, values: Tensor) -> Tensor:
        return torch.cat([values, values]) if self.twice else values

    def _joined(self, logits: Tensor) -> Tensor:
        if not self.twice:
            return logits
        conditional, empty = logits.chunk(2)
        return conditional + self.scale * (conditional - empty)


class Draws:
    """The steps of B clips while they grow: what is given, what is drawn, and when each ends.

    Book c of a clip ends D_c steps after the first, and the clip is whole when the last book has its last code.

    Args:
        delay: the pattern.
        given_BKT: codes to go on with.
        sampling: how tokens are drawn.
        least_B: new frames before a clip may end.
        most_B: new frames after which it ends.
        end_if_best: whether the end must be the best token.
        seed: of the draws.
        place: number of each clip among all that share the seed.

    Source: docs/papers/unimoe_audio.md, equation 14.
    """

    def __init__(
        self,
        delay: DelayPattern,
        given_BKT: Tensor,
        sampling: Sampling,
        least_B: Tensor,
        most_B: Tensor,
        end_if_best: bool,
        seed: int,
        place: list[int],
    ) -> None:
        self.delay, self.sampling, self.end_if_best = delay, sampling, end_if_best
        device = given_BKT.device
        self.length_B = (given_BKT[:, 0] != NO_CODE).sum(-1)
        self.first_end_B, self.end_B = self.length_B + least_B, self.length_B + most_B
        room = F.pad(given_BKT, (0, max(0, int(self.end_B.max()) - given_BKT.shape[-1])), value=NO_CODE)
        self.given_BKL = delay.apply(room, torch.zeros(len(given_BKT), dtype=torch.bool, device=device))
        self.num_steps = self.given_BKL.shape[-1]
        self.frame_KL = delay.frames(self.num_steps, device)
        self.uniform_BLK = _uniform(place, self.num_steps, len(delay.delays), seed).to(device)
        self.never_KX = torch.ones(len(delay.delays), delay.num_tokens, dtype=torch.bool, device=device)
        self.never_KX[:, : delay.num_codes] = self.never_KX[0, delay.end] = False
        self.steps: list[Tensor] = list(self.known().unbind(-1))

    def known(self) -> Tensor:
        """The first steps, all books of which are given: [B, K, L]."""
        return self.given_BKL[..., : int(self.length_B.min()) + 1]

    @property
    def last(self) -> Tensor:
        """The newest step [B, K]."""
        return self.steps[-1]

    def allowed(self, logits_BKX: Tensor) -> Tensor:
        """Logits of the next step; minus infinity for all but codes and, in its time, the end of the first book."""
        frame = self.frame_KL[0, len(self.steps)]
        logits_BKX = logits_BKX.masked_fill(self.never_KX, float("-inf"))
        may_end_B = (frame >= self.first_end_B) & (frame < self.end_B)
        if self.end_if_best:
            may_end_B &= logits_BKX[:, 0].argmax(-1) == self.delay.end
        logits_BKX[:, 0, self.delay.end].masked_fill_(~may_end_B, float("-inf"))
        return logits_BKX

    def add(self, logits_BKX: Tensor) -> bool:
        """Draw one step, and tell whether all clips are whole."""
        at = len(self.steps)
        frame_K = self.frame_KL[:, at]
        token_BK = self.sampling.draw(self.allowed(logits_BKX), self.uniform_BLK[:, at])
        new_B1 = frame_K >= self.length_B.unsqueeze(-1)
        token_BK = token_BK.where(new_B1, self.given_BKL[..., at])  # what is given, and the begin of delayed books
        ended_B = (token_BK[:, 0] == self.delay.end) & (frame_K[0] < self.end_B)
        self.end_B = frame_K[0].where(ended_B, self.end_B)
        end_B1 = self.end_B.unsqueeze(-1)
        token_BK = token_BK.masked_fill(frame_K == end_B1, self.delay.end).masked_fill(frame_K > end_B1, self.delay.pad)
        self.steps.append(token_BK)
        return bool((frame_K.min() >= self.end_B - 1).all())

    def codes(self) -> list[Tensor]:
        """Codes [K, T_b] of each clip."""
        steps_BKL = torch.stack(self.steps, -1)
        steps_BKL = F.pad(steps_BKL, (0, self.num_steps - steps_BKL.shape[-1]), value=self.delay.pad)
        codes_BKT = self.delay.revert(steps_BKL)
        return [codes_KT[:, :end] for codes_KT, end in zip(codes_BKT, self.end_B.tolist(), strict=True)]


def _given(codes: Tensor | None, prompt_BS: Tensor, delay: DelayPattern) -> Tensor:
    if codes is None:
        return torch.zeros(len(prompt_BS), len(delay.delays), 0, dtype=torch.int64, device=prompt_BS.device)
    if codes.ndim != 3 or codes.shape[:2] != (len(prompt_BS), len(delay.delays)):
        raise ValueError(
            f"continue_codes has the shape {tuple(codes.shape)}; {len(prompt_BS)} prompts and {len(delay.delays)} "
            f"codebooks ask for ({len(prompt_BS)}, {len(delay.delays)}, frames)"
        )
    if codes.numel() and not NO_CODE <= int(codes.min()) <= int(codes.max()) < delay.num_codes:
        raise ValueError(
            f"continue_codes has codes from {int(codes.min())} to {int(codes.max())}, but the network knows 0 to "
            f"{delay.num_codes - 1} (and {NO_CODE} after a clip's end); encode with the tokenizer it was trained on"
        )
    inside_BKT = codes != NO_CODE
    if not torch.equal(inside_BKT, inside_BKT.all(1, keepdim=True).cumprod(-1).bool().expand_as(inside_BKT)):
        raise ValueError(
            f"continue_codes has a clip with a hole: {NO_CODE} may stand only after a clip's end, in all books alike"
        )
    return codes


def _of_each(values: int | Tensor, prompt_BS: Tensor, name: str) -> Tensor:
    """One number for each clip, int64 [B]."""
    found = torch.as_tensor(values, device=prompt_BS.device)
    if found.ndim > 1 or (found.ndim == 1 and len(found) != len(prompt_BS)):
        raise ValueError(f"{name}: {tuple(found.shape)} numbers for {len(prompt_BS)} prompts; give one for each")
    return found.expand(len(prompt_BS))


def _uniform(place: list[int], num_steps: int, num_books: int, seed: int) -> Tensor:
    """Numbers in [0, 1), [B, L, K]; those of a clip depend on the seed and its place alone, however many steps."""
    generators = [torch.Generator().manual_seed(1_000_003 * seed + number) for number in place]
    return torch.stack([torch.rand(num_steps, num_books, generator=generator) for generator in generators])


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)
