# SPDX-License-Identifier: Apache-2.0
"""docs/reports.md shows a gallery of a package of the reader's own; what it shows is run here."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reports.md"


def shown() -> dict[str, dict[str, Any]]:
    """The files of the page, run: path -> what each defines."""
    found: dict[str, dict[str, Any]] = {}
    for path, text in re.findall(r"^```python\n# ([\w/]+\.py)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        found[path] = {}
        exec(compile(text, path, "exec"), found[path])
    return found


def test_the_gallery_of_the_page_shows_what_its_report_kept(tmp_path: Path) -> None:
    files = shown()
    kept = files["handwriting/report/kept.py"]["Kept"]()
    task = SimpleNamespace(net=lambda x: torch.eye(10)[x.flatten(1).sum(1).long()])  # an image of sum n is an n
    images = torch.zeros(6, 8, 8)
    images[:, 0, :6] = torch.tril(torch.ones(6, 6))  # sums 1 to 6
    label = torch.tensor([1, 2, 9, 4, 5, 6])

    kept.start(task)
    for domain in ("at_0", "at_45"):
        for index in range(2):
            kept.gather(task, (images if index == 0 else -images, label), domain, index)
    kept.finish(task, tmp_path)
    rooms = files["handwriting/report/gallery.py"]["gallery"](tmp_path)

    assert [room.title for room in rooms] == ["at_0", "at_45"]
    assert [one.caption for one in rooms[0].exhibits] == [f"taken for {n}" for n in (1, 2, 3, 4)]
    assert [one.title for one in rooms[1].exhibits] == ["a 1", "a 2", "a 9", "a 4"]
