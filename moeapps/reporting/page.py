# SPDX-License-Identifier: Apache-2.0
"""The report page: views of runs into ONE file of HTML that needs no network.

All text of runs goes through Jinja2's escaping or, inside of drawings, through `moeapps.reporting.plots.words`; a
content security policy in the page forbids every request besides.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import moeapps
from moeapps.evaluation.xeval import Matrix
from moeapps.files import finite
from moeapps.reporting import plots
from moeapps.reporting.exhibits import Cloud, Exhibit, Plot, Table
from moeapps.reporting.figures import colour
from moeapps.reporting.findings import clearest
from moeapps.reporting.knowledge import ExpertTable, LayerFinding, clearest_pairs
from moeapps.reporting.verdict import in_short, number, sentences, standings
from moeapps.reporting.view import RunView, SystemView
from moeapps.text import plain

MOST_LABELS = 24
"""Rows of a table of experts."""
MOST_IN_SHORT = 8
"""The same in a tile of the overview."""
NUMBERS = {
    "load_cv": "unevenness of the load",
    "least": "least load",
    "most": "most load",
    "entropy": "entropy of the router (nats)",
}
"""What the numbers of a layer are called where their key does not say it."""
ROUTING_CURVES = {
    "load_cv": "unevenness of the load (coefficient of variation)",
    "entropy": "entropy of the router (nats)",
    "dead": "share of dead experts",
    "mi_domain": "what the expert tells of the domain",
}


def render(systems: Sequence[SystemView], title: str) -> str:
    """Return the page.

    Args:
        systems: runs, grouped.
        title: its heading.
    """
    page = environment().get_template("page.html")
    return page.render(
        title=title,
        systems=systems,
        version=moeapps.__version__,
        runs=sum(len(system.runs) for system in systems),
        style=Markup(_resource("style.css")),
        script=Markup(_resource("page.js")),
        plotly=Markup(_plotly()),
    )


def environment() -> Environment:
    """The templates, with what they may call."""
    made = Environment(
        loader=PackageLoader("moeapps.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "plain": lambda value: plain(value, 400),
        "whole": lambda value: plain(value, 4000),
        "number": number,
        "data": base64_of,
        "finite": finite,
        "viridis": plots.viridis,
        "rounded": rounded,
    }
    made.globals |= {
        "kind_of": lambda exhibit: type(exhibit).__name__.lower(),
        "sentences": sentences,
        "standings": standings,
        "in_short": in_short,
        "score_plot": score_plot,
        "curve_plots": curve_plots,
        "routing_plots": routing_plots,
        "expert_table": expert_table,
        "cloud_data": cloud_data,
        "best_run": best_run,
        "extent": extent,
        "colour": colour,
        "leading": leading,
        "clearest": clearest,
        "number_name": number_name,
        "MOST_IN_SHORT": MOST_IN_SHORT,
    }
    return made


def _resource(name: str) -> str:
    return files("moeapps.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Plotly's script, out of its package."""
    text = files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    return text.replace("</script", "<\\/script")


def base64_of(content: bytes) -> str:
    """Bytes as base64, for data URIs."""
    return base64.b64encode(content).decode("ascii")


# --- results ----------------------------------------------------------------------------------------------------------


def score_plot(system: SystemView) -> Plot | None:
    """Scores by domain, one mark per run, with intervals over test units where known; None without a matrix."""
    matrix = system.matrix
    if matrix is None:
        return None
    columns = [f"{domain} ({role})" for domain, role in matrix.roles.items()]
    rows = {}
    for name, row in zip(row_names(matrix), matrix.rows, strict=True):
        cells: list[tuple[float | None, float | None, float | None]] = []
        for domain in matrix.roles:
            interval, value = row.intervals.get(domain), row.cells.get(domain)
            cells.append((value, None, None) if interval is None else (value, interval.low, interval.high))
        rows[name] = [tuple(map(_number, cell)) for cell in cells]
    layout = plots.axes("", matrix.metric, showlegend=len(rows) > 1, xaxis={"tickangle": -35, "automargin": True})
    layout["yaxis"] = {"title": {"text": plots.words(matrix.metric)}}
    text = f"{matrix.metric} of every run on every domain; the table below has the same numbers"
    bars = any(row.intervals for row in matrix.rows)
    caption = "Bars: 95 % intervals over test units, where the run stores units." if bars else ""
    return Plot("Scores by domain", plots.dots(columns, rows), layout, text, caption, 380)  # type: ignore[arg-type]


def row_names(matrix: Matrix) -> list[str]:
    """What the rows of a matrix are called: name, seed, and the version where that is not enough."""
    short = [row.variant.partition("/")[2] or row.variant for row in matrix.rows]
    names = [n if r.seed is None else f"{n}, seed {r.seed}" for n, r in zip(short, matrix.rows, strict=True)]
    return [
        name if names.count(name) == 1 else f"{name}, {row.run.name}"
        for name, row in zip(names, matrix.rows, strict=True)
    ]


