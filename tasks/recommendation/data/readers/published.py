# SPDX-License-Identifier: Apache-2.0
"""What every reader of a public data set says about it, and how it finds the files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from moeapps.files import absent
from tasks.recommendation.data.readers.blocks import stamp
from tasks.recommendation.data.readers.values import TableError


class Published:
    """A data set in its published layout below a folder.

    Args:
        root: folder of the published files.

    Attributes:
        name: the data set's name.
        terms: licence or terms of use.
        get: how to get the files.
        revision: raised when the same files and settings give something else than before.
    """

    name: ClassVar[str]
    terms: ClassVar[str]
    get: ClassVar[str]
    revision: ClassVar[int] = 1

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def files(self) -> list[Path]:
        """Return the published files that are read, out of `find`."""
        raise TypeError(f"{type(self).__name__} must define files()")

    def find(self, pattern: str) -> list[Path]:
        """Return the files below the root that a shell pattern names, packed ones too.

        Raises:
            TableError: there is none; the text says where the data set comes from, and on which terms.
        """
        found = sorted(path for ending in ("", ".gz", ".bz2", ".zst") for path in self.root.glob(pattern + ending))
        if not found:
            raise TableError(
                f"{self.name}: {absent(self.root / pattern)}; root must be the folder of the published files. "
                f"{self.get} Terms: {self.terms}."
            )
        return found

    def stamps(self) -> list[tuple[str, int, int]]:
        """Return what a cache made of the files hangs on."""
        return [stamp(path) for path in self.files()]
