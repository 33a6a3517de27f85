# SPDX-License-Identifier: Apache-2.0
"""After a test of list ranking: which past item activated which expert, and what the gate's vectors stand for.

Shape legend: B lists, H past items, K experts, L values of a factor.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from moeapps.files import write_json, write_text
from moeapps.moe.record import Record
from moeapps.reporting.figures import save_figure
from moeapps.text import cell
from moeapps.text import markdown as as_markdown
from moeapps.training.callbacks import ExpertReport
from moeapps.training.task import BaseTask
from tasks.recommendation.data.lists import Lists
from tasks.recommendation.model import ListRanker
from tasks.recommendation.report.attribution import GateSample, gate_ari, gate_sample, mean_gates, prior_of
from tasks.recommendation.report.gate_figures import attribution_figure, gate_figure
from tasks.recommendation.report.list_metrics import TAIL

NameItem = Callable[[int], str]
log = logging.getLogger("moeapps")


class GateReport(ExpertReport):
    """Explain the gate of `ListRanker` on test lists of the seen domains.

    Writes metrics/explanations.csv (what each past item added to each expert, one row per list and past item),
    metrics/explanations.md, figures/explanations.png and gallery/lists.json (a few users, to read), figures/gates.png
    (mean gate of each value of the source's factor, and the gates as points) and metrics/gates.json; adds the group
    ``gates`` to the summary of metrics/test.json:

    * ``gate_ari``: adjusted Rand index of groups of gate vectors (k-means on directions, as many groups as the factor
      has values) against the factor, of users with more than `TAIL` past items; ``gate_ari_tail``: of the others,
    * ``gate_spread``: mean standard deviation of an expert's weight over lists; 0: the gate says the same of all.

    Networks whose gate reads no history have no explanations, those without experts no report. Under several processes
    the lists are those of the first.

    Args:
        lists_per_domain: test lists of each seen domain that are looked at.
        explained: lists whose past items are told in explanations.csv.
        shown: users in the report to read and in the picture.
        figure: draw the pictures.

    Raises:
        ValueError: a number below 1, or more users shown than lists explained.
    """

    runs_network = True

    def __init__(
        self, lists_per_domain: int = 2000, explained: int = 200, shown: int = 4, *, figure: bool = True
    ) -> None:
        super().__init__()
        if not 1 <= shown <= explained or lists_per_domain < 1:
            raise ValueError(
                f"lists_per_domain={lists_per_domain}, explained={explained}, shown={shown}: give 1 or more of each, "
                "and show no more than are explained"
            )
        self.lists_per_domain, self.explained, self.shown, self.figure = lists_per_domain, explained, shown, figure
        self._taken: dict[str, int] = {}
        self._samples: list[GateSample] = []

    def start(self, task: BaseTask) -> None:
        """Start anew."""
        super().start(task)
        self._taken, self._samples = dict.fromkeys(self.domains, 0), []

    def wants(self, domain: str) -> bool:
        """Whether more lists of the domain are looked at."""
        return self._taken.get(domain, self.lists_per_domain) < self.lists_per_domain

    def count(self, task: BaseTask, batch: Lists, records: list[Record], domain: int) -> None:
        """Keep the gates of a batch."""
        self._taken[self.domains[domain]] += len(batch)
        found = gate_sample(cast(ListRanker, task.net), batch)
        if found is not None:
            self._samples.append(found)

    def finish(self, task: BaseTask, folder: Path | None) -> None:
        """Compute and write."""
        if not self._samples:
            return
        sample, factors = GateSample.cat(self._samples), list(task.facts["factors"])
        self._samples = []
        self.result = {"gates": gate_numbers(sample)}
        if folder is None:
            return
        means = mean_gates(sample.gate, sample.factor, len(factors))
        content = {"factors": factors, "mean_gate": means.tolist(), **self.result["gates"]}
        write_json(folder / "metrics" / "gates.json", content)
        if self.figure:
            save_figure(gate_figure(sample, factors), folder / "figures" / "gates.png", dpi=150)
        if sample.parts is not None:
            self._explain(sample, factors, cast(Any, task.data).source.item_name, folder)

    def _explain(self, sample: GateSample, factors: list[str], name: NameItem, folder: Path) -> None:
        told, shown = chosen_lists(sample, self.explained), chosen_lists(sample, self.shown)
        if len(shown) == 0:
            log.warning(
                "none of the lists has a past item, so there is nothing that metrics/explanations could explain"
            )
            return
        write_json(folder / "gallery" / "lists.json", ranked_lists(sample.take(shown), factors, name))
        write_text(folder / "metrics" / "explanations.csv", explanation_table(sample.take(told), name))
        write_text(folder / "metrics" / "explanations.md", markdown(sample.take(shown), factors, name))
        if self.figure:
            figure = attribution_figure(sample.take(shown), factors, name)
            save_figure(figure, folder / "figures" / "explanations.png", dpi=150)


def gate_numbers(sample: GateSample) -> dict[str, float]:
    """The numbers for the results file, see `GateReport`; NaN where the source knows no factor."""
    full = sample.events > TAIL
    return {
        "gate_ari": gate_ari(sample.gate[full], sample.factor[full]),
        "gate_ari_tail": gate_ari(sample.gate[~full], sample.factor[~full]),
        "gate_spread": float(sample.gate.double().std(0, correction=0).mean()) if len(sample.gate) else math.nan,
    }


def chosen_lists(sample: GateSample, num: int) -> Tensor:
    """Numbers of lists to show, int64 [<= num]: no user twice, no empty history, factors in turn, full users first.

    The last is of a user of the long tail, if there is one and there is room.
    """
    seen: set[int] = set()
    queues: dict[int, list[int]] = {}
    tail: list[int] = []
    columns = zip(sample.user.tolist(), sample.events.tolist(), sample.factor.tolist(), strict=True)
    for k, (user, events, factor) in enumerate(columns):
        if user in seen or events == 0:
            continue
        seen.add(user)
        (queues.setdefault(factor, []) if events > TAIL else tail).append(k)
    in_turn = [(place, factor, k) for factor, rows in queues.items() for place, k in enumerate(rows)]
    full = [k for _, _, k in sorted(in_turn)]
    kept = full[: num - 1] + tail[:1] if tail and num > 1 else full[:num] or tail[:num]
    return torch.tensor(kept, dtype=torch.int64)


def explanation_table(sample: GateSample, name: NameItem) -> str:
    """One CSV row per list and past item: list, user, candidate, place in the past (1 = latest), item, each expert."""
    assert sample.parts is not None
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    experts = [f"expert_{k}" for k in range(sample.gate.shape[1])]
    rows.writerow(["row", "user", "candidate", "place", "past_item", *experts])
    for b in range(len(sample.gate)):
        head = [int(sample.row[b]), int(sample.user[b]), cell(name(int(sample.item[b])))]
        for h in places(sample, b):
            parts = [f"{value:.6g}" for value in sample.parts[b, h].tolist()]
            rows.writerow([*head, h + 1, cell(name(int(sample.history_item[b, h]))), *parts])
    return text.getvalue()


def markdown(sample: GateSample, factors: Sequence[str], name: NameItem) -> str:
    """The report to read: for each list the gate, and its past items, the strongest first."""
    assert sample.parts is not None
    experts = [f"expert {k}" for k in range(sample.gate.shape[1])]
    lines = ["# Which past item activated which expert", ""]
    lines += [
        "What each past item added to the gate's value of each expert, the strongest items first: above 0 it calls"
    ]
    lines += ["for the expert, below 0 it calls it off. "]
    prior = prior_of(sample)
    told = "All past items and the gate of a user without a past sum to the weights."
    lines[-1] += told if prior is not None else "The weights are a norm of the sum."
    lines.append("")
    digits = 2 if float(sample.parts.abs().max()) >= 0.1 else 4  # a gate that hardly moves would be all zeros
    for b in range(len(sample.gate)):
        factor = int(sample.factor[b])
        kind = f" ({factors[factor]})" if 0 <= factor < len(factors) else ""
        lines += [f"## User {int(sample.user[b])}{kind}, who took {as_markdown(name(int(sample.item[b])))}", ""]
        lines += ["| past item | " + " | ".join(experts) + " |", "|---" * (len(experts) + 1) + "|"]
        order = sorted(places(sample, b), key=lambda h: -float(sample.parts[b, h].norm()))  # type: ignore[index]
        cells = [(as_markdown(name(int(sample.history_item[b, h]))), sample.parts[b, h]) for h in order]
        cells.append(("**all past items**", sample.parts[b].sum(0)))
        cells += [] if prior is None else [("**a user without a past**", prior)]
        cells.append(("**weights of the experts**", sample.gate[b]))
        for shown, values in cells:
            lines.append(f"| {shown} | " + " | ".join(f"{value:+.{digits}f}" for value in values.tolist()) + " |")
        lines.append("")
    return "\n".join(lines)


def ranked_lists(sample: GateSample, factors: Sequence[str], name: NameItem) -> dict[str, Any]:
    """What a page shows of some lists: candidates as ranked, weights of the experts, past items by what they added."""
    assert sample.parts is not None
    lists = []
    for b in range(len(sample.gate)):
        factor = int(sample.factor[b])
        past = sorted(places(sample, b), key=lambda h: -float(sample.parts[b, h].norm()))  # type: ignore[index]
        ranked: list[dict[str, Any]] = []
        if sample.candidate_item is not None and sample.logits is not None and sample.taken is not None:
            real = torch.nonzero(sample.candidate_item[b] >= 0).flatten()
            for n in real[sample.logits[b, real].argsort(descending=True)].tolist():
                score, taken = float(sample.logits[b, n]), bool(sample.taken[b, n])
                ranked.append({"item": name(int(sample.candidate_item[b, n])), "score": score, "taken": taken})
        lists.append(
            {
                "user": int(sample.user[b]),
                "factor": factors[factor] if 0 <= factor < len(factors) else "",
                "experts": sample.gate[b].tolist(),
                "ranked": ranked,
                "past": [
                    {"item": name(int(sample.history_item[b, h])), "added": sample.parts[b, h].tolist()} for h in past
                ],
            }
        )
    return {"lists": lists}


def places(sample: GateSample, b: int) -> list[int]:
    """Places of a list's real past items."""
    return [h for h, item in enumerate(sample.history_item[b].tolist()) if item >= 0]
