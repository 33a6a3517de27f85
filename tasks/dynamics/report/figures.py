# SPDX-License-Identifier: Apache-2.0
"""Pictures of reconstructed systems, drawn from plain arrays.

Matplotlib is imported when a figure is made and not before. S environments, N trajectories, T samples, D states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import numpy.typing as npt
from typing_extensions import override

from moeapps.files import write_arrays
from moeapps.reporting.figures import COLOURS, FAINT, INK, colour, save_figure
from moeapps.text import figure_text
from moeapps.training.callbacks.report import Report, writing_dir
from moeapps.training.task import BaseTask

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]

MARKERS = "osD^vP*X<>"
"""Marker of family 0, 1, ..."""
FAMILY_COLOURS = ("#332288", "#88ccee", "#117733", "#999933", "#cc6677", "#882255", "#aa4499", "#44aa99", "#661100")
"""Colour of family 0, 1, ...: Tol's muted palette; those of experts and states would say that they belong together."""


def trajectory_figure(
    title: str,
    truth: Floats,
    pred: Floats,
    dt: Floats,
    names: Sequence[str],
    *,
    most: int = 6,
    trajectory: int = 0,
    given: int = 1,
) -> Any:
    """Draw states over time: truth as dots, prediction as lines, one panel per environment.

    Args:
        title: heading.
        truth: [S, N, T, D], nan where missing.
        pred: [S, N, T, D]; where it is not finite the line ends.
        dt: seconds between samples [S].
        names: one per environment.
        most: most panels; evenly spaced environments are shown.
        trajectory: which of the N is drawn.
        given: leading samples that the prediction knew; the lines start at the last of them.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    shown = _spread(len(truth), most)
    figure, axes = _panels(title, len(shown), 2.2)
    for axis, e in zip(axes, shown, strict=True):
        seconds = np.arange(truth.shape[2]) * float(dt[e])
        for d in range(min(truth.shape[3], len(COLOURS))):
            axis.plot(seconds, truth[e, trajectory, :, d], "o", ms=3, color=colour(d), alpha=0.55)
            axis.plot(seconds[given - 1 :], _finite(pred[e, trajectory, given - 1 :, d]), "-", lw=1.4, color=colour(d))
        _limits(axis.set_ylim, truth[e, trajectory])
        axis.set_title(figure_text(names[e]), fontsize=9, color=INK, loc="left")
        axis.set_xlabel("seconds", fontsize=8)
    states = [(f"state {d}", colour(d)) for d in range(min(truth.shape[3], len(COLOURS)))]
    _key(figure, (INK, 0.55), INK, states)
    return figure


def phase_figure(title: str, truth: Floats, pred: Floats, names: Sequence[str], *, most: int = 6) -> Any:
    """Draw the first two states against each other, all trajectories, one panel per environment.

    Args:
        title: heading.
        truth: [S, N, T, D], D at least 2.
        pred: [S, N, T, D].
        names: one per environment.
        most: most panels.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ValueError: one state only.
    """
    if truth.shape[3] < 2:
        raise ValueError(f"{title}: a phase portrait needs two states, not {truth.shape[3]}")
    shown = _spread(len(truth), most)
    figure, axes = _panels(title, len(shown), 3.0)
    for axis, e in zip(axes, shown, strict=True):
        for n in range(truth.shape[1]):
            axis.plot(truth[e, n, :, 0], truth[e, n, :, 1], "o", ms=2.2, color=FAINT)
            axis.plot(_finite(pred[e, n, :, 0]), _finite(pred[e, n, :, 1]), "-", lw=1.0, color=COLOURS[0], alpha=0.8)
        _limits(axis.set_xlim, truth[e, ..., 0])
        _limits(axis.set_ylim, truth[e, ..., 1])
        axis.set_title(figure_text(names[e]), fontsize=9, color=INK, loc="left")
        axis.set_xlabel("state 0", fontsize=8)
        axis.set_ylabel("state 1", fontsize=8)
    _key(figure, (FAINT, 1.0), COLOURS[0])
    return figure


def principal_plane(points: Floats) -> tuple[Floats, Floats]:
    """Project points onto the two directions of largest variance.

    Args:
        points: [S, c].

    Returns:
        [S, 2], and the share of the variance along each direction [2]; 0 where d = 1 has no second one.
    """
    centred = points - points.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    plane, share = np.zeros((len(points), 2)), np.zeros(2)
    k = min(2, len(s))
    plane[:, :k] = u[:, :k] * s[:k]
    share[:k] = s[:k] ** 2 / max(float((s**2).sum()), 1e-300)
    return plane, share


def context_figure(title: str, context: Floats, family: Ints, expert: Ints, families: Sequence[str]) -> Any:
    """Draw contexts in their principal plane, coloured by hidden family beside coloured by expert.

    Args:
        title: heading.
        context: [S, c].
        family: label [S], -1 unknown.
        expert: [S].
        families: family names.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    plane, share = principal_plane(context)
    figure, axes = _panels(title, 2, 3.9)
    for label in np.unique(family):
        tint = FAMILY_COLOURS[label % len(FAMILY_COLOURS)] if label >= 0 else FAINT
        marker = MARKERS[label % len(MARKERS)] if label >= 0 else "."
        text = figure_text(families[label]) if label >= 0 else "unknown"
        look = {"s": 26, "marker": marker, "edgecolors": "white", "linewidths": 0.4}
        axes[0].scatter(*plane[family == label].T, color=tint, label=text, **look)
    for label in np.unique(expert):
        # Its number is the marker of an expert: a shape of the other panel would say that a family is meant.
        tint, marker = (colour(int(label)), f"${label}$") if label >= 0 else (FAINT, ".")
        text = f"expert {label}" if label >= 0 else "no expert"
        axes[1].scatter(*plane[expert == label].T, s=34, color=tint, marker=marker, label=text, linewidths=0.2)
    for axis, name in zip(axes, ("hidden family", "expert"), strict=True):
        axis.set_title(name, fontsize=9, color=INK, loc="left")
        axis.set_xlabel(f"first direction, {share[0]:.0%} of variance", fontsize=8)
        axis.set_ylabel(f"second direction, {share[1]:.0%}", fontsize=8)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=7, frameon=False)
    return figure


