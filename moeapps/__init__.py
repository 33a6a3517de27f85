# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts models outside language: one core, seven published systems."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from moeapps.loading import Trained

__version__ = "0.2.0"


def load(
    run: str | Path,
    *,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    trust: Iterable[str] | None = None,
) -> Trained:
    """Return the trained model of a run, ready for inputs of one's own: ``load(run).predict(inputs)``.

    Args:
        run: runs/<system>/<name> (its newest version), a version of it, or a folder that ``moeapps export`` wrote.
        checkpoint: a file in place of the best checkpoint of the run.
        device: where the model is put.
        trust: the only packages that its config may import beside ours and torch's, as ``--trust``; () for none.

    Raises:
        ValueError: no such run, or one that cannot be read; one sentence that says what to do.
    """
    from moeapps.loading import load_run

    return load_run(run, checkpoint=checkpoint, device=device, trust=None if trust is None else frozenset(trust))
