# SPDX-License-Identifier: Apache-2.0
"""Steps of UniMoE-Audio and AudioCraft: delays, the codec loss, and what each token weighs in a draw.

Read in HITsz-TMG/Uni-MoE ``UniMoE-Audio/utils`` and facebookresearch/audiocraft; written as loops over books and steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from official_common import furthest, part
from torch import Tensor

from tasks.audio.losses import code_nats, codec_loss
from tasks.audio.nets.delay import NO_CODE, DelayPattern, audiocraft, unimoe
from tasks.audio.nets.generation import Draws, Guided
from tasks.audio.nets.language_model import CodecLM, step_targets
from tasks.audio.nets.sampling import Sampling

V, K, T = 16, 5, 9
END, PAD, BEGIN = V, V + 1, V + 2


def there_and_back(delays: list[int], wanted_KL: list[list[int]], codes_KT: Tensor, alike: set[int]) -> float:
    """Differences of steps, where all ids of ``alike`` are one, and of the codes that come back."""
    pattern = DelayPattern(delays, V)
    steps = pattern.apply(codes_KT.unsqueeze(0), torch.tensor([True]))
    found = steps[0].clone()
    for special in alike:
        found[found == special] = PAD
    back = (pattern.revert(steps)[0] - codes_KT).abs().max()
    return float(torch.maximum((found - torch.tensor(wanted_KL)).abs().max(), back))


@part("delay pattern of UniMoE-Audio, there and back")
def delay_of_unimoe() -> float:
    codes, delays = torch.randint(0, V, (K, T)), unimoe(K)
    length = T + max(delays) + 1
    wanted = [[0] * length for _ in range(K)]
    for c in range(K):
        start = delays[c] + 1
        for step in range(length):
            if step < start:
                wanted[c][step] = BEGIN
            elif step < start + T:
                wanted[c][step] = int(codes[c, step - start])
            else:
                wanted[c][step] = END if step == start + T else PAD
    # Back: the begin is cut off, book c is read D_c later, and the last steps, which hold no whole frame, are dropped.
    spoken = [row[1:] for row in wanted]
    back = [[spoken[c][min(t + delays[c], length - 2)] for t in range(length - 1)] for c in range(K)]
    assert [row[: -max(delays)] for row in back] == codes.tolist()
    return there_and_back(delays, wanted, codes, set())


@part("delay pattern of AudioCraft, there and back")
def delay_of_audiocraft() -> float:
    codes, delays = torch.randint(0, V, (K, T)), audiocraft(K)
    layout: list[list[tuple[int, int]]] = [[]]
    for t in range(T + max(delays)):
        layout.append([(t - delay, q) for q, delay in enumerate(delays) if t - delay >= 0])
    wanted = [[PAD] * len(layout) for _ in range(K)]
    for step, places in enumerate(layout):
        for t, q in places:
            if t < T:
                wanted[q][step] = int(codes[q, t])
    return there_and_back(delays, wanted, codes, {END, BEGIN})


@part("codec loss of UniMoE-Audio")
def loss_of_unimoe() -> float:
    codes = torch.randint(0, V, (3, K, T))
    codes[1, :, 4:] = NO_CODE
    ends = torch.tensor([True, True, False])
    delay = DelayPattern(unimoe(K), V)
    inputs, target = step_targets(delay, codes, ends)
    logits = torch.randn(3, inputs.shape[-1], K, V + 3, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for c in range(K):  # of every channel a mean over its labels; an end is a label of the first one alone
        steps = delay.apply(codes, ends)[:, c, 1:]
        label = steps.masked_fill(steps > END if c == 0 else steps >= END, -100)
        total = total + F.cross_entropy(logits[:, :, c].flatten(0, 1), label.flatten())
    return furthest(codec_loss(code_nats(logits, target), target), total, [logits])


class Given(CodecLM):
    """Answers with the logits that it was given, those with a prompt first."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(DelayPattern([0] * K, V))
        self.given = logits

    def prefill(
        self, prompt_BS: Tensor, inputs_BKL: Tensor, *, room: int, domain: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        return self.given, None


def next_token(c: Tensor, u: Tensor, scale: float, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities [B, K, X] of the next tokens, a book at a time."""
    logits = c + scale * (c - u)
    logits[:, :, END + 1 :] = -torch.inf
    logits[:, 1:, END:] = -torch.inf
    rows = []
    for row in logits.flatten(0, 1) / temperature:
        if int(row.argmax()) != END:
            row[END] = -torch.inf
        best = row.topk(top_k).indices.tolist()
        row = torch.stack([x if i in best else torch.tensor(-torch.inf) for i, x in enumerate(row)])
        order = row.softmax(0).sort(descending=True)
        before = torch.zeros((), dtype=row.dtype)
        for share, index in zip(order.values, order.indices, strict=True):
            if before > top_p:
                row[index] = -torch.inf
            before = before + share
        rows.append(row.softmax(0))
    return torch.stack(rows).view_as(logits)


@part("guidance and draws of UniMoE-Audio: what each token weighs")
def draws_of_unimoe() -> float:
    clips, worst = 30, 0.0
    for scale, temperature, top_k, top_p in ((0.0, 1.0, V, 1.0), (1.0, 1.2, 6, 0.8), (3.0, 0.7, V, 0.5)):
        c, u = (torch.randn(clips, K, V + 3, dtype=torch.float64) * 2 for _ in range(2))
        c[:, 0, END] += 3.0
        net = Given(torch.cat([c, u]) if scale else c)
        sampling = Sampling(temperature, top_k, top_p)
        nothing = torch.zeros(clips, K, 0, dtype=torch.int64)
        least, most = torch.zeros(clips, dtype=torch.int64), torch.full((clips,), 4)
        draws = Draws(net.delay, nothing, sampling, least, most, end_if_best=True, seed=0, place=list(range(clips)))
        prompt = torch.ones(clips, 1, dtype=torch.int64)
        guided = Guided(net, prompt, draws.known(), draws.num_steps, scale, None)
        share, index = sampling.ranked(draws.allowed(guided.logits))
        found = torch.zeros_like(c).scatter(-1, index, share / share.sum(-1, keepdim=True))
        wanted = next_token(c, u, scale, temperature, top_k, top_p)
        assert (wanted[:, 0, END] > 0).any(), "no end was possible: its rule was not tried"
        worst = max(worst, furthest(found, wanted))
    return worst