def gate_figure(title: str, steps: Ints, expert: Ints, family: Ints, families: Sequence[str]) -> Any:
    """Draw the expert of every environment over training, environments grouped by hidden family.

    Args:
        title: heading.
        steps: training step of each snapshot [S], rising.
        expert: expert of each environment at each snapshot [H, S].
        family: hidden label [S].
        families: family names.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ValueError: shapes that do not agree, or no snapshot.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    if not len(steps) or expert.shape != (len(steps), len(family)):
        raise ValueError(
            f"{title}: steps {steps.shape}, expert {expert.shape}, family {family.shape}; give [H], [H, S], [S]"
        )
    order = np.argsort(family, kind="stable")
    num = int(expert.max()) + 1
    figure, (axis,) = _panels(title, 1, 3.6, width=7.2)
    palette = ListedColormap([colour(k) for k in range(num)])
    edges = np.append(steps, steps[-1] + max(1, int(np.diff(steps[-2:]).sum())))
    axis.pcolormesh(edges, np.arange(len(family) + 1), expert[:, order].T, cmap=palette, vmin=-0.5, vmax=num - 0.5)
    for label in np.unique(family):
        rows = np.flatnonzero(family[order] == label)
        axis.axhline(rows[-1] + 1, color="white", lw=2)
        name = figure_text(families[label]) if label >= 0 else "unknown"
        axis.text(
            -0.01, rows.mean() + 0.5, name, transform=axis.get_yaxis_transform(), ha="right", va="center", fontsize=8
        )
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.set_xlabel("training step", fontsize=8)
    handles = [Patch(color=colour(k), label=f"expert {k}") for k in range(num)]
    axis.legend(handles=handles, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


# --- parts ------------------------------------------------------------------------------------------------------------


def _panels(title: str, count: int, height: float, width: float | None = None) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(
        figsize=(width or 3.3 * columns, height * rows + 0.5), dpi=130, facecolor="white", layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    figure.suptitle(title, fontsize=12, color=INK, weight="bold")
    for axis in axes[count:]:
        axis.set_axis_off()
    for axis in axes[:count]:
        axis.tick_params(labelsize=7, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
        if count > 1:  # small panels: most of the time of a figure is that of its ticks
            axis.locator_params(nbins=4)
    return figure, axes[:count]


def _key(figure: Any, truth: tuple[str, float], pred: str, states: Sequence[tuple[str, str]] = ()) -> None:
    """Say below all panels what is truth (colour, opacity of its dots), what is predicted, and colours of states."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], color=truth[0], alpha=truth[1], ls="", marker="o", ms=3, label="truth")]
    handles.append(Line2D([], [], color=pred, ls="-", label="prediction"))
    handles += [Patch(color=tint, label=name) for name, tint in states]
    columns = max(2, int(1.1 * figure.get_figwidth()))  # an inch for each
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spaced."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _finite(values: Floats) -> Floats:
    """Values up to the first one that is not finite, nan from there on."""
    bad = ~np.isfinite(values)
    return np.where(np.cumsum(bad) > 0, np.nan, values)


