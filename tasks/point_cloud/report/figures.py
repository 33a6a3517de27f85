# SPDX-License-Identifier: Apache-2.0
"""Pictures of labelled scans: one figure per domain with truth, prediction and expert side by side.

Matplotlib is imported when a figure is made and not before. R points; images are float arrays [H, W, 4].
"""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from moeapps.files import write_arrays
from moeapps.reporting.figures import COLOURS, INK, save_figure
from moeapps.text import figure_text
from moeapps.training.callbacks.report import Report, writing_dir
from moeapps.training.task import BaseTask
from tasks.point_cloud.data.labels import IGNORE
from tasks.point_cloud.nets.text import normalise_name, taxonomy

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CATEGORY_COLOURS: dict[str, str] = {
    **{"floor": "#b9a58a", "ceiling": "#d9d6cf", "partition": "#a8b4c4", "door": "#8a5a3c", "window": "#7fc4e0"},
    **{"panel": "#4f6d8f", "cloth": "#b48ead", "roof": "#a65f4a", "step": "#c2a878", "upright": "#7d8896"},
    **{"lying": "#9aa26b", "carriageway": "#5b5f6b", "footway": "#c7a0c9", "edge": "#8b7d96", "lot": "#8f97b3"},
    **{"rail": "#6b5b4d", "soil": "#b8a25a", "liquid": "#4f9bd9", "house": "#c98f6b", "crossing": "#9b6f5a"},
    **{"mast": "#70757f", "fence": "#b5813f", "barrier": "#d9793a", "wire": "#3d3f4a", "post": "#e0b33c"},
    **{"sign": "#e6534e", "cone": "#f2862f", "foliage": "#5fa052", "tree": "#3f7f48", "trunk": "#7a5234"},
    **{"pot": "#86b86b", "light": "#3f6fd1", "heavy": "#6a4fc1", "any vehicle": "#8577b8", "pedal": "#2fb0c9"},
    **{"engine": "#1f8a9e", "train": "#4d5aa8", "on foot": "#e0457b", "riding": "#c2316a", "four legs": "#a3486f"},
    **{"worktop": "#d98e4a", "bedside": "#e3b07a", "seat": "#5b8def", "lounge": "#c75b7a", "closed": "#6d9f71"},
    **{"open": "#93b35a", "basin": "#5fb6b0", "seat of water": "#3f918c", "cold": "#a9c4d6", "display": "#474f7a"},
    **{"sleep": "#9c6ac4", "lighting": "#f0c75e", "piece": "#b07aa1", "small": "#9c9183", "other": "#8d8d8d"},
    "measurement": "#c0c0c0",
}
"""Colour of the last category above a name in the taxonomy; names of one category differ in lightness."""


def class_colour(name: str) -> tuple[float, float, float]:
    """Colour of a class name, the same in every figure; synonyms have like colours.

    Args:
        name: class name; one that the taxonomy does not know gets a hue from its hash.

    Returns:
        Red, green, blue in [0, 1].
    """
    path = taxonomy().get(normalise_name(name))
    if path is None:
        hue = hashlib.sha256(normalise_name(name).encode()).digest()[0] / 256
        return colorsys.hls_to_rgb(hue, 0.55, 0.45)
    siblings = [other for other, where in taxonomy().items() if where[:-1] == path[:-1]]
    hue, light, saturation = colorsys.rgb_to_hls(*_rgb(CATEGORY_COLOURS[path[-2]]))
    step = (0, 0.12, -0.12, 0.2, -0.2, 0.06, -0.06, 0.27, -0.26)[siblings.index(path[-1]) % 9]
    return colorsys.hls_to_rgb(hue, min(max(light + step, 0.15), 0.88), saturation)


def expert_colour(expert: int) -> tuple[float, float, float]:
    """Colour of an expert, repeated after the eighth: red, green, blue in [0, 1]."""
    return _rgb(COLOURS[expert % 8])


def _rgb(value: str) -> tuple[float, float, float]:
    return int(value[1:3], 16) / 255, int(value[3:5], 16) / 255, int(value[5:7], 16) / 255


