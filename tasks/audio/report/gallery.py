# SPDX-License-Identifier: Apache-2.0
"""What a report page shows of a run of this task, from the files of its run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeapps.bounds import read_json, read_text
from moeapps.reporting.exhibits import Plot, Room, Sound, picture_of, sound_of
from moeapps.reporting.plots import axes, lines

METRICS = {
    "bits_0": "bits that the network needs for a code of the first codebook of real clips; one that knows nothing "
    "needs log2 of their number, 8 for 256",
}
"""What the scores are that a page compares runs by."""
MOST_CLIPS = 16
"""Clips of a page: each is some hundred kilobytes."""


def gallery(folder: Path) -> list[Room]:
    """Clips to play beside real ones, and where experts work over a clip."""
    rooms = []
    clips = _clips(folder / "samples" / "test")
    if clips:
        text = (
            "Clips that the model drew for the prompt below each name. Beside each is the real clip of that prompt, as "
            "the codec gives it back: the best that any model of these codes can sound like."
        )
        rooms.append(Room("Listen", text, clips))
    file = folder / "metrics" / "capacity.json"
    if file.is_file():
        plots = _capacity(read_json(file)["layers"])
        text = "How many experts work on a step of a clip, and how often none does: means over the layers."
        rooms.append(Room("Where capacity goes", text, plots))
    return rooms


def _clips(folder: Path) -> list[Sound]:
    """First one of each domain, then the second; a real one after each drawn one."""
    drawn = [file for file in folder.glob("*.wav") if not file.stem.endswith("-real")]
    in_turn = sorted(drawn, key=lambda file: (file.stem.rpartition("-")[2], file.stem))[: MOST_CLIPS // 2]
    found = []
    for file in in_turn:
        for one, kind in ((file, "drawn"), (file.with_name(f"{file.stem}-real.wav"), "real, through the codec")):
            if one.is_file():
                prompt, picture = one.with_suffix(".txt"), one.with_suffix(".png")
                caption = read_text(prompt, 10_000).strip() if prompt.is_file() else ""
                image = picture_of(picture, 480, colours=64) if picture.is_file() else None
                found.append(Sound(f"{file.stem}: {kind}", sound_of(one), caption, image))
    return found


def _capacity(layers: dict[str, dict[str, dict[str, Any]]]) -> list[Plot]:
    plots = []
    domains = list(next(iter(layers.values()), {}))
    for key, title in (("real", "Experts that work on a step"), ("none", "Share of steps without any expert")):
        series = {}
        for domain in domains:
            each = [[part[key] for part in layer[domain]["time"]] for layer in layers.values()]
            known = [[value for value in column if value is not None] for column in zip(*each, strict=True)]
            points = [((k + 0.5) / len(known), sum(c) / len(c)) for k, c in enumerate(known) if c]
            series[domain] = ([x for x, _ in points], [y for _, y in points])
        text = f"{title}, over the clip from its start (0) to its end (1), a line for each domain"
        plots.append(Plot(title, lines(series), axes("place in the clip", key), text))
    return plots
