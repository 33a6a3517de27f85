# SPDX-License-Identifier: Apache-2.0
"""Where a network with null experts spends its capacity: by layer, domain and time in the clip.

Shape legend: N rows, S test domains, T slices of a clip; sums are of rows, real experts, null choices, rows without any
real expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.files import write_json
from moeapps.moe.objectives import routed
from moeapps.moe.ranks import sums_of_all_ranks
from moeapps.moe.record import Place, Record
from moeapps.moe.routing import Routing
from moeapps.reporting.figures import save_figure
from moeapps.training.callbacks.experts import group_names
from moeapps.training.callbacks.report import Report
from moeapps.training.task import BaseTask

SUMS = ("rows", "real", "null", "none")


class CapacityReport(Report):
    """After a test, count real and null experts of the steps of the clips (rows of prompts are left out).

    Of each layer, and (group ``capacity``) as means over the layers:

    * ``real``: mean number of real experts of a row,
    * ``null``: mean number of null experts that a row chooses; with one null expert the share of rows that choose it,
    * ``none``: share of rows without any real expert.

    They go into the summary of metrics/test.json, over the seen domains; metrics/capacity.json has them by layer,
    domain and slice of the clip, figures/capacity.png shows the means over layers. Nothing is written for a network
    whose layers all run all experts.
    """

    joins_processes = True

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[Place, Tensor] = {}
        self.domains: list[str] = []
        self.seen: list[int] = []

    @override
    def start(self, task: BaseTask) -> None:
        self.sums, self.domains = {}, task.data.eval_domains("test")
        self.seen = [place for place, name in enumerate(self.domains) if task.data.role_of(name) == "seen"]

    @override
    def gather(self, task: BaseTask, batch: Any, domain: str, batch_idx: int) -> None:
        if not task.last_records:
            return
        time = task.routing_factors(batch)["time"]
        for record in task.last_records:
            if isinstance(record.routing, Routing):
                sums_ST = self.sums.setdefault(
                    record.place,
                    torch.zeros(
                        len(self.domains), time.num_labels, len(SUMS), dtype=torch.float64, device=batch.device
                    ),
                )
                sums_ST[self.domains.index(domain)] += count_rows(record, time.label_N, time.num_labels)

    @override
    def finish(self, task: BaseTask, folder: Path | None) -> None:
        self.sums = sums_of_all_ranks(self.sums, task.device)
        names = group_names(list(self.sums))
        layers = {names[place].replace("experts", "capacity", 1): value.cpu() for place, value in self.sums.items()}
        numbers = {name: shares(value[self.seen].sum((0, 1))) for name, value in layers.items()}
        if not numbers:
            return
        means = {key: sum(found[key] for found in numbers.values()) / len(numbers) for key in SUMS[1:]}
        self.result = {"capacity": means, **numbers}
        if folder is not None:
            tables = {
                name: {
                    domain: {
                        "all": shares(value[row].sum(0)),
                        "time": [shares(part) for part in value[row]],
                    }
                    for row, domain in enumerate(self.domains)
                }
                for name, value in layers.items()
            }
            write_json(folder / "metrics" / "capacity.json", {**self.result, "layers": tables})
            save_figure(self._figure(torch.stack(list(layers.values()))), folder / "figures" / "capacity.png", dpi=120)

    def _figure(self, sums_ALL: Tensor) -> Any:
        """Real experts and rows without one, over the clip; a line for each domain."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.0, 3.2), layout="constrained")
        sides = figure.subplots(1, 2)
        slices = sums_ALL.shape[2]
        middle = (torch.arange(slices) + 0.5) / slices
        titles = {"real": ("real experts of a step", "experts"), "none": ("steps without one", "share of the steps")}
        for axes, (column, (title, amount)) in zip(sides, titles.items(), strict=True):
            for row, domain in enumerate(self.domains):
                part = sums_ALL[:, row].sum(0)
                value = part[:, SUMS.index(column)] / part[:, 0].clamp(min=1)
                axes.plot(middle.numpy(), value.numpy(), label=domain, linestyle="-" if row in self.seen else "--")
            axes.set(xlabel="place in the clip (0: start, 1: end)", ylabel=amount, title=title)
        sides[1].set_ylim(bottom=0.0, top=max(0.05, sides[1].get_ylim()[1]))  # a share: none has nothing below 0
        lines = sides[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside right center", fontsize=7, title="dashed: unseen", title_fontsize=7)
        return figure


def count_rows(record: Record, label_N: Tensor, num_labels: int) -> Tensor:
    """Sums of `SUMS` over the rows of each label, float64 [num_labels, 4]; masked and unlabelled rows are left out."""
    part = routed(record)
    routing = cast(Routing, part.routing)
    rows = routing.num_rows
    zeros = torch.zeros(rows, dtype=torch.float64, device=label_N.device)
    real_N = zeros.index_add(0, routing.row_M, (routing.expert_M < routing.num_experts).double())
    null_N = zeros if routing.null_M is None else zeros.index_add(0, routing.row_M, routing.null_M.double())
    counted_N = label_N >= 0 if part.token_mask is None else (label_N >= 0) & part.token_mask.flatten()
    table_N4 = torch.stack([zeros + 1, real_N, null_N, (real_N == 0).double()], dim=1)
    found = torch.zeros(num_labels, len(SUMS), dtype=torch.float64, device=label_N.device)
    return found.index_add_(0, label_N[counted_N], table_N4[counted_N])


def shares(sums: Tensor) -> dict[str, float]:
    """Means over rows of a vector of `SUMS`; not a number without rows."""
    rows = float(sums[0])
    return {name: float(sums[place]) / rows if rows else float("nan") for place, name in enumerate(SUMS) if place}
