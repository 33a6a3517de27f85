# SPDX-License-Identifier: Apache-2.0
"""Readers of public point-cloud formats and of a user's own scans."""

from __future__ import annotations

from tasks.point_cloud.data.readers.nuscenes import NuScenes, NuScenesIndex
from tasks.point_cloud.data.readers.own import OwnLabels, OwnScans, read_own_scan, write_own_labels, write_own_scan
from tasks.point_cloud.data.readers.ply import PlyCloud, read_ply, write_ply
from tasks.point_cloud.data.readers.pointcept import (
    Matterport3DFolders,
    PointceptFolders,
    S3DISFolders,
    ScanNetFolders,
    Structured3DFolders,
    WaymoFolders,
)
from tasks.point_cloud.data.readers.scan import PointCloudFileError, RawScan, ScanReader, ScanRef, Split
from tasks.point_cloud.data.readers.scannet_raw import ScanNetMeshes
from tasks.point_cloud.data.readers.semantic_kitti import SemanticKITTI
from tasks.point_cloud.data.readers.values import make_scan

__all__ = [
    "Matterport3DFolders",
    "NuScenes",
    "NuScenesIndex",
    "OwnLabels",
    "OwnScans",
    "PlyCloud",
    "PointCloudFileError",
    "PointceptFolders",
    "RawScan",
    "S3DISFolders",
    "ScanNetFolders",
    "ScanNetMeshes",
    "ScanReader",
    "ScanRef",
    "SemanticKITTI",
    "Split",
    "Structured3DFolders",
    "WaymoFolders",
    "make_scan",
    "read_own_scan",
    "read_ply",
    "write_own_labels",
    "write_own_scan",
    "write_ply",
]
