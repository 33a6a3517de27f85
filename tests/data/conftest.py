# SPDX-License-Identifier: Apache-2.0
"""What several files of tests in this folder begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.archives_common import PAYLOAD, _tar


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A source archive that holds one file of data, and a program that must not run."""
    return _tar(tmp_path / "pkg.tar.gz", {"pkg-1.0/data/a.las": PAYLOAD, "pkg-1.0/setup.py": b"raise SystemExit(1)"})
