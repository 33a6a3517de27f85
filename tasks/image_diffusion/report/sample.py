# SPDX-License-Identifier: Apache-2.0
"""``moeapps sample``: draw images with a trained run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moeapps.files import write_arrays
from moeapps.reporting.figures import save_figure
from tasks.image_diffusion.data.classes import class_numbers
from tasks.image_diffusion.datamodule import ImageData
from tasks.image_diffusion.nets.autoencoder import LatentDecoder
from tasks.image_diffusion.nets.samplers import sample
from tasks.image_diffusion.report.adm import write_adm
from tasks.image_diffusion.report.pictures import class_figure


def main(words: Sequence[str], task: Any, data: ImageData) -> int:
    """Draw images and write a grid and an npz file.

    Args:
        words: options, see ``--help``.
        task: an `ImageDiffusionTask` with trained weights.
        data: its data, for names of classes.

    Raises:
        ValueError: a class that is not there, a number that is not allowed, a missing autoencoder.
    """
    parser = argparse.ArgumentParser(
        prog="moeapps sample --run DIR",
        description="Draw images: grid.png, and samples.npz with arr_0 uint8 (N, H, W, 3) and arr_1 labels.",
        allow_abbrev=False,
    )
    parser.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="names or numbers (default: all)")
    parser.add_argument("--count", type=int, default=8, help="images of each class")
    parser.add_argument("--cfg", type=float, default=4.0, help="strength of guidance; 1 is none")
    parser.add_argument("--steps", type=int, default=25, help="steps of the solver")
    parser.add_argument("--solver", help="solver (default: the one the task was made for)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--vae", type=Path, help="local folder of an AutoencoderKL, for models of latents")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    options = parser.parse_args(words)
    if options.count < 1:
        raise ValueError(f"--count {options.count}: use 1 or more")
    names = data.facts["class_names"]
    chosen = class_numbers(options.classes, names) if options.classes else list(range(len(names)))
    decoder = LatentDecoder(options.vae, getattr(data.source, "scale", 1.0)) if options.vae is not None else None
    label = torch.tensor(chosen).repeat_interleave(options.count)
    image = sample(task, label, cfg=options.cfg, steps=options.steps, seed=options.seed, solver=options.solver).cpu()
    path = options.out / "samples.npz"
    if data.facts["latent"] and decoder is None:
        write_arrays(path, x=image.numpy(), y=label.numpy())
        print("the model draws latents, and x holds these latents; give --vae DIR to decode them")
    else:
        image = torch.cat([decoder(part) for part in image.split(8)]) if decoder is not None else image
        write_adm(path, image=image, label=label)
    save_figure(class_figure(image, [names[c] for c in label.tolist()]), options.out / "grid.png")
    print(f"{len(label)} images of {len(chosen)} classes: {options.out / 'grid.png'}, {path}")
    return 0
