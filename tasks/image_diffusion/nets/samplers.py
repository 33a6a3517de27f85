# SPDX-License-Identifier: Apache-2.0
r"""From noise to images: Euler and Heun along a flow, DDIM and ancestral steps of a diffusion, guided by a label.

Guidance is :math:`u_\varnothing + w (u_y - u_\varnothing)` with the network's prediction u, made by one pass over a
doubled batch; w = 1 and w = 0 need one half only.

Shape legend: B images, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, pairwise
from typing import Any, Protocol, cast

import torch
from rich.progress import track
from torch import Tensor, nn

from moeapps.training.tuning import kept_modes
from tasks.image_diffusion.nets.ddpm import GaussianDiffusion, Jump
from tasks.image_diffusion.nets.flow import RectifiedFlow, shifted
from tasks.image_diffusion.nets.process import Process

Predict = Callable[[Tensor, Tensor], Tensor]
"""(images, times [B] in [0, 1]) -> guided prediction of the network."""
Noise = Callable[[], Tensor]


class LabelledNetwork(Protocol):
    """What sampling needs of a network."""

    channels: int
    image_size: int
    num_classes: int

    def __call__(self, x: Tensor, time_B: Tensor, label_B: Tensor) -> Tensor:
        """Predict."""


# --- guidance ---------------------------------------------------------------------------------------------------------


def guided(network: LabelledNetwork, x: Tensor, time_B: Tensor, label_B: Tensor, cfg: float) -> Tensor:
    """Predict with guidance.

    Args:
        network: (x, time, label) -> [B, C or 2C, H, W].
        x: noisy images [B, C, H, W].
        time_B: as the network is told, [B].
        label_B: int64 [B].
        cfg: w; 1 is the conditional prediction, 0 the one without a label.

    Returns:
        The guided prediction; a second half for a variance is taken from the conditional pass.
    """
    null_B = torch.full_like(label_B, network.num_classes)
    if cfg in (0.0, 1.0):
        return network(x, time_B, label_B if cfg else null_B)
    both = network(torch.cat([x, x]), torch.cat([time_B, time_B]), torch.cat([label_B, null_B]))
    given, without = both.chunk(2)
    c = network.channels
    mixed = torch.lerp(without[:, :c], given[:, :c], cfg)
    return torch.cat([mixed, given[:, c:]], dim=1) if given.shape[1] > c else mixed


# --- solvers ----------------------------------------------------------------------------------------------------------


def time_grid(steps: int, shift: float = 1.0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Times from 1 to 0, [steps + 1], evenly spaced before the shift."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=dtype), shift)


def euler(velocity: Predict, x: Tensor, grid: Tensor) -> Tensor:
    """Follow the flow by one evaluation per step."""
    for now, then in pairwise(grid.tolist()):
        x = x + (then - now) * velocity(x, x.new_full((len(x),), now))
    return x


def heun(velocity: Predict, x: Tensor, grid: Tensor) -> Tensor:
    """Follow the flow by the trapezoid rule; the last step, which ends where the flow does, is Euler's."""
    times = grid.tolist()
    for i, (now, then) in enumerate(pairwise(times)):
        v = velocity(x, x.new_full((len(x),), now))
        ahead = x + (then - now) * v
        if i + 2 < len(times):
            v = 0.5 * (v + velocity(ahead, x.new_full((len(x),), then)))
            ahead = x + (then - now) * v
        x = ahead
    return x


def respaced(process: GaussianDiffusion, steps: int) -> list[int]:
    """Steps of the process that a shorter run visits, from the noisiest to 0, evenly spaced."""
    if not 1 <= steps <= process.steps:
        raise ValueError(f"steps={steps}; the process has {process.steps}, so use 1 to {process.steps}")
    last = process.steps - 1
    return [round(last * i / max(1, steps - 1)) for i in range(steps)][::-1] if steps > 1 else [last]


def denoise(
    process: GaussianDiffusion, predict: Predict, x: Tensor, steps: int, *, noise: Noise | None = None, clip: bool
) -> Tensor:
    """Run the diffusion backwards: DDIM (deterministic) without ``noise``, else ancestral with the learned variance."""
    visited = respaced(process, steps)
    for k, before in zip(visited, [*visited[1:], None], strict=True):
        output = predict(x, x.new_full((len(x),), (k + 0.5) / process.steps))
        eps, fraction = output[:, : x.shape[1]], output[:, x.shape[1] :]
        level = process.alpha_bar_T[k].expand(len(x))
        lower = torch.ones_like(level) if before is None else process.alpha_bar_T[before].expand(len(x))
        jump = Jump(level, lower, x)
        if noise is None:
            x0 = jump.data(x, eps)
            if clip:
                x0 = x0.clamp(-1, 1)
                eps = jump.noise(x, x0)
            keep, spread = float(lower[0].sqrt()), float((1 - lower[0]).sqrt())
            x = keep * x0 + spread * eps
        else:
            x = jump.mean(x, eps, clip=clip)
            if before is not None:
                x = x + (0.5 * jump.log_variance(fraction)).exp() * noise()
    return x


# --- sampling ---------------------------------------------------------------------------------------------------------