def best_run(system: SystemView) -> RunView | None:
    """The run to tell of first: of those with experts the best on unseen domains, else on what is scored."""
    told = [run for run in system.runs if run.finding is not None and run.finding.layers]
    if system.matrix is None or not told:
        return told[0] if told else next((run for run in system.runs if run.results is not None), None)
    sign = 1.0 if system.matrix.direction == "max" else -1.0
    scores = {row.run.resolve(): row.cells for row in system.matrix.rows}

    def score(run: RunView) -> float:
        cells = scores.get(run.folder.resolve(), {})
        value = cells.get("mean unseen", cells.get("mean seen", -np.inf * sign))
        return sign * value if np.isfinite(value) else -np.inf

    return max(told, key=score)


# --- curves -----------------------------------------------------------------------------------------------------------


def curve_plots(run: RunView) -> list[Plot]:
    """Training loss, and the main metric at validations."""
    found = []
    metric = "score" if run.results is None else str(run.results.header.get("main_metric") or "loss")
    if run.curves.loss:
        layout = plots.axes("step", "training loss")
        text = f"Training loss over steps: {', '.join(run.curves.loss)}"
        found.append(Plot("Training loss", plots.lines(run.curves.loss), layout, text))
    if any(len(steps) > 1 for steps, _ in run.curves.scores.values()):
        traces = plots.lines(run.curves.scores, markers=True)
        text = f"{metric} at every validation, means over the domains of a role"
        found.append(Plot(f"{metric} while training", traces, plots.axes("step", metric), text))
    return found


def routing_plots(run: RunView) -> list[Plot]:
    """What was logged of the routing at validations, a line per layer."""
    found = []
    for key, title in ROUTING_CURVES.items():
        series = run.curves.routing.get(key, {})
        if any(len(steps) > 1 for steps, _ in series.values()):
            layout = plots.axes("step", key, showlegend=len(series) > 1)
            text = f"{title}, a line for each MoE layer, at every validation"
            found.append(Plot(title[:1].upper() + title[1:], plots.lines(series, markers=True), layout, text))
    return found


# --- experts ----------------------------------------------------------------------------------------------------------


def expert_table(table: ExpertTable, most: int = MOST_LABELS) -> Table:
    """Which share of the work of each label goes to each expert, None where it may not; of ``most`` labels.

    Of more labels those are shown that some expert takes most of (which the sentence names), then those with most work:
    by work alone, labels that have all the same would be the first ones, of which some experts may have nothing.
    """
    total_L, share_LE = table.array.sum(1), table.shares.astype(object)
    if table.sees:
        share_LE[~np.asarray(table.sees)] = None
    by_work = np.argsort(-total_L, kind="stable").tolist()
    chosen = list(dict.fromkeys([*(label for label, _ in clearest_pairs(table)), *by_work]))[:most]
    chosen = [place for place in sorted(chosen) if total_L[place] > 0]
    head = [table.factor, *(table.experts or [str(e) for e in range(share_LE.shape[1])])]
    rows = [[table.labels[place], *share_LE[place].tolist()] for place in chosen]
    left = int((total_L > 0).sum()) - len(chosen)
    caption = f"Share of the work of each {table.factor} that each expert takes; a row sums to 100 %."
    caption += f" {table.most()}." if table.most() else ""
    caption += f" {len(chosen)} are shown, those that experts take most of before others; {left} are not." * (left > 0)
    return Table(f"Experts by {table.factor}", head, rows, caption, shaded=True)


def leading(finding: LayerFinding) -> int:
    """Number of the table to show first: of the factor that is followed, else of the task's story, else the first."""
    names = [table.factor for table in finding.tables]
    told = next((place for place, table in enumerate(finding.tables) if table.story), 0)
    return names.index(finding.factor) if finding.factor in names else told


def number_name(key: str) -> str:
    """What a number of a layer is called."""
    factor = key.removeprefix("told_")
    return f"share of the {factor} told by the expert" if factor != key else NUMBERS.get(key, key.replace("_", " "))


# --- gallery ----------------------------------------------------------------------------------------------------------


def cloud_data(cloud: Cloud) -> dict[str, Any]:
    """Points as 16-bit numbers in base64 with their range, labels as 16-bit numbers, names and colours."""
    position = np.asarray(cloud.position, dtype=np.float64)
    low, high = position.min(0), position.max(0)
    step = max(float((high - low).max()), 1e-9) / 65535
    packed = ((position - low) / step).round().astype("<u2")
    return {
        "low": low.tolist(),
        "step": step,
        "position": base64_of(packed.tobytes()),
        "colourings": [
            {
                "name": plots.words(one.name),
                "label": base64_of(np.asarray(one.label).astype("<i2").tobytes()),
                "names": [plots.words(name) for name in one.names],
                "colours": list(one.colours) or [colour(k) for k in range(len(one.names))],
            }
            for one in cloud.colourings
        ],
    }


def extent(exhibit: Exhibit) -> tuple[float, float]:
    """Lowest and highest number of a table, for its shades."""
    rows = exhibit.rows if isinstance(exhibit, Table) else []
    found = [cell for row in rows for cell in row if isinstance(cell, int | float)]
    low, high = min(found, default=0.0), max(found, default=1.0)
    return low, high if high > low else low + 1.0


def rounded(value: float, low: float, high: float) -> str:
    """A number of a shaded table: two digits of the largest one, so that a column is narrow and compares at a look."""
    size = max(abs(low), abs(high))
    places = max(0, 1 - math.floor(math.log10(size))) if 0 < size < math.inf else 0
    text = f"{value:.{min(places, 12)}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
