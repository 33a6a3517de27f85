# SPDX-License-Identifier: Apache-2.0
"""Archives made in a moment, for tests of fetching and unpacking."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

PAYLOAD = b"points" * 100


def _tar(path: Path, entries: dict[str, bytes], extra: Callable[[tarfile.TarFile], None] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        if extra:
            extra(file)
    return path