def image_noise(seed: int, index_B: Tensor, shape: tuple[int, ...], draw: int = 0) -> Tensor:
    """Standard normal noise that depends, image by image, on (seed, index, draw) and nothing else: [B, *shape]."""
    rows = []
    for index in index_B.tolist():
        # Torch's CPU generator reads 32 bits of a seed; this is one-to-one in the index.
        key = (index + 2_654_435_761 * (seed + 1) + 40_503 * 2**16 * draw) % 2**32
        rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(key)))
    return torch.stack(rows) if rows else torch.empty(0, *shape)


@torch.no_grad()
def sample(
    model: nn.Module,
    labels: Tensor,
    *,
    cfg: float = 1.0,
    steps: int = 25,
    seed: int = 0,
    solver: str | None = None,
    index: Tensor | None = None,
    batch_size: int = 128,
    process: Process | None = None,
    clip: bool | None = None,
) -> Tensor:
    """Draw images of given classes.

    An image depends on its label, the seed and its index alone, not on the others, wherever routing does not
    (`moeapps.moe.RouterBase.pool`).

    Args:
        model: an `ImageDiffusionTask`, or a network with ``channels``, ``image_size`` and ``num_classes``.
        labels: int64 [B], classes 0 to K - 1, or K for no class.
        cfg: strength of guidance, >= 0; 1 is none.
        steps: of the solver, >= 1.
        seed: of the noise.
        solver: ``euler`` or ``heun`` for a flow, ``ddim`` or ``ancestral`` for a diffusion; None takes the process's.
        index: int64 [B], number of each image in the seed's stream; None means 0, 1, 2, ...
        batch_size: images at a time.
        process: how the network was trained; None takes the task's, or `RectifiedFlow`.
        clip: keep images in [-1, 1]; None does so unless the task says it models latents.

    Returns:
        float32 [B, C, H, H] on the network's device.

    Raises:
        ValueError: for a class that does not exist, an unknown solver, or numbers out of range.
    """
    network = cast(LabelledNetwork, getattr(model, "net", model))
    process = process or cast(Process, getattr(model, "process", None) or RectifiedFlow())
    if clip is None:
        clip = not cast(dict[str, Any], getattr(model, "facts", {})).get("latent", False)
    solver = solver or process.default_solver
    _check(labels, network.num_classes, cfg, steps, solver, process)
    index = torch.arange(len(labels)) if index is None else index
    device = next(model.parameters()).device
    how: dict[str, Any] = {"cfg": cfg, "steps": steps, "seed": seed, "solver": solver, "clip": clip}
    pairs = list(zip(labels.split(batch_size), index.split(batch_size), strict=True)) if len(labels) else []
    shown = track(pairs, description="sampling", transient=True, disable=len(labels) * steps < 20_000)
    with kept_modes(model):
        model.eval()
        parts = [_images(network, process, label_B.to(device), index_B.cpu(), **how) for label_B, index_B in shown]
    images = torch.cat(parts) if parts else torch.empty(0, network.channels, network.image_size, network.image_size)
    return images.clamp(-1, 1) if clip else images


def _images(
    network: LabelledNetwork,
    process: Process,
    label_B: Tensor,
    index_B: Tensor,
    *,
    cfg: float,
    steps: int,
    seed: int,
    solver: str,
    clip: bool,
) -> Tensor:
    """One batch on its way from noise to images."""
    shape, draws = (network.channels, network.image_size, network.image_size), count()
    dtype = next(cast(nn.Module, network).parameters()).dtype

    def noise() -> Tensor:
        """The next draw of every image's own stream."""
        return image_noise(seed, index_B, shape, next(draws)).to(label_B.device)

    def predict(x: Tensor, t_B: Tensor) -> Tensor:
        """The guided prediction at times in [0, 1]; a flow has no use for the channels of a variance."""
        # Times stay as exact as in training: bfloat16 knows four of 1000 apart there, and the embedding turns fast.
        output = guided(network, x.to(dtype), process.network_time(t_B), label_B, cfg).float()
        return output if process.needs_variance else output[:, : network.channels]

    x = noise()
    if isinstance(process, GaussianDiffusion):
        return denoise(process, predict, x, steps, noise=noise if solver == "ancestral" else None, clip=clip)
    grid = time_grid(steps, getattr(process, "shift", 1.0))
    return (euler if solver == "euler" else heun)(predict, x, grid)


def _check(labels: Tensor, num_classes: int, cfg: float, steps: int, solver: str, process: Process) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype} of shape {list(labels.shape)}; give int64 [B]")
    wrong = sorted({int(label) for label in labels.tolist() if not 0 <= label <= num_classes})
    if wrong:
        raise ValueError(
            f"no class {wrong[0]}: the model knows classes 0 to {num_classes - 1}, and {num_classes} for no class"
        )
    if not cfg >= 0 or steps < 1:
        raise ValueError(f"cfg={cfg}, steps={steps}: use cfg >= 0 (1 is no guidance) and at least one step")
    if solver not in process.solvers:
        raise ValueError(f"solver={solver!r}, but a {type(process).__name__} has {', '.join(process.solvers)}")
