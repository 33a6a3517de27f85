# SPDX-License-Identifier: Apache-2.0
"""Label sets of every domain and public data set, as names.

Labels travel through the data code as names and become numbers only against the label set of their own domain. Two
data sets that share a name share a target; a name on disk can never be read against another set's order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

IGNORE = -1
"""Index of points without a label; no loss and no metric counts them."""

WORLD_NAMES: tuple[str, ...] = (
    *("wall", "floor", "ceiling", "door", "window", "table", "chair", "cabinet", "shelves", "bed", "sofa"),
    *("beam", "column", "board", "lamp", "nightstand", "clutter"),
    *("road", "sidewalk", "curb", "parking", "terrain", "building", "fence", "vegetation", "trunk", "pole"),
    *("traffic sign", "car", "truck", "person", "barrier", "traffic cone", "power line"),
)
"""What the simulated worlds are made of. A domain answers in its own vocabulary (``WORLD_TO_LABEL``)."""

_SIMULATED: dict[str, tuple[str, ...]] = {
    "rgbd_room": ("wall", "floor", "door", "table", "chair", "cabinet", "bed", "sofa"),
    "tls_office": (
        *("ceiling", "floor", "wall", "beam", "column", "window"),
        *("door", "table", "chair", "board", "clutter"),
    ),
    "cad_room": (
        *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window"),
        *("shelves", "ceiling", "nightstand", "lamp"),
    ),
    "drive64": (
        *("car", "truck", "person", "road", "parking", "sidewalk", "building", "fence"),
        *("vegetation", "trunk", "terrain", "pole", "traffic sign"),
    ),
    "drive32": (
        *("barrier", "car", "pedestrian", "traffic cone", "truck"),
        *("driveable surface", "sidewalk", "terrain", "manmade", "vegetation"),
    ),
    "als": ("ground", "building", "vegetation", "car", "power line"),
    "drive16": ("vehicle", "pedestrian", "road", "sidewalk", "building", "vegetation", "pole"),
    "rgbd_house": ("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "ceiling", "other furniture"),
    "drive_front": (
        *("car", "truck", "pedestrian", "sign", "pole", "building"),
        *("vegetation", "tree trunk", "curb", "road", "sidewalk"),
    ),
    "real_als": ("ground", "building", "vegetation"),
}

_PUBLIC: dict[str, tuple[str, ...]] = {
    "scannet20": (
        *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf"),
        *("picture", "counter", "desk", "curtain", "refrigerator", "shower curtain", "toilet", "sink"),
        *("bathtub", "other furniture"),
    ),
    "s3dis": (
        *("ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair", "sofa"),
        *("bookcase", "board", "clutter"),
    ),
    "structured3d": (
        *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "picture", "desk"),
        *("shelves", "curtain", "dresser", "pillow", "mirror", "ceiling", "refrigerator", "television"),
        *("nightstand", "sink", "lamp", "other structure", "other furniture", "other prop"),
    ),
    "matterport3d": (
        *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf"),
        *("picture", "counter", "desk", "curtain", "refrigerator", "shower curtain", "toilet", "sink"),
        *("bathtub", "other", "ceiling"),
    ),
    "semantickitti": (
        *("car", "bicycle", "motorcycle", "truck", "other vehicle", "person", "bicyclist", "motorcyclist"),
        *("road", "parking", "sidewalk", "other ground", "building", "fence", "vegetation", "trunk", "terrain"),
        *("pole", "traffic sign"),
    ),
    "nuscenes": (
        *("barrier", "bicycle", "bus", "car", "construction vehicle", "motorcycle", "pedestrian"),
        *("traffic cone", "trailer", "truck", "driveable surface", "other flat", "sidewalk", "terrain"),
        *("manmade", "vegetation"),
    ),
    "waymo": (
        *("car", "truck", "bus", "other vehicle", "motorcyclist", "bicyclist", "pedestrian", "sign"),
        *("traffic light", "pole", "construction cone", "bicycle", "motorcycle", "building", "vegetation"),
        *("tree trunk", "curb", "road", "lane marker", "other ground", "walkable", "sidewalk"),
    ),
}

LABEL_SETS: dict[str, tuple[str, ...]] = {**_SIMULATED, **_PUBLIC}
"""Class names per domain, in the order of their indices.

