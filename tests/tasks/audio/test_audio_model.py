# SPDX-License-Identifier: Apache-2.0
"""The network: against a loop over rows, its cache, what a row may see, what padding changes (nothing)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from audio_net_common import DENSE, FACTS, MOE, SYMBOLS, K, V, batch_of, network, prompts
from torch import Tensor

from moeapps.moe import LayerFactory, MoERecorder, Routing
from moeapps.moe.presets import linear
from tasks.audio.data.batch import NO_CODE
from tasks.audio.data.prompt import EMPTY
from tasks.audio.model import AudioLM
from tasks.audio.nets.language_model import IGNORED, empty_prompts


def naive(net: AudioLM, prompt: list[int], steps_LK: list[list[int]]) -> Tensor:
    """Logits [L, K, V + 3] of one clip without padding, row by row, with complex numbers for the rotation."""
    tokens = net.tokens.weight.view(K, V + 3, -1)
    x = [net.symbols.weight[s] for s in prompt]
    x += [sum((tokens[k, t] for k, t in enumerate(step)), torch.zeros(())) for step in steps_LK]
    half = net.head_dim // 2

    def normed(v: Tensor, weight: Tensor) -> Tensor:
        return v / (v.square().mean() + 1e-6).sqrt() * weight

    for block in net.blocks:
        attn = block.attn
        seen: list[tuple[list[Tensor], list[Tensor]]] = []
        out = []
        for place, v in enumerate(x):
            parts = (attn.qkv.weight @ normed(v, block.norm1.weight)).view(-1, net.head_dim)
            turn = torch.polar(torch.ones(half).double(), place * net.theta ** (-torch.arange(half).double() / half))

            def turned(h: Tensor, turn: Tensor = turn) -> Tensor:
                z = torch.complex(h[:half], h[half:]) * turn
                return torch.cat([z.real, z.imag])

            heads, groups = attn.num_heads, attn.num_kv_heads
            seen.append(
                (
                    [turned(parts[heads + g]) for g in range(groups)],
                    [parts[heads + groups + g] for g in range(groups)],
                )
            )
            joined = []
            for h in range(heads):
                g = h // (heads // groups)
                q = turned(parts[h])
                score = torch.stack([q @ keys[g] for keys, _ in seen]) / math.sqrt(net.head_dim)
                joined.append(sum(w * values[g] for w, (_, values) in zip(score.softmax(0), seen, strict=True)))
            out.append(v + attn.out.weight @ torch.cat(joined))
        x = [v + block.ffn(normed(v, block.norm2.weight).unsqueeze(0))[0] for v in out]
    return torch.stack([(net.head.weight @ normed(v, net.norm.weight)).view(K, V + 3) for v in x[len(prompt) :]])


@pytest.mark.parametrize(("moe", "kv"), [(MOE, None), (DENSE, 1), (linear(), 2)])
def test_logits_are_those_of_a_loop_over_rows(moe: LayerFactory, kv: int | None) -> None:
    net = network(moe, num_heads=4, num_kv_heads=kv)
    batch = batch_of([5], [True])
    inputs, _ = net.targets(batch)
    found = net(batch.prompt[:, 1:], inputs)
    torch.testing.assert_close(
        found[0], naive(net, batch.prompt[0, 1:].tolist(), inputs[0].T.tolist()), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("delays", [[0, 1, 2], [0, 3, 4]])
def test_a_code_is_seen_from_its_step_on_and_never_before(delays: list[int]) -> None:
    net = network(delays=delays)
    batch = batch_of([6], [True])
    inputs, _ = net.targets(batch)
    before = net(batch.prompt, inputs)
    for book, frame in ((0, 3), (1, 2), (2, 5)):
        changed = batch.codes.clone()
        changed[0, book, frame] = (changed[0, book, frame] + 1) % V
        other, _ = net.targets(type(batch)(changed, batch.prompt, batch.ends, batch.domain, batch.index))
        after = net(batch.prompt, other)
        at = frame + delays[book] + 1
        assert torch.equal(before[:, :at], after[:, :at])
        moved = (before - after).abs().amax((0, 2, 3))
        assert at >= inputs.shape[-1] or moved[at] > 1e-6


@pytest.mark.parametrize("moe", [MOE, DENSE])
def test_padding_and_batch_mates_change_nothing(moe: LayerFactory) -> None:
    net = network(moe)
    batch = batch_of([7, 3, 5], [True, True, False])
    prompt = prompts([4, 1, 0], 4)
    inputs, target = net.targets(batch)
    together = net(prompt, inputs)
    for b, (frames, symbols) in enumerate(((7, 4), (3, 1), (5, 0))):
        own = type(batch)(*(getattr(batch, name)[b : b + 1] for name in ("codes", "prompt", "ends", "domain", "index")))
        own = type(batch)(own.codes[..., :frames], own.prompt, own.ends, own.domain, own.index)
        alone_inputs, alone_target = net.targets(own)
        alone = net(prompt[b : b + 1, 4 - symbols :], alone_inputs)
        wanted = alone_target[0] != IGNORED
        length = alone.shape[1]
        assert torch.equal(target[b, :length][wanted], alone_target[0][wanted])
        torch.testing.assert_close(together[b, :length][wanted], alone[0][wanted], rtol=1e-9, atol=1e-9)


def test_padding_goes_to_no_expert_and_rows_are_prompt_then_steps() -> None:
    net = network()
    batch = batch_of([7, 3], [True, False])
    prompt = prompts([4, 1], 4)
    inputs, _ = net.targets(batch)
    with MoERecorder() as recorder:
        net(prompt, inputs, torch.tensor([2, 0]))
    record = recorder.records[0]
    assert isinstance(record.routing, Routing)
    real = torch.cat([prompt != 0, (inputs != net.delay.pad).any(1)], 1).flatten()
    assert torch.equal(record.token_mask, real)
    assert not record.routing.assignment().view(2 * (4 + inputs.shape[-1]), -1)[~real].any()
    # The shorter clip: begin, 3 frames, and 2 steps more until its last book is done.
    assert real.view(2, -1)[1, 4:].sum() == 1 + 3 + 2
    assert torch.equal(record.group, torch.tensor([2, 0]).repeat_interleave(4 + inputs.shape[-1]))


@pytest.mark.parametrize("kv", [None, 1])
@pytest.mark.parametrize("moe", [MOE, DENSE])
def test_steps_with_a_cache_are_the_full_forward(moe: LayerFactory, kv: int | None) -> None:
    net = network(moe, num_kv_heads=kv)
    batch = batch_of([6, 6], [True, True])
    prompt = prompts([4, 1], 4)
    inputs, _ = net.targets(batch)
    full = net(prompt, inputs)
    for first in (1, 4):
        logits, cache = net.prefill(prompt, inputs[..., :first], room=inputs.shape[-1] - first)
        for at in range(first, inputs.shape[-1] + 1):
            torch.testing.assert_close(logits, full[:, at - 1], rtol=1e-9, atol=1e-9)
            if at < inputs.shape[-1]:
                logits = net.step(inputs[..., at], cache)
    with pytest.raises(ValueError, match="room for"):
        net.step(inputs[..., 0], cache)


def test_the_first_loss_is_that_of_knowing_nothing() -> None:
    net = AudioLM(FACTS, moe=MOE, dim=32)
    batch = batch_of([40] * 8, [False] * 8)
    inputs, target = net.targets(batch)
    loss = F.cross_entropy(net(batch.prompt, inputs).flatten(0, 2), target.flatten())
    assert loss.item() == pytest.approx(math.log(V + 3), abs=0.05)


def test_training_empties_the_share_of_prompts_it_is_told() -> None:
    net = network(prompt_dropout=0.3)
    prompt = prompts([3] * 4000, 4)
    assert net.dropped(prompt) is prompt
    kept = (net.train().dropped(prompt) == prompt).all(1)
    assert 1 - float(kept.double().mean()) == pytest.approx(0.3, abs=0.03)
    emptied = net.dropped(prompt)[~(net.dropped(prompt) == prompt).all(1)]
    assert set(map(tuple, emptied.tolist())) <= {(0, 0, 0, EMPTY), *map(tuple, prompt.tolist())}
    assert empty_prompts(prompt)[0].tolist() == [0, 0, 0, EMPTY]
    assert net.dropped(prompt[:, :0]).shape == (4000, 0)


def test_clips_without_frames_and_prompts_without_symbols_have_a_result() -> None:
    net = network()
    batch = batch_of([1], [True])
    codes = torch.full_like(batch.codes, NO_CODE)[..., :0]
    inputs, target = net.targets(type(batch)(codes, batch.prompt, batch.ends, batch.domain, batch.index))
    assert net(batch.prompt[:, :0], inputs).isfinite().all()
    assert target[target != IGNORED].tolist() == [V]  # an empty clip ends at once


def test_all_parameters_learn() -> None:
    net = network().train()
    batch = batch_of([9] * 12, [True] * 12)
    inputs, target = net.targets(batch)
    F.cross_entropy(net(torch.randint(3, SYMBOLS, (12, 5)), inputs).flatten(0, 2), target.flatten()).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
    assert [name for name, p in net.named_parameters() if not bool(p.grad.any())] == []


def test_sizes_that_do_not_fit_are_refused() -> None:
    for options, text in (
        ({"delays": [0, 1]}, "3 codebooks"),
        ({"dim": 15}, "multiple of twice num_heads=2"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_kv_heads": 3}, "must divide num_heads"),
        ({"depth": 0}, "depth=0"),
        ({"prompt_dropout": 1.5}, "share in"),
    ):
        with pytest.raises(ValueError, match=text):
            network(**options)