def _limits(set_limits: Any, truth: Floats) -> None:
    """Show the range of the truth with a margin: a prediction that explodes must not flatten it."""
    low, high = float(np.nanmin(truth)), float(np.nanmax(truth))
    margin = 0.25 * (high - low) or 1.0
    set_limits(low - margin, high + margin)


def write_trajectories(
    path: Path, title: str, truth: Floats, pred: Floats, dt: Floats, names: Sequence[str], given: int, most: int = 4
) -> None:
    """Write the first trajectory of a few environments for a page: truth and prediction [S, T, D], seconds [S, T]."""
    shown = _spread(len(truth), most)
    seconds = np.arange(truth.shape[2]) * np.asarray(dt, dtype=np.float64)[shown, None]
    arrays = {"truth": truth[shown, 0], "prediction": pred[shown, 0], "seconds": seconds}
    small = {name: np.asarray(values, dtype=np.float32) for name, values in arrays.items()}
    write_arrays(path, **small, name=np.array([names[e] for e in shown]), title=np.array(title), given=np.array(given))


# --- callback ---------------------------------------------------------------------------------------------------------


class SystemFigures(Report):
    """Write pictures into ``<run>/figures``: trajectories and phase portraits of a domain, and the map of contexts.

    The numbers of a few trajectories are kept in ``<run>/gallery/<domain>.npz``.

    ``test`` draws the seen domains, whose contexts are known; ``predict`` draws all, new environments too.
    """

    runs_network = True

    def __init__(self) -> None:
        super().__init__()
        self._contexts: list[dict[str, Any]] = []

    @override
    def start(self, task: BaseTask) -> None:
        self._contexts = []

    @override
    def gather(self, task: BaseTask, batch: Any, domain: str, batch_idx: int) -> None:
        folder = writing_dir(task.trainer)
        if folder is None or batch_idx or task.last_answer is None or task.data.role_of(domain) != "seen":
            return
        self._contexts.append(task.last_answer())
        self._draw(folder, task.data, self._contexts[-1], batch.num_given)

    @override
    def finish(self, task: BaseTask, folder: Path | None) -> None:
        if folder is None or not self._contexts:
            return
        parts = {k: np.concatenate([a[k].numpy() for a in self._contexts]) for k in ("context", "family", "expert")}
        families = task.data.facts["families"]
        figure = context_figure("contexts of the trained environments", **parts, families=families)
        save_figure(figure, folder / "figures" / "contexts.png")

    @override
    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        folder = writing_dir(trainer)
        if folder is not None and not batch_idx:
            self._draw(folder, cast(Any, trainer).datamodule, outputs, batch.num_given)

    def _draw(self, folder: Path, data: Any, answers: dict[str, Any], given: int) -> None:
        domain = answers["domain"]
        truth, pred, dt = (answers[key].numpy() for key in ("truth", "x", "dt"))
        names = [
            f"{n}, expert {k}" for n, k in zip(data.names_of(answers["env"], domain), answers["expert"], strict=True)
        ]
        title = f"{domain} ({data.role_of(domain)})"
        write_trajectories(folder / "gallery" / f"{domain}.npz", title, truth, pred, dt, names, given)
        figure = trajectory_figure(title, truth, pred, dt, names, given=given)
        save_figure(figure, folder / "figures" / f"{domain}.png")
        if truth.shape[3] > 1:
            save_figure(phase_figure(title, truth, pred, names), folder / "figures" / f"{domain}-phase.png")
