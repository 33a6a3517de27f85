# SPDX-License-Identifier: Apache-2.0
"""The validation score that chooses the checkpoint: the configured one, or that of seen domains if data is short."""

from __future__ import annotations

from dataclasses import dataclass

from moeapps.training.scores import ScoreTable


@dataclass(frozen=True)
class Selection:
    """The key that chooses, and why it is not the configured one.

    Args:
        key: ``val/<role or domain>/<metric>``.
        reason: one line to print where it replaces another key, else None.
    """

    key: str
    reason: str | None = None


def select(monitor: str, table: ScoreTable, *, minimum: int, unit: str) -> Selection:
    """Choose the key that best.ckpt is picked by.

    A score of a handful of units ranks epochs by chance. If fewer than ``minimum`` scorable units lie behind the
    validation role, or there is no validation domain, the mean over the seen domains' validation parts takes its place:
    what a practitioner without a further domain would use. Units do not depend on the model, so that all epochs of a
    run, and all runs on the same data, choose by the same key.

    Args:
        monitor: the configured key; only ``val/validation/<metric>`` can be replaced.
        table: scores of a validation.
        minimum: units that the validation role needs.
        unit: what a unit is called.
    """
    parts = monitor.split("/", 2)
    if len(parts) != 3 or parts[:2] != ["val", "validation"]:
        return Selection(monitor)
    roles = {score.domain: score.role for score in table.scores}
    counts = {
        role: sum(table.scorable.get(domain, 0) for domain, own in roles.items() if own == role)
        for role in ("validation", "seen")
    }
    if counts["validation"] >= minimum or "seen" not in roles.values():
        return Selection(monitor)
    names = [domain for domain, role in roles.items() if role == "validation"]
    have = "there is no validation domain"
    if names:
        have = f"there are {counts['validation']} in {', '.join(names)}"
    reason = (
        f"best.ckpt is chosen by val/seen/{parts[2]} ({counts['seen']} scorable {unit}), not by {monitor}: {have}, and "
        f"choosing needs {minimum}"
    )
    return Selection(f"val/seen/{parts[2]}", reason)