def view(pos_R3: Floats, yaw: float = 0.6, pitch: float = 0.85) -> tuple[Floats, Floats]:
    """Turn points to an orthographic view from obliquely above.

    Args:
        pos_R3: metres, z up.
        yaw: radians about the vertical axis.
        pitch: radians of the view above the horizon; pi / 2 is a map.

    Returns:
        Metres to the right and up in the picture [R, 2], and nearness to the viewer in metres [R].
    """
    x, y, z = (pos_R3 - pos_R3.mean(axis=0)).T
    across, along = x * np.cos(yaw) - y * np.sin(yaw), x * np.sin(yaw) + y * np.cos(yaw)
    up, near = along * np.sin(pitch) + z * np.cos(pitch), z * np.sin(pitch) - along * np.cos(pitch)
    return np.stack([across, up], axis=1), near


def extent(flat_R2: Floats) -> tuple[Floats, Floats]:
    """Lowest and highest place [2] of what a picture shows: all points but strays.

    A stray is farther beyond the middle 98% of either axis than these are wide: one would make a speck of the rest.

    Args:
        flat_R2: metres to the right and up.
    """
    low, high = np.quantile(flat_R2, (0.01, 0.99), axis=0)
    wide = np.maximum(high - low, 1e-6)
    kept = flat_R2[((flat_R2 >= low - wide) & (flat_R2 <= high + wide)).all(axis=1)]
    return (kept.min(axis=0), kept.max(axis=0)) if len(kept) else (low, high)


def fitting_height(pos_R3: Floats, width: int = 640) -> int:
    """Pixels of height at which a picture of these points has no empty half; a third to all of its width."""
    low, high = extent(view(pos_R3)[0])
    across, up = np.maximum(high - low, 1e-6)
    return round(float(np.clip(up / across, 1 / 3, 1.0)) * width)


def project(pos_R3: Floats, width: int, height: int, margin: float = 0.0) -> tuple[Ints, Ints, Floats]:
    """Fit a `view` of points to an image, with one scale for both axes.

    Args:
        pos_R3: metres, z up.
        width: pixels.
        height: pixels.
        margin: pixels that stay free at every edge.

    Returns:
        Column and row of each point (those of strays may lie outside the image), and its nearness in pixels.
    """
    flat_R2, near = view(pos_R3)
    low, high = extent(flat_R2)
    room = np.maximum(np.array([width, height]) - 2 * margin, 1)
    metres = max(float(((high - low) / room).max()), 1e-9)  # per pixel
    across, up = ((flat_R2 - (low + high) / 2) / metres).T
    return np.floor(across + width / 2).astype(np.int64), np.floor(height / 2 - up).astype(np.int64), near / metres


