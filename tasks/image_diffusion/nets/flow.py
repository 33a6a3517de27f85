# SPDX-License-Identifier: Apache-2.0
r"""Rectified flow: straight lines from data (t = 0) to noise (t = 1), :math:`x_t = (1 - t) x_0 + t\,\epsilon`.

The network predicts the velocity :math:`v = \epsilon - x_0`. Others let time run from noise to data; `data_first` turns
such a network into one of ours.

Shape legend: B images, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from moeapps.moe.wide import wide_dtype
from tasks.image_diffusion.nets.process import Process, per_image

Times = Literal["logit_normal", "uniform"]
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


class RectifiedFlow(Process):
    r"""Velocity matching, :math:`\| v_\theta(x_t, 1000 t, y) - (\epsilon - x_0) \|^2`, unweighted.

    Args:
        times: distribution of training times before the shift: ``logit_normal`` (paper: the sigmoid of a normal) or
            ``uniform``.
        mean: of that normal (paper: 0).
        std: its standard deviation, above 0 (paper: 1).
        shift: s of :math:`t = s u / (1 + (s - 1) u)`, above 0; larger ones train and sample more at high noise
            (paper: 1, no shift).
        stratified: draw the times of a batch one from each of B equally likely slices, which lowers the noise of the
            gradient; false draws them independently (paper).

    Raises:
        ValueError: for a std or shift not above 0, or an unknown distribution.

    Source: ProMoE (docs/papers/promoe.md, equation 8); logit-normal times of Stable Diffusion 3.
    """

    default_solver = "heun"
    solvers = ("euler", "heun")

    def __init__(
        self,
        *,
        times: Times = "logit_normal",
        mean: float = 0.0,
        std: float = 1.0,
        shift: float = 1.0,
        stratified: bool = False,
    ) -> None:
        super().__init__()
        if times not in ("logit_normal", "uniform") or not std > 0 or not shift > 0:
            raise ValueError(
                f"times={times!r}, std={std}, shift={shift}: use logit_normal or uniform, and both above 0"
            )
        self.times, self.mean, self.std, self.shift, self.stratified = times, mean, std, shift, stratified

    def draw_times(self, num: int, device: torch.device) -> Tensor:
        """Times [num] in (0, 1) from the configured distribution."""
        u = torch.rand(num, device=device, dtype=wide_dtype())
        if self.stratified:
            u = (torch.randperm(num, device=device) + u) / num
        if self.times == "logit_normal":
            u = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).mul(self.std).add(self.mean).sigmoid()
        return shifted(u, self.shift)

    def corrupt(self, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """(1 - t) x0 + t eps."""
        return torch.lerp(x0, eps, per_image(t_B, x0))

    def network_time(self, t_B: Tensor) -> Tensor:
        """1000 t."""
        return 1000.0 * t_B

    def losses(self, output: Tensor, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """Mean squared error of the velocity per image; channels beyond those of the data are not looked at."""
        velocity = output[:, : x0.shape[1]].float()
        return (velocity - (eps - x0)).square().flatten(1).mean(1)


def shifted(u: Tensor, shift: float) -> Tensor:
    """Move times towards noise: s u / (1 + (s - 1) u); keeps 0 and 1, and s = 1 changes nothing."""
    return u if shift == 1.0 else shift * u / (1 + (shift - 1) * u)


def data_first(network: Network, *, time_scale: float = 1.0) -> Network:
    """Turn a network whose time runs from noise (0) to data (1) and whose velocity is x0 - eps into one of ours.

    Args:
        network: (x, their time times ``time_scale``, label) -> their velocity.
        time_scale: 1 where their time is fed as it is (DiffMoE), 1000 where it is scaled like ours.

    Returns:
        (x, 1000 t, label) -> eps - x0.

    Source: docs/papers/promoe.md, equation 8; the other direction is that of KwaiVGI/DiffMoE
    ``diffusion/rectified_flow.py``.
    """

    def ours(x: Tensor, time_B: Tensor, label_B: Tensor) -> Tensor:
        return -network(x, (1 - time_B / 1000.0) * time_scale, label_B)

    return ours
