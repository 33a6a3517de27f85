# SPDX-License-Identifier: Apache-2.0
"""The site is built without a warning, leads nowhere wrong and asks the network for nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", ".", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if path.name not in ("search.html", "genindex.html"))


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    text = {page: page.read_text(encoding="utf-8") for page in pages(site)}
    marks = {page: set(re.findall(r'id="([^"]+)"', content)) for page, content in text.items()}
    wrong = []
    for page, content in text.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', content):
            path, _, mark = unquote(link).partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            file = (page.parent / path.partition("?")[0]).resolve() if path else page
            known = marks.get(file)
            if not file.exists() or (mark and known is not None and mark not in known):
                wrong.append((page.name, link))

    assert len(text) > 60
    assert not wrong


@pytest.mark.slow
def test_a_browser_that_shows_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in pages(site):
        content = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe|audio|video|source)\b[^>]*\bsrc="([^"]+)"', content)
        fetched += re.findall(r'<link\b[^>]*rel="stylesheet"[^>]*href="([^"]+)"', content)
        assert not [link for link in fetched if re.match(r"(https?:)?//", link)], page
    assert "<math" in (site / "docs/api/routers.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_root_of_the_site_leads_to_its_first_page(site: Path) -> None:
    target = re.search(r'url=([^"]+)"', (site / "index.html").read_text(encoding="utf-8"))

    assert target is not None
    assert (site / target[1]).is_file()
