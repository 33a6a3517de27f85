# SPDX-License-Identifier: Apache-2.0
"""``moeapps sample --run DIR ...``: draw images with a trained run; the run's task does it."""

from __future__ import annotations


def main(args: list[str]) -> int:
    """Draw images."""
    from moeapps.commands.hooks import run_hook

    return run_hook("sample", "draw images with a trained run", args, weights=True)