Source: simulated sets are ours, shaped after the public set of the same kind; public sets in the order of the labels
on disk (Pointcept/Pointcept, pointcept/datasets and preprocessing), abbreviations spelled out.
"""

_STREET_COMMON = {"car": "car", "truck": "truck", "sidewalk": "sidewalk", "vegetation": "vegetation"}
_ROOM_COMMON = {name: name for name in ("wall", "floor", "door", "table", "chair", "cabinet", "bed", "sofa")}

WORLD_TO_LABEL: dict[str, dict[str, str]] = {
    "rgbd_room": {**_ROOM_COMMON, "beam": "wall", "column": "wall", "shelves": "cabinet", "nightstand": "cabinet"},
    "tls_office": {
        **{name: name for name in _SIMULATED["tls_office"]},
        **dict.fromkeys(("cabinet", "shelves", "bed", "sofa", "lamp", "nightstand"), "clutter"),
    },
    "cad_room": {**{name: name for name in _SIMULATED["cad_room"]}, "beam": "ceiling", "column": "wall"},
    "drive64": {
        **{name: name for name in _SIMULATED["drive64"]},
        **{"curb": "sidewalk", "barrier": "fence"},
    },
    "drive32": {
        **_STREET_COMMON,
        **dict.fromkeys(("road", "parking"), "driveable surface"),
        **dict.fromkeys(("building", "fence", "pole", "traffic sign"), "manmade"),
        **{"curb": "sidewalk", "terrain": "terrain", "trunk": "vegetation", "person": "pedestrian"},
        **{"barrier": "barrier", "traffic cone": "traffic cone"},
    },
    "als": {
        **dict.fromkeys(("road", "sidewalk", "curb", "parking", "terrain"), "ground"),
        **{"building": "building", "car": "car", "power line": "power line"},
        **dict.fromkeys(("vegetation", "trunk"), "vegetation"),
    },
    "drive16": {
        **dict.fromkeys(("car", "truck"), "vehicle"),
        **dict.fromkeys(("road", "parking"), "road"),
        **dict.fromkeys(("sidewalk", "curb"), "sidewalk"),
        **dict.fromkeys(("vegetation", "trunk"), "vegetation"),
        **{"person": "pedestrian", "building": "building", "pole": "pole", "traffic sign": "pole"},
    },
    "rgbd_house": {
        **_ROOM_COMMON,
        **{"ceiling": "ceiling", "shelves": "cabinet", "beam": "ceiling", "column": "wall"},
        **dict.fromkeys(("lamp", "nightstand", "clutter"), "other furniture"),
    },
    "drive_front": {
        **_STREET_COMMON,
        **dict.fromkeys(("road", "parking"), "road"),
        **{"person": "pedestrian", "traffic sign": "sign", "pole": "pole", "building": "building"},
        **{"trunk": "tree trunk", "curb": "curb"},
    },
}
"""World name -> label name per simulated domain; a world name that is not listed is ignored."""


def label_index(allowed: Sequence[str], names: Iterable[str], what: str = "data") -> dict[str, int]:
    """Return ``{name: index}`` for ``names`` within the label set ``allowed``.

    Raises:
        ValueError: a name is not in the label set.
    """
    names = list(names)
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        raise ValueError(
            f"{what}: labels {unknown} are not in its label set ({', '.join(allowed)}); "
            "rename or map them, or list them as ignored"
        )
    return {name: list(allowed).index(name) for name in names}


def label_set(domain: str) -> tuple[str, ...]:
    """Class names of ``domain``.

    Raises:
        ValueError: the domain has no label set.
    """
    if domain not in LABEL_SETS:
        raise ValueError(f"no label set for {domain!r}; known: {', '.join(LABEL_SETS)}; add one to labels.py")
    return LABEL_SETS[domain]
