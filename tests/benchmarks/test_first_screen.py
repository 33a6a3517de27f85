# SPDX-License-Identifier: Apache-2.0
"""The pictures of README's first screen: drawn from the numbers of a run folder, small, named in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import first_screen
from tests.reporting.made_runs import write

ROOT = Path(__file__).resolve().parents[2]


def texts(figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_weights_of_gates_are_drawn_where_a_gate_may_see(tmp_path: Path) -> None:
    level = {"gates": ["click", "like"], "experts": ["click", "like", "shared"]}
    level |= {"share": [[0.25, 0.0, 0.75], [0.0, 0.1, 0.9]]}
    write(tmp_path / "metrics" / "experts.json", {"levels": [{}, level]})
    assert texts(first_screen.draw_home(tmp_path)) == ["25", "75", "10", "90"]


def test_the_list_of_the_user_with_most_past_items_is_drawn_with_signs(tmp_path: Path) -> None:
    ranked = [{"item": "3: jazz", "score": 1.0, "taken": True}, {"item": "4: rock", "score": -1.0, "taken": False}]
    short = {"ranked": ranked[:1], "past": []}
    long = {"ranked": ranked, "past": [{"item": "9: swing", "added": [0.5, -0.5]}]}
    write(tmp_path / "gallery" / "lists.json", {"lists": [short, long]})
    figure = first_screen.draw_aw_moe(tmp_path)
    assert texts(figure) == ["jazz: taken", "rock", "+", "\N{MINUS SIGN}"]
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["swing"]


def test_only_mended_images_of_unseen_domains_are_drawn(tmp_path: Path) -> None:
    kinds = ["mended", "spoilt", "mended", "mended", "mended", "mended"]
    domains = ["tiles", "tiles", "plain", "tiles", "tiles", "far_off"]
    words = {"label": ["digit_1"] * 6, "before": [f"digit_{k}" for k in range(6)], "after": ["digit_1"] * 6}
    (tmp_path / "gallery").mkdir()
    image = np.zeros((6, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "gallery" / "changed.npz", image=image, kind=kinds, domain=domains, **words)
    roles = {"tiles": {"role": "unseen"}, "far_off": {"role": "unseen"}, "plain": {"role": "seen"}}
    write(tmp_path / "metrics" / "adaptation.json", {"domains": roles})
    figure = first_screen.draw_meta_dmoe(tmp_path)
    # By column of axes, two images of a domain at most: 0 and 3 of tiles, 5 of far_off.
    assert sorted(texts(figure)) == ["0 → 1", "3 → 1", "5 → 1"]


@pytest.mark.parametrize("system", first_screen.DRAWN)
def test_the_committed_picture_is_small_and_on_the_first_screen(system: str) -> None:
    path = first_screen.FIGURES / f"{system}.png"
    assert path.stat().st_size < 150_000
    with Image.open(path) as picture:
        assert picture.size[0] >= 800
    first, _, _ = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")
    assert re.search(rf"!\[[^\]]{{20,}}\]\(docs/figures/{system}\.png\)", first)


def test_what_is_none_of_them_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_screen.main(["promoe", "runs/promoe/base"]) == 2
    assert "usage: python -m benchmarks.first_screen {home,aw_moe,meta_dmoe} RUN" in capsys.readouterr().err
