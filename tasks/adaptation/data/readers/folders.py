# SPDX-License-Identifier: Apache-2.0
"""Image folders: ``root/<domain>/<class>/<image>``, as DomainBed keeps its sets and as one would keep one's own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from moeapps.data.domain import Role
from moeapps.data.images.arrays import ImageFileError
from moeapps.data.images.folders import class_files, found_table
from moeapps.data.images.pictures import ENDINGS
from moeapps.files import is_clutter
from tasks.adaptation.data.readers.files import DomainFiles, FileDomains, ImageForm, domain_name

log = logging.getLogger("moeapps")


class DomainFolders(FileDomains):
    """A folder per domain, in it a folder per class, in it pictures at any depth (see `ENDINGS`).

    A domain has the name of its folder, with an underscore for what a name may not hold ("Real World" is Real_World).
    Classes of one name are one class, whichever domain they are in.

    Args:
        root: folder that holds the domains.
        form: how a file becomes an image.
        same_classes: every domain must have every class, as in DomainBed; false lets domains lack some.
        options: see `FileDomains`.

    Raises:
        ImageFileError: no such folder, two folders of one name, a class that a domain lacks, a file that is not read.
    """

    def __init__(
        self, *, root: Path, form: ImageForm | None = None, same_classes: bool = False, **options: Any
    ) -> None:
        super().__init__(root=root, form=form, **options)
        self.same_classes = same_classes
        self.class_names = []
        self._folders: dict[str, Path] = {}
        for path in sorted(self.root.iterdir()):
            if path.is_dir() and not is_clutter(path):
                name = domain_name(path.name)
                if name in self._folders:
                    raise ImageFileError(f"{path} and {self._folders[name]} both give the domain {name!r}; rename one")
                self._folders[name] = path
        self.domains = list(self._folders)
        self._files: dict[str, dict[str, list[Path]]] = {}

    @override
    def bind(self, roles: dict[Role, list[str]]) -> None:
        super().bind(roles)
        self._files = {name: class_files(self._folders[name], ENDINGS) for names in roles.values() for name in names}
        self.class_names = sorted({name for classes in self._files.values() for name in classes})
        for domain, classes in self._files.items():
            lacking = [name for name in self.class_names if name not in classes]
            if lacking and self.same_classes:
                raise ImageFileError(
                    f"domain {domain!r} lacks the classes {', '.join(lacking[:5])} that others have; complete it, or "
                    "set same_classes: false"
                )

    def prepare(self, cache: Path | None) -> None:
        """Show what was found, before anything is trained on it, and pack it."""
        counts = {domain: {n: len(f) for n, f in classes.items()} for domain, classes in self._files.items()}
        log.info("%s holds, by class and domain:\n%s", self.root, found_table(counts))
        super().prepare(cache)

    @override
    def of(self, domain: str) -> DomainFiles:
        number = {name: place for place, name in enumerate(self.class_names)}
        classes = self._files[domain]
        label = torch.tensor([number[name] for name, files in classes.items() for _ in files])
        return DomainFiles([path for files in classes.values() for path in files], label)

    @override
    def describe(self, domain: str) -> str:
        return f"image folders, {self.root.name}/{self._folders[domain].name}, {self.image_size} x {self.image_size}"
