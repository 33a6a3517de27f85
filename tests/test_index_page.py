# SPDX-License-Identifier: Apache-2.0
"""What a package index shows of README.md has no link that leads nowhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_of_moeapps", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_an_address_no_link_is_left_but_those_that_work_anywhere(setup: ModuleType) -> None:
    shown = setup.index_page(README, "")

    assert not [target for target in LINK.findall(shown) if not re.match(r"https?:|#", target)]
    assert "docs/evidence.md" in shown
    assert "A room seen by an unseen kind of depth camera" in shown


def test_with_an_address_every_link_leads_below_it(setup: ModuleType) -> None:
    shown = setup.index_page(README, "https://example.org/raw/main/")

    before = [target for target in LINK.findall(README) if not re.match(r"[a-z]+:|#", target)]
    after = [target for target in LINK.findall(shown) if target.startswith("https://example.org/raw/main/")]
    assert len(before) > 40
    assert after == [f"https://example.org/raw/main/{target}" for target in before]
    assert not [target for target in before if not (ROOT / target.partition("#")[0]).exists()]


def test_code_and_other_words_stay_as_they_are(setup: ModuleType) -> None:
    text = "a [b](c.md), [`c.md`](c.md) [f](#g) ![h](i.png)\n```\n[x](y.md)\n```\nlast\n"

    assert setup.index_page(text, "") == ("a b (`c.md`), `c.md` [f](#g) *(h)*\n```\n[x](y.md)\n```\nlast\n")
    assert setup.index_page("no link\n", "") == "no link\n"
