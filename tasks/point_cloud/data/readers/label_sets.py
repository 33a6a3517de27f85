# SPDX-License-Identifier: Apache-2.0
"""Raw ids of the public data sets, by name, and how a label set is chosen in YAML.

What a raw id means (``*_RAW``) and which class a raw name belongs to (``*_CLASSES``) are kept apart, and joined by
name when a reader is made: no table here pairs a number with a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from moeapps.bounds import BoundError, read_yaml
from tasks.point_cloud.data.labels import LABEL_SETS, label_set

KITTI_RAW: dict[int, str] = {
    **{0: "unlabeled", 1: "outlier", 10: "car", 11: "bicycle", 13: "bus", 15: "motorcycle", 16: "on-rails"},
    **{18: "truck", 20: "other-vehicle", 30: "person", 31: "bicyclist", 32: "motorcyclist", 40: "road"},
    **{44: "parking", 48: "sidewalk", 49: "other-ground", 50: "building", 51: "fence", 52: "other-structure"},
    **{60: "lane-marking", 70: "vegetation", 71: "trunk", 72: "terrain", 80: "pole", 81: "traffic-sign"},
    **{99: "other-object", 252: "moving-car", 253: "moving-bicyclist", 254: "moving-person"},
    **{255: "moving-motorcyclist", 256: "moving-on-rails", 257: "moving-bus", 258: "moving-truck"},
    259: "moving-other-vehicle",
}
"""SemanticKITTI raw ids (Behley et al. 2019; semantic-kitti-api, config/semantic-kitti.yaml)."""

KITTI_CLASSES: dict[str, str] = {
    **{name: name for name in ("car", "bicycle", "motorcycle", "truck", "person", "bicyclist", "motorcyclist")},
    **{name: name for name in ("road", "parking", "sidewalk", "building", "fence", "vegetation", "trunk")},
    **{"terrain": "terrain", "pole": "pole", "traffic-sign": "traffic sign", "other-ground": "other ground"},
    **dict.fromkeys(("bus", "on-rails", "other-vehicle"), "other vehicle"),
    **dict.fromkeys(("moving-bus", "moving-on-rails", "moving-other-vehicle"), "other vehicle"),
    **{f"moving-{name}": name for name in ("car", "truck", "person", "bicyclist", "motorcyclist")},
    "lane-marking": "road",
}
"""Raw name -> one of the 19 classes; unlabeled, outlier, other-structure and other-object are ignored."""

NUSCENES_RAW: dict[int, str] = dict(
    enumerate(
        (
            *("noise", "animal", "human.pedestrian.adult", "human.pedestrian.child"),
            *("human.pedestrian.construction_worker", "human.pedestrian.personal_mobility"),
            *("human.pedestrian.police_officer", "human.pedestrian.stroller", "human.pedestrian.wheelchair"),
            *("movable_object.barrier", "movable_object.debris", "movable_object.pushable_pullable"),
            *("movable_object.trafficcone", "static_object.bicycle_rack", "vehicle.bicycle", "vehicle.bus.bendy"),
            *("vehicle.bus.rigid", "vehicle.car", "vehicle.construction", "vehicle.emergency.ambulance"),
            *("vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer", "vehicle.truck"),
            *("flat.driveable_surface", "flat.other", "flat.sidewalk", "flat.terrain", "static.manmade"),
            *("static.other", "static.vegetation", "vehicle.ego"),
        )
    )
)
"""nuScenes-lidarseg raw ids 0..31 (Fong et al. 2022; category.json of the data set, field ``index``)."""

NUSCENES_CLASSES: dict[str, str] = {
    **{"movable_object.barrier": "barrier", "vehicle.bicycle": "bicycle", "vehicle.car": "car"},
    **dict.fromkeys(("vehicle.bus.bendy", "vehicle.bus.rigid"), "bus"),
    **{"vehicle.construction": "construction vehicle", "vehicle.motorcycle": "motorcycle"},
    **{f"human.pedestrian.{who}": "pedestrian" for who in ("adult", "child", "construction_worker", "police_officer")},
    **{"movable_object.trafficcone": "traffic cone", "vehicle.trailer": "trailer", "vehicle.truck": "truck"},
    **{"flat.driveable_surface": "driveable surface", "flat.other": "other flat", "flat.sidewalk": "sidewalk"},
    **{"flat.terrain": "terrain", "static.manmade": "manmade", "static.vegetation": "vegetation"},
}
"""Raw name -> one of the 16 classes of the lidarseg challenge; everything else is ignored."""

NYU40_RAW: dict[int, str] = dict(
    enumerate(
        (
            *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf"),
            *("picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror"),
            *("floor mat", "clothes", "ceiling", "books", "refrigerator", "television", "paper", "towel"),
            *("shower curtain", "box", "whiteboard", "person", "nightstand", "toilet", "sink", "lamp"),
            *("bathtub", "bag", "other structure", "other furniture", "other prop"),
        ),
        start=1,
    )
)
"""NYU-40 ids 1..40, used by ScanNet's .labels.ply files (Silberman et al. 2012; Dai et al. 2017)."""

ASPRS = (
    *("ground", "low vegetation", "medium vegetation", "high vegetation", "building"),
    *("water", "rail", "road", "wire", "tower", "bridge"),
)
"""Class names of classified aerial scans (ASPRS LAS 1.4 R15, table 17), both kinds of wire as one."""

_MORE: dict[str, tuple[str, ...]] = {"asprs": ASPRS}


def id_table(raw: Mapping[int, str], classes: Mapping[str, str], names: tuple[str, ...]) -> dict[int, int]:
    """Join raw ids to indices of ``names`` by name; ids whose name has no class are left out (ignored).

    Raises:
        ValueError: a class is not among ``names``.
    """
    unknown = sorted(set(classes.values()) - set(names))
    if unknown:
        raise ValueError(f"classes {unknown} are not among the names {list(names)}; add them or map them elsewhere")
    return {raw_id: names.index(classes[name]) for raw_id, name in raw.items() if name in classes}


def named(choice: str | list[str]) -> tuple[str, ...]:
    """Return the class names that a reader's ``label_set`` argument means.

    Args:
        choice: the key of a known label set, the path of a YAML list of names, or the names themselves.

    Raises:
        ValueError: neither a known label set nor a YAML file with a list of names.
    """
    if not isinstance(choice, str):
        return tuple(choice)
    if choice in LABEL_SETS:
        return label_set(choice)
    if choice in _MORE:
        return _MORE[choice]
    path = Path(choice).expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        known = ", ".join((*LABEL_SETS, *_MORE))
        raise ValueError(f"label_set {choice!r} is unknown; known: {known}; or give a .yaml file with a list of names")
    try:
        names = read_yaml(path)
    except (yaml.YAMLError, BoundError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} holds no list of names; write one class name per line, each after '- '")
    return tuple(names)
