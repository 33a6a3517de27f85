# SPDX-License-Identifier: Apache-2.0
"""What experts know of voxels: domain and class, and what is left to know within a domain.

Shape legend: D domains, L labels of a factor, E experts.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from moeapps.training.callbacks import ExpertReport
from moeapps.training.callbacks.experts import LayerWork, information


class VoxelExpertReport(ExpertReport):
    """After a test, say what each layer's choice of experts tells about a voxel; every domain weighs the same.

    * ``mi_domain``: I(expert; domain) / H(domain),
    * ``mi_class``: I(expert; class name) / H(class name), names shared by domains being one,
    * ``mi_class_within``, ``mi_normal_within``, ``mi_range_within``: the same for class, normal direction and range
      within each domain, averaged over domains; what a domain's own statistics give away does not count here.

    Groups ``encoder``, ``decoder`` (means over layers) and ``encoder.<stage>.<block>`` ... in metrics/experts.json and
    metrics/test.json.
    """

    by_stage: ClassVar[bool] = True

    @override
    def numbers(self, layer: LayerWork) -> dict[str, float]:
        return informations(layer.tables)


def informations(tables: dict[str, Tensor]) -> dict[str, float]:
    """The numbers of one layer.

    Args:
        tables: factor -> float64 [D, L, E], voxels of each domain by label and expert; ``class`` is one of them.
    """
    even = {key: value / value.sum(dim=(1, 2), keepdim=True).clamp(min=1e-300) for key, value in tables.items()}
    numbers = {"mi_domain": information(even["class"].sum(dim=1)), "mi_class": information(even["class"].sum(dim=0))}
    for factor, table_DLE in even.items():
        inside = [information(table_LE) for table_LE in table_DLE if int((table_LE.sum(dim=1) > 0).sum()) > 1]
        numbers[f"mi_{factor}_within"] = sum(inside) / len(inside) if inside else 0.0
    return numbers
