# SPDX-License-Identifier: Apache-2.0
"""``moeapps fid-stats --run DIR | --config FILE ...``: statistics of images for Fréchet distances; the data does it."""

from __future__ import annotations


def main(args: list[str]) -> int:
    """Write statistics."""
    from moeapps.commands.hooks import run_hook

    return run_hook("fid-stats", "statistics of a data set or a folder of images", args, weights=False)
