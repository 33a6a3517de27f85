# SPDX-License-Identifier: Apache-2.0
"""A training step of ProMoE, and of its dense twin, beside one of diffusers' diffusion transformer of equal FLOPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import promoe_speed
from benchmarks.peers.rows import Race, Work
from moeapps.data.images.batch import ImageBatch
from tasks.image_diffusion.module import ImageDiffusionTask


def promoe() -> Race:
    """The whole step of configs/promoe.yaml: recording and the loss on its routing included."""
    task, batch = promoe_speed.build()
    return Race(promoe_speed.train_step(task, batch), their_step(task, batch), _equal(batch))


def dense() -> Race:
    """The dense twin of equal active FLOPs: what the blocks themselves cost."""
    task, batch = promoe_speed.build(promoe_speed.DENSE)
    return Race(promoe_speed.train_step(task, batch), their_step(task, batch), _equal(batch))


def _equal(batch: ImageBatch) -> str:
    return (
        f"{len(batch.label)} images of 28 x 28, patches of 4, width 128, 4 blocks; flow, clipping and AdamW; theirs "
        "embeds time and class anew in each block"
    )


def their_step(task: ImageDiffusionTask, batch: ImageBatch) -> Work:
    """Rectified flow with diffusers' network of the same width, depth, heads and patches."""
    from diffusers import DiTTransformer2DModel

    ours = task.net
    net: nn.Module = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=ours.dim // 4,
        in_channels=ours.channels,
        out_channels=ours.channels,
        num_layers=len(ours.blocks),
        sample_size=ours.image_size,
        patch_size=ours.patch_size,
        num_embeds_ada_norm=ours.num_classes,
    ).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    image, label = batch.image, batch.label

    def step() -> None:
        optimizer.zero_grad()
        time = torch.sigmoid(torch.randn(len(label)))
        noise = torch.randn_like(image)
        at = time[:, None, None, None]
        found = net(at * noise + (1 - at) * image, timestep=1000 * time, class_labels=label).sample
        F.mse_loss(found, noise - image).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return step
