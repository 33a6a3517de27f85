# SPDX-License-Identifier: Apache-2.0
"""``moeapps sample``: draw clips with a trained run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.audio.data.prompt import Prompt
from tasks.audio.report.clips import Heard, write_clips
from tasks.audio.report.drawing import Drawing, draw_codes, prompt_symbols, sounds


def main(words: Sequence[str], task: Any, data: Any) -> int:
    """Draw clips and write WAV, spectrogram and prompt of each, and a page that plays them.

    Args:
        words: options, see ``--help``.
        task: an `AudioTask` with trained weights.
        data: its `AudioData`, for the tokenizer and for prompts of test clips.

    Raises:
        ValueError: a prompt that is not understood, a number that is not allowed, an unknown domain.
    """
    options = parser().parse_args(words)
    if options.count < 1:
        raise ValueError(f"--count {options.count}: use 1 or more")
    if not options.seconds > 0:
        raise ValueError(f"--seconds {options.seconds:g} gives max_seconds={options.seconds}; use more than 0")
    rate = float(data.facts["frame_rate"])
    how = Drawing(
        cfg=options.cfg,
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p,
        max_seconds=options.seconds,
        min_seconds=min(0.5, options.seconds),
        seed=options.seed,
    )
    data.prepare_data()
    data.setup("predict")
    prompts = wanted_prompts(options.prompt, options.domains, options.count, data)
    told = {label for _, prompt in prompts for label in prompt.label_names} - set(data.facts["labels"])
    if told:
        known = ", ".join(data.facts["labels"])
        print(f"labels that the network does not know: {', '.join(sorted(told))}; known: {known}")
    symbols = prompt_symbols(data.vocabulary, [prompt for _, prompt in prompts], int(data.facts["prompt_symbols"]))
    codes = draw_codes(task.eval().net, symbols.to(task.device), rate, how)
    clips = [
        Heard(name, wave, str(prompt))
        for (name, prompt), wave in zip(prompts, sounds(data.tokenizer, codes), strict=True)
    ]
    write_clips(
        options.out, clips, int(data.facts["sample_rate"]), title="Clips drawn by " + data.facts.get("name", "moeapps")
    )
    print(f"{len(clips)} clips: {options.out / 'index.html'}")
    return 0


def wanted_prompts(lines: Sequence[str], domains: Sequence[str], count: int, data: Any) -> list[tuple[str, Prompt]]:
    """Names of files and their prompts: those given, else those of the first test clips of each domain.

    Args:
        lines: prompts as `Prompt.parse` reads them; each is drawn ``count`` times.
        domains: domains whose prompts are taken; none means the seen ones.
        count: clips of each prompt given, or of each domain.
        data: the data module.

    Raises:
        ValueError: a prompt that is not understood, an unknown domain.
    """
    if lines:
        parsed = [Prompt.parse(line) for line in lines]
        return [(f"prompt{row}-{place}", prompt) for row, prompt in enumerate(parsed) for place in range(count)]
    found = []
    for domain in domains or data.present("seen"):
        data.role_of(domain)  # tells an unknown name
        clips = data.clips(domain, "test")
        found += [(f"{domain}-{place}", clips[place % len(clips)].prompt) for place in range(count)]
    return found


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="moeapps sample --run DIR",
        description="Draw clips: a WAV, a spectrogram and the prompt of each, and index.html to hear them all. Clips "
        "that an earlier page of the folder played are removed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="'speech voice=low: la mo ti' (repeat for more)"
    )
    parser.add_argument(
        "--domains", nargs="+", default=[], metavar="NAME", help="take prompts of their test clips (default: seen ones)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into (default: sample/ of the run)")
    numbers: dict[str, tuple[type, float | None, str]] = {
        "count": (int, 4, "clips of each prompt or domain"),
        "cfg": (float, Drawing.cfg, "strength of guidance; 0 is none"),
        "temperature": (float, Drawing.temperature, "0 takes the likeliest code"),
        "top_k": (int, Drawing.top_k, "draw among so many codes; 0 is all"),
        "top_p": (float, Drawing.top_p, "draw among the likeliest of this sum"),
        "seconds": (float, Drawing.max_seconds, "longest clip"),
        "seed": (int, 0, "seed of the draws"),
    }
    for name, (kind, value, text) in numbers.items():
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"{text} (default: %(default)s)")
    return parser