def render(pos_R3: Floats, colour_R3: Floats, width: int = 640, height: int = 480) -> Floats:
    """Draw points as discs with a depth buffer and shade the edges of depth.

    Eye-dome lighting (Boucheny 2009): a pixel is darkened by exp(-mean of how much nearer its neighbours are), which
    shows shape without normals. Drawn at twice the size and averaged down. No disc is cut by the edge of the image.

    Args:
        pos_R3: metres, z up; at least one point.
        colour_R3: red, green, blue in [0, 1].
        width: pixels of the image.
        height: pixels of the image.

    Returns:
        [height, width, 4] in [0, 1]; transparent where there is no point.
    """
    wide, high = 2 * width, 2 * height
    reach = int(np.clip(np.sqrt(0.3 * wide * high / len(pos_R3)), 2, 14))
    column, row, near = project(pos_R3, wide, high, margin=reach + 4)
    whole = (column >= reach) & (column < wide - reach) & (row >= reach) & (row < high - reach)
    far_first = np.flatnonzero(whole)[np.argsort(near[whole])]
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = dy**2 + dx**2 <= reach**2
    pixel = ((row[far_first, None] + dy[disc]) * wide + column[far_first, None] + dx[disc]).ravel()
    source = np.repeat(far_first, np.count_nonzero(disc))
    nearest, image = np.full(high * wide, -np.inf), np.ones((high * wide, 3))
    nearest[pixel] = near[source]  # of several writes to a pixel the last, nearest one stays
    image[pixel] = colour_R3[source]
    depth, drawn = nearest.reshape(high, wide), np.isfinite(nearest).reshape(high, wide)
    image = image.reshape(high, wide, 3) * _eye_dome(depth, drawn, step=max(2, reach // 2))[..., None]
    rgba = np.concatenate([image * drawn[..., None], drawn[..., None]], axis=2)
    small = rgba.reshape(height, 2, width, 2, 4).mean(axis=(1, 3))
    small[..., :3] /= np.maximum(small[..., 3:], 1e-9)
    return cast(Floats, np.clip(small, 0, 1))


def _eye_dome(depth: Floats, drawn: npt.NDArray[np.bool_], step: int) -> Floats:
    """Shade in (0, 1] of each pixel from the nearness of eight neighbours ``step`` pixels away."""
    solid = np.where(drawn, depth, 0.0)
    hidden = np.zeros_like(solid)
    for dy in (-step, 0, step):
        for dx in (-step, 0, step):
            nearer = np.roll(solid, (dy, dx), axis=(0, 1)) - solid
            seen = np.roll(drawn, (dy, dx), axis=(0, 1)) & drawn
            hidden += np.where(seen, np.clip(nearer / (12 * step), 0, 1), 0)
    return cast(Floats, np.exp(-0.16 * hidden))


@dataclass(frozen=True)
class ScanPicture:
    """What a figure shows of one scan; unlabelled points are left out of all panels.

    Attributes:
        title: heading, e.g. domain and role.
        pos_R3: metres.
        truth_R: class index, -1 unlabelled.
        pred_R: class index.
        names: class names of the label set.
        expert_R: expert of each point in one layer, -1 none; None where the network has no experts.
        note: small print under the heading.
    """

    title: str
    pos_R3: Floats
    truth_R: Ints
    pred_R: Ints
    names: Sequence[str]
    expert_R: Ints | None = None
    note: str = ""


def scan_figure(scan: ScanPicture, dpi: int = 150) -> Any:
    """Draw truth, prediction and (where there are experts) expert of one scan.

    Points named ceiling are not drawn, or every room would be a box with its lid on.

    Args:
        scan: what to draw.
        dpi: dots per inch.

    Returns:
        A ``matplotlib.figure.Figure``, 3 panels wide.

    Raises:
        ValueError: No labelled point below the ceiling.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lids = [i for i, name in enumerate(scan.names) if normalise_name(name) == "ceiling"]
    kept = (scan.truth_R != IGNORE) & ~np.isin(scan.truth_R, lids)
    if not kept.any():
        raise ValueError(f"{scan.title}: no labelled point to draw")
    pos, truth, pred = scan.pos_R3[kept].astype(np.float64), scan.truth_R[kept], scan.pred_R[kept]
    palette = np.array([class_colour(name) for name in scan.names])
    panels = [("truth", palette[truth]), (f"prediction, {np.mean(truth == pred):.0%} of points right", palette[pred])]
    handles = [[Patch(color=palette[c], label=figure_text(scan.names[c])) for c in np.union1d(truth, pred)]]
    if scan.expert_R is not None:
        expert = scan.expert_R[kept]
        tints = np.array([expert_colour(e) for e in range(int(expert.max()) + 1)] + [(0.8, 0.8, 0.8)])
        panels.append(("expert", tints[expert]))
        present = [e for e in np.unique(expert) if e >= 0]
        handles.append([Patch(color=tints[e], label=f"expert {e}  {np.mean(expert == e):.0%}") for e in present])
    height = fitting_height(pos)
    wide, inches = 4.6 * len(panels), 4.5 * height / 640
    columns = [_columns(handles[0], 9.0), 3]
    lines = max(-(-len(own) // most) for own, most in zip(handles, columns, strict=False))
    below, above = 0.2 + 0.22 * lines, 0.75
    figure = Figure(figsize=(wide, above + inches + below), dpi=dpi, facecolor="white")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    foot = below / (above + inches + below)
    figure.subplots_adjust(left=0.01, right=0.99, top=foot * (1 + inches / below), bottom=foot, wspace=0.06)
    for axis, (label, colour) in zip(axes, panels, strict=True):
        axis.imshow(render(pos, colour, height=height), interpolation="antialiased")
        axis.set_title(label, fontsize=10, color=INK, loc="left", pad=4)
        axis.set_axis_off()
    top = 1 - 0.16 / (above + inches + below)
    figure.text(0.013, top, figure_text(scan.title), fontsize=14, color=INK, weight="bold", va="top")
    figure.text(0.987, top, figure_text(scan.note), fontsize=9, color="#6b7280", va="top", ha="right")
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK, "loc": "upper left"}
    style |= {"handlelength": 1.0, "handleheight": 1.0, "columnspacing": 1.4, "borderaxespad": 0}
    places = [0.013, 0.672]
    for own, most, left in zip(handles, columns, places, strict=False):
        figure.legend(handles=own, ncols=most, bbox_to_anchor=(left, foot * (1 - 0.1 / below)), **style)
    return figure


def _columns(handles: Sequence[Any], inches: float) -> int:
    """How many entries of a legend stand side by side in so many inches, each as wide as the longest."""
    longest = max(len(handle.get_label()) for handle in handles)
    return max(1, int(inches / (0.45 + 0.085 * longest)))


class ScanFigures(Report):
    """Write ``<run>/figures/<domain>.png`` in ``test``: the first scan of every domain, put together from its tiles.

    Some of its points are kept in ``<run>/gallery/<domain>.npz``.

    Only the first batch of a domain is looked at, so a scan of many tiles may be shown in part.
    """

    @override
    def gather(self, task: BaseTask, batch: Any, domain: str, batch_idx: int) -> None:
        folder = writing_dir(task.trainer)
        if folder is None or batch_idx or task.last_answer is None:
            return
        picture = picture_of(task.last_answer(), task.data.role_of(domain))
        if (picture.truth_R != IGNORE).any():
            save_figure(scan_figure(picture), folder / "figures" / f"{domain}.png")
            write_scan(folder / "gallery" / f"{domain}.npz", picture)


def write_scan(path: Path, scan: ScanPicture, most: int = 4000) -> None:
    """Write at most so many labelled points of a scan, evenly chosen, for a page that turns them."""
    kept = np.flatnonzero(scan.truth_R != IGNORE)
    kept = kept[np.linspace(0, len(kept) - 1, min(most, len(kept))).round().astype(np.int64)]
    expert_R = np.full(len(scan.truth_R), -1) if scan.expert_R is None else scan.expert_R
    labels = {"truth": scan.truth_R, "prediction": scan.pred_R, "expert": expert_R}
    write_arrays(
        path,
        position=scan.pos_R3[kept].astype(np.float32),
        **{name: label_R[kept].astype(np.int16) for name, label_R in labels.items()},
        name=np.array(list(scan.names)),
        title=np.array(scan.title),
        note=np.array(scan.note),
    )


def picture_of(answers: list[dict[str, Any]], role: str) -> ScanPicture:
    """Join the tiles of the first scan among the answers of ``PointCloudTask.predict_step``.

    Args:
        answers: per tile; tiles of one scan carry its name.
        role: role of the domain, for the title.
    """
    first = answers[0]
    tiles = [answer for answer in answers if answer["name"] == first["name"]]

    def joined(key: str) -> npt.NDArray[Any]:
        # One raw point of each voxel: the value at the voxel's first place in `inverse`.
        return np.concatenate([t[key].numpy()[np.unique(t["inverse"].numpy(), return_index=True)[1]] for t in tiles])

    return ScanPicture(
        title=f"{first['domain']} ({role})",
        pos_R3=np.concatenate([tile["pos"].numpy() for tile in tiles]),
        truth_R=np.concatenate([tile["truth"].numpy() for tile in tiles]),
        pred_R=joined("label"),
        names=first["names"],
        expert_R=None if first["expert"] is None else joined("expert"),
        note=first["name"],
    )
