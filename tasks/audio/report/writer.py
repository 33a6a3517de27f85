# SPDX-License-Identifier: Apache-2.0
"""Answers of ``predict`` as files to hear."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moeapps.training.callbacks import PredictionWriter
from tasks.audio.report.clips import Heard, write_clips
from tasks.audio.report.drawing import sounds


class ClipWriter(PredictionWriter):
    """Write ``predictions/<domain>/batch-<k>/<index>.wav``, .png and .txt of every clip, and index.html beside them."""

    def written(self, domain: str) -> str:
        """The files of every clip, and the page of every batch."""
        return rf"{re.escape(domain)}/batch-\d+/(?:index\.html|\d+\.(?:wav|png|txt))"

    def save(self, folder: Path, domain: str, number: int, prediction: Any, data: Any) -> None:
        """Write one batch of a domain."""
        waves = sounds(data.tokenizer, prediction["codes"])
        rate, clips = data.facts["sample_rate"], []
        for row, wave in enumerate(waves):
            name = f"{int(prediction['index'][row]):05d}"
            prompt = data.vocabulary.decode([s for s in prediction["prompt"][row].tolist() if s])
            clips.append(Heard(name, wave, prompt, float(prediction["kept"][row]) / data.facts["frame_rate"]))
        write_clips(folder / domain / f"batch-{number:05d}", clips, rate, title=f"{domain}, batch {number}")
