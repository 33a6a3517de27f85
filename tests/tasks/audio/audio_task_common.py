# SPDX-License-Identifier: Apache-2.0
"""A few generated clips in two books of sixteen codes, and a network that learns nothing in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from moeapps.moe.presets import unimoe_audio
from tasks.audio.data.generated import GeneratedAudio
from tasks.audio.datamodule import AudioData
from tasks.audio.model import AudioLM
from tasks.audio.module import AudioTask
from tasks.audio.nets.tokenizers import MelRVQ

MOE: dict[str, Any] = {"num_experts": 3, "num_null": 1, "num_shared": 1}


def small_data(cache: Path, **options: Any) -> AudioData:
    """Eight domains with three test clips each, prepared."""
    source = GeneratedAudio(train_speech=6, train_music=4, val=3, test=3)
    tokenizer = MelRVQ(num_codebooks=2, num_codes=16)
    data = AudioData(source=source, tokenizer=tokenizer, cache_dir=cache, **{"batch_size": 4, **options})
    data.prepare_data()
    return data


def small_net(facts: dict[str, Any], **options: Any) -> AudioLM:
    return AudioLM(facts, moe=unimoe_audio(**MOE), **{"dim": 16, "depth": 2, "num_heads": 2, **options})


def small_task(data: AudioData, **options: Any) -> AudioTask:
    return AudioTask(net=small_net, facts=data.facts, **options)


def trainer(folder: Path, *given: L.Callback, epochs: int = 1, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=2,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
        callbacks=list(given),
        **{"logger": False, **options},
    )
