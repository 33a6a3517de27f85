# SPDX-License-Identifier: Apache-2.0
"""PPT: a dense Point Transformer V3 with norms of its own for each data set, the paper's main rival.

Every batch and layer norm is kept once per prompt (one prompt per seen domain, or one more that is nobody's), and its
output is scaled and shifted by a learned vector of the prompt: y (1 + scale) + shift, [scale, shift] = Linear(SiLU(v)).
What differs between the modes is how a scan gets its prompt in evaluation, see `PromptedPointMoE`.

Source: Wu et al. 2024, Towards Large-scale 3D Representation Learning with Multi-dataset Point Prompt Training;
Pointcept/Pointcept ``models/point_prompt_training`` (there a batch holds one data set; here it may hold several, and
the modulation begins at zero).

Shape legend: N voxels of a level, D width, P prompts, V length of a prompt's vector, B scans, S seen domains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch
from torch_geometric.utils import scatter
from typing_extensions import override

from moeapps.training.task import Stage, StepOutput
from tasks.point_cloud.model import PointMoE
from tasks.point_cloud.module import PointCloudTask
from tasks.point_cloud.nets.geometry import Level
from tasks.point_cloud.nets.serialization import Order
from tasks.point_cloud.nets.sparse_conv import SubmanifoldConv3d

Mode = Literal["oracle", "classifier", "generic"]
MODES: tuple[Mode, ...] = ("oracle", "classifier", "generic")

# --- norms that know the prompt ---------------------------------------------------------------------------------------


class PromptRows:
    """The prompt of each row at each resolution, which the norms read during one pass.

    A norm sees rows and no level, but their number says which level it is: if two levels have equally many rows, no
    voxels were merged between them, so they hold the same voxels in the same order.
    """

    def __init__(self) -> None:
        self._levels: dict[int, tuple[Tensor, list[int], list[int]]] = {}
        self.vectors_PV: Tensor | None = None

    def fill(self, levels: Sequence[Level], prompt_B: Tensor, vectors_PV: Tensor | None) -> None:
        """Note the prompt of each scan and the vectors of all prompts."""
        self.vectors_PV = vectors_PV
        for level in levels:
            prompt_N = prompt_B[level.batch_N]
            present, counts = torch.unique(prompt_N, return_counts=True)
            self._levels[len(prompt_N)] = prompt_N.argsort(stable=True), present.tolist(), counts.tolist()

    def clear(self) -> None:
        """Forget the pass."""
        self._levels.clear()
        self.vectors_PV = None

    def of(self, num_rows: int) -> tuple[Tensor, list[int], list[int]]:
        """Rows in order of their prompt, int64 [N], the prompts present, and how many rows each has."""
        return self._levels[num_rows]


class PromptNorm(nn.Module):
    """One copy of a norm per prompt, and the modulation by the prompt's vector.

    Args:
        norm: the norm to copy; batch norms keep statistics per prompt.
        rows: which row has which prompt.
        num_prompts: P.
        prompt_dim: V, or None for no modulation.

    Shape:
        x [N, D] -> [N, D].
    """

    in_parts: ClassVar[bool] = True

    def __init__(
        self, norm: nn.BatchNorm1d | nn.LayerNorm, rows: PromptRows, num_prompts: int, prompt_dim: int | None
    ) -> None:
        super().__init__()
        dim = norm.num_features if isinstance(norm, nn.BatchNorm1d) else int(norm.normalized_shape[0])
        self.norms = nn.ModuleList(deepcopy(norm) for _ in range(num_prompts))
        self.modulation: nn.Linear | None = None if prompt_dim is None else nn.Linear(prompt_dim, 2 * dim)
        if self.modulation is not None:  # begins as no modulation
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
        self._rows = rows

    def forward(self, x_ND: Tensor) -> Tensor:
        """Normalise each row by its prompt's norm."""
        order_N, prompts, counts = self._rows.of(len(x_ND))
        if len(prompts) == 1:
            return self._one(x_ND, prompts[0])
        parts = x_ND.index_select(0, order_N).split(counts)
        y_ND = torch.cat([self._one(part, prompt) for part, prompt in zip(parts, prompts, strict=True)])
        return torch.empty_like(y_ND).index_copy(0, order_N, y_ND)

    def _one(self, x_ND: Tensor, prompt: int) -> Tensor:
        norm = self.norms[prompt]
        if isinstance(norm, nn.BatchNorm1d) and len(x_ND) == 1:  # one row has no variance
            y_ND: Tensor = F.batch_norm(x_ND, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            y_ND = norm(x_ND)
        vectors_PV = self._rows.vectors_PV
        if self.modulation is None or vectors_PV is None:
            return y_ND
        scale_D, shift_D = self.modulation(F.silu(vectors_PV[prompt])).chunk(2)
        modulated_ND: Tensor = y_ND * (1 + scale_D) + shift_D
        return modulated_ND


def give_prompts(net: nn.Module, rows: PromptRows, num_prompts: int, prompt_dim: int | None) -> None:
    """Replace every batch and layer norm within ``net`` by a `PromptNorm`."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.LayerNorm):
                setattr(parent, name, PromptNorm(child, rows, num_prompts, prompt_dim))


# --- who is it? -------------------------------------------------------------------------------------------------------


class DomainDetector(nn.Module):
    """Guess which seen domain a scan comes from: two submanifold convolutions, mean and maximum per scan, an MLP.

    Args:
        in_dim: channels of the input features.
        num_domains: S.
        dim: width of the convolutions (paper's code: 256); the MLP is 2, 2, 1 times as wide.

    Shape:
        x [N, in_dim] and its level -> logits [B, S].

    Source: UVA-Computer-Vision-Lab/point_moe ``point_detector.py``.
    """

    def __init__(self, in_dim: int, num_domains: int, dim: int = 16) -> None:
        super().__init__()
        self.conv1 = SubmanifoldConv3d(in_dim, dim, 3)
        self.conv2 = SubmanifoldConv3d(dim, dim, 3)
        self.mlp = nn.Sequential(
            nn.Linear(2 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, num_domains)
        )

    @override
    def forward(self, x_NC: Tensor, level: Level) -> Tensor:
        table, num_scans = level.neighbours(3), len(level.num_B)
        y_ND = F.relu(self.conv2(F.relu(self.conv1(x_NC, table)), table))
        pooled = [scatter(y_ND, level.batch_N, dim_size=num_scans, reduce=reduce) for reduce in ("mean", "max")]
        logits_BS: Tensor = self.mlp(torch.cat(pooled, dim=1))
        return logits_BS


# --- the network and its task -----------------------------------------------------------------------------------------


class PromptedPointMoE(PointMoE):
    """`PointMoE`, usually with a dense layer in place of the mixture, with norms per prompt.

    Modes, that is, where a scan's prompt comes from. In training it is always the scan's own domain, but for `generic`:

    * ``oracle``: a seen domain's own; a domain never trained on borrows the one that ``stand_in`` names.
    * ``classifier``: what a `DomainDetector`, trained beside, takes the scan for. Needs no label of the data set.
    * ``generic``: one more prompt that is nobody's. In training it takes the place of a scan's own prompt with
      probability ``generic_scans`` in a share ``generic_batches`` of the batches; in evaluation every scan has it.

    Args:
        facts: as `PointMoE` reads them.
        domains: the seen domains.
        mode: see above.
        stand_in: for each domain never trained on, the seen domain whose prompt it gets in mode ``oracle``.
        modulate: scale and shift what the norms give by the prompt's vector.
        prompt_dim: length V of a prompt's vector (paper: 256).
        detector_dim: width of the detector's convolutions (paper's code: 256).
        generic_batches: share of the training batches with generic scans (paper's code: 0.5).
        generic_scans: share of the scans of such a batch that are generic (paper's code: about 1/6).
        backbone: arguments of `PointMoE`.

    Raises:
        ValueError: no domain, an unknown mode, a stand-in that is not seen, or a share outside [0, 1].
    """

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        domains: Sequence[str],
        mode: Mode = "oracle",
        stand_in: Mapping[str, str] | None = None,
        modulate: bool = True,
        prompt_dim: int = 256,
        detector_dim: int = 16,
        generic_batches: float = 0.5,
        generic_scans: float = 1 / 6,
        **backbone: Any,
    ) -> None:
        super().__init__(facts, **backbone)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: choose from {', '.join(MODES)}")
        if not domains or not set((stand_in or {}).values()) <= set(domains):
            raise ValueError(f"stand_in={stand_in} must name seen domains, which are domains={list(domains)}")
        if not (0 <= generic_batches <= 1 and 0 <= generic_scans <= 1):
            raise ValueError(f"generic_batches={generic_batches}, generic_scans={generic_scans}: shares are in [0, 1]")
        self.domains, self.mode, self.stand_in = tuple(domains), mode, dict(stand_in or {})
        self.generic_batches, self.generic_scans = generic_batches, generic_scans
        num_prompts = len(domains) + (mode == "generic")
        self.prompts = nn.Embedding(num_prompts, prompt_dim) if modulate else None
        self.detector = DomainDetector(self.in_dim, len(domains), detector_dim) if mode == "classifier" else None
        self._rows = PromptRows()
        self._prompt_of: list[int] = list(range(len(domains)))
        give_prompts(self, self._rows, num_prompts, prompt_dim if modulate else None)

    def name_domains(self, names: Sequence[str]) -> None:
        """Learn what the numbers in ``batch.domain`` mean.

        Args:
            names: all domains in order, ``facts["domain_names"]``.

        Raises:
            ValueError: a seen domain is missing, or, in mode ``oracle``, another one has no stand-in.
        """
        missing = set(self.domains) - set(names)
        if missing:
            raise ValueError(
                f"net.domains={list(self.domains)} has prompts for {sorted(missing)}, which the data lacks"
            )
        own = {name: self.stand_in.get(name, name) for name in names}
        unknown = [name for name in names if own[name] not in self.domains]
        if unknown and self.mode == "oracle":
            raise ValueError(
                f"domains {unknown} have no prompt: name in net.stand_in the seen domain that each is most like, or "
                "choose mode classifier or generic"
            )
        self._prompt_of = [self.domains.index(own[name]) if own[name] in self.domains else -1 for name in names]

    def seen_domain(self, domain: Tensor) -> Tensor:
        """The prompt that belongs to each domain id; -1 for none. Same shape."""
        return torch.tensor(self._prompt_of, device=domain.device)[domain]

    def detect(self, batch: Batch) -> Tensor:
        """Logits of the detector for each scan: [B, S]."""
        assert self.detector is not None
        levels, row_N = self._levels(batch)
        logits_BS: Tensor = self.detector(torch.empty_like(batch.x).index_copy_(0, row_N, batch.x), levels[0])
        return logits_BS

    def choose(self, x_NC: Tensor, level: Level) -> Tensor:
        """The prompt of each scan: int64 [B]."""
        num_scans = len(level.num_B)
        if self.detector is not None and not self.training:
            return torch.as_tensor(self.detector(x_NC, level).argmax(dim=1))
        if self.mode == "generic" and not self.training:
            return torch.full((num_scans,), len(self.domains), device=x_NC.device)
        assert level.group_N is not None
        domain_B = level.group_N.new_zeros(num_scans).index_copy(0, level.batch_N, level.group_N)
        prompt_B = self.seen_domain(domain_B)
        if self.mode == "generic" and torch.rand(()) < self.generic_batches:
            generic_B = torch.rand(num_scans, device=x_NC.device) < self.generic_scans
            prompt_B = prompt_B.masked_fill(generic_B, len(self.domains))
        return prompt_B

    def _unet(self, x_NC: Tensor, levels: list[Level], orders: list[Sequence[Order]]) -> Tensor:
        vectors_PV = None if self.prompts is None else self.prompts.weight
        self._rows.fill(levels, self.choose(x_NC, levels[0]), vectors_PV)
        try:
            return super()._unet(x_NC, levels, orders)
        finally:
            self._rows.clear()


class PromptTask(PointCloudTask):
    """`PointCloudTask` that tells the network the names of the domains and trains its detector, if it has one.

    Args:
        net: makes the network from the facts.
        facts: see `PointCloudTask`.
        detector_weight: weight of the detector's cross-entropy; it shares no parameter with the rest.
        detector_smoothing: label smoothing of that loss (paper's code: 0.1).
        options: further arguments of `PointCloudTask`.

    Raises:
        ValueError: the network's domains do not fit ``facts``.
    """

    net: PromptedPointMoE

    def __init__(
        self,
        *,
        net: Callable[[dict[str, Any]], PromptedPointMoE],
        facts: dict[str, Any],
        detector_weight: float = 1.0,
        detector_smoothing: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(net=net, facts=facts, **options)
        self.net.name_domains(self.domain_names)
        self.detector_weight, self.detector_smoothing = detector_weight, detector_smoothing

    def shared_step(self, batch: Batch, stage: Stage) -> StepOutput:
        """Loss of one batch, the detector's added in training."""
        out = super().shared_step(batch, stage)
        if stage == "train" and self.net.detector is not None:
            logits_BS, target_B = self.net.detect(batch), self.net.seen_domain(batch.domain)
            loss = F.cross_entropy(logits_BS, target_B, label_smoothing=self.detector_smoothing)
            out.loss = out.loss + self.detector_weight * loss
            out.logs |= {"detector": loss, "detector_accuracy": (logits_BS.argmax(1) == target_B).float().mean()}
        return out
