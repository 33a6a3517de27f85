# SPDX-License-Identifier: Apache-2.0
"""Your own audio files: a folder and a table; and collections laid beside each other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from moeapps.data.cache import config_hash
from moeapps.data.domain import SPLITS, Role, Split
from moeapps.files import absent
from tasks.audio.data.prompt import Kind
from tasks.audio.data.readers.audio_files import AudioFileError, cut_at_pauses, read_audio, remark
from tasks.audio.data.readers.clip_table import ClipRow, read_clip_table
from tasks.audio.data.source import AudioSource, Clip
from tasks.audio.data.store import KeptAudio

log = logging.getLogger("moeapps")


class OwnAudio(KeptAudio):
    """Files below ``root``, listed in ``root/clips.csv`` (docs/audio_data.md): file, domain, kind, text, split, labels.

    Files of any rate and any number of channels become one channel at ``sample_rate``. A file longer than ``seconds``
    is cut at pauses, and its pieces have no text. Files whose split the table leaves open are split domain by domain.

    Args:
        root: folder of the files.
        table: name of the table below it.
        sample_rate: samples per second of the clips.
        seconds: longest clip.
        val_share: share of a domain's files without a split that is for validation.
        test_share: share of them that is for tests.
        seed: seed of the splits.
        split: split of all files without one in place of drawn ones: ``test`` for clips that are only to be continued.

    Raises:
        ValueError: a number out of its range, or a split that does not exist.
        AudioFileError: the table is missing or wrong, names a file that does not exist, or a domain of both kinds.
    """

    def __init__(
        self,
        *,
        root: Path,
        table: str = "clips.csv",
        sample_rate: int = 8000,
        seconds: float = 6.0,
        val_share: float = 0.1,
        test_share: float = 0.1,
        seed: int = 0,
        split: Split | None = None,
    ) -> None:
        if sample_rate < 1000 or seconds < 1:
            raise ValueError(f"sample_rate={sample_rate}, seconds={seconds}; use 1000 or more, and 1 or more")
        if not (val_share >= 0 and test_share >= 0 and val_share + test_share < 1):
            raise ValueError(f"val_share={val_share}, test_share={test_share}; 0 or more, and together less than 1")
        self.root, self.sample_rate, self.seconds, self.seed = Path(root), sample_rate, seconds, seed
        if split is not None and split not in SPLITS:
            raise ValueError(f"split={split!r} is not allowed; use one of {', '.join(SPLITS)}, or null to draw it")
        self.split = split
        self.shares: dict[Split, float] = {"test": test_share, "val": val_share}
        self.rows: dict[str, list[ClipRow]] = {}
        for row in read_clip_table(self.root / table):
            self.rows.setdefault(row.domain, []).append(row)
        for domain, rows in self.rows.items():
            if len({row.prompt.kind for row in rows}) > 1:
                raise AudioFileError(f"domain {domain!r} of {table} holds speech and music; make two domains of it")
            gone = [row.file for row in rows if not (self.root / row.file).is_file()]
            if gone:
                raise AudioFileError(f"{absent(self.root / gone[0])} ({len(gone)} missing of domain {domain!r})")
        self.domains = list(self.rows)

    @override
    def kind(self, domain: str) -> Kind:
        return self.rows[domain][0].prompt.kind

    @override
    def labels(self, domains: Sequence[str]) -> list[str]:
        return list(
            dict.fromkeys(label for name in domains for row in self.rows[name] for label in row.prompt.label_names)
        )

    @override
    def identity(self, domain: str) -> Any:
        stats = [(row, (self.root / row.file).stat()) for row in self.rows[domain]]
        files = [[row.file, row.split, vars(row.prompt), stat.st_size, stat.st_mtime_ns] for row, stat in stats]
        root = str(self.root.resolve())
        return ["OwnAudio", 1, root, files, self.sample_rate, self.seconds, self.shares, self.seed, self.split]

    @override
    def describe(self, domain: str) -> str:
        return f"own audio, {self.root.name}, {len(self.rows[domain])} files"

    def splits(self, domain: str) -> dict[str, Split]:
        """Return the split of each file: the table's, else drawn by the seed; of few files training has the first."""
        rows = self.rows[domain]
        chosen: dict[str, Split] = {row.file: row.split for row in rows if row.split is not None}
        free = [row.file for row in rows if row.split is None]
        if self.split is not None:
            return chosen | dict.fromkeys(free, self.split)
        generator = torch.Generator().manual_seed(int(config_hash([self.seed, domain]), 16))
        order = [free[i] for i in torch.randperm(len(free), generator=generator).tolist()]
        for split, share in self.shares.items():
            count = max(0, min(round(share * len(free)), len(order) - 1))
            chosen |= dict.fromkeys(order[:count], split)
            order = order[count:]
        return chosen | dict.fromkeys(order, "train")

    @override
    def read(self, domain: str, cache: Path | None) -> dict[Split, list[Clip]]:
        found: dict[Split, list[Clip]] = {split: [] for split in SPLITS}
        splits, odd = self.splits(domain), dict[str, list[str]]()
        for row in self.rows[domain]:
            pieces = cut_at_pauses(read_audio(self.root / row.file, self.sample_rate), self.sample_rate, self.seconds)
            whole = len(pieces) == 1
            for i, wave in enumerate(pieces):
                what = remark(wave)
                if what is not None:
                    odd.setdefault(what, []).append(row.file)
                if what == "silent":
                    continue
                prompt = row.prompt if whole else type(row.prompt)(row.prompt.kind, row.prompt.labels)
                name = row.file if whole else f"{row.file}#{i}"
                found[splits[row.file]].append(Clip(wave, prompt, name, ends=i == len(pieces) - 1))
        for what, files in odd.items():
            done = "are left out" if what == "silent" else "are used as they are"
            log.warning("domain %s: %d %s clips %s, the first of %s", domain, len(files), what, done, files[0])
        if not any(found.values()):
            raise AudioFileError(f"domain {domain!r} of {self.root} has no clip that is not silent")
        return found


class JoinedAudio(AudioSource):
    """Several collections as one: a model trained on one of them can be tested on, or continue, clips of another.

    Args:
        sources: the collections; the first one's roles are the default.

    Raises:
        ValueError: no collection, two with a domain of the same name, or with different sample rates.
    """

    domains: list[str]

    def __init__(self, *, sources: list[AudioSource]) -> None:
        self.sources = list(sources)
        rates = {source.sample_rate for source in self.sources}
        if len(rates) != 1:
            raise ValueError(f"collections with sample rates {sorted(rates)}; give one or more of the same rate")
        self.sample_rate = rates.pop()
        self._of = {domain: source for source in reversed(self.sources) for domain in source.domains}
        self.domains = [domain for source in self.sources for domain in source.domains]
        if len(self._of) < len(self.domains):
            twice = sorted({name for name in self.domains if self.domains.count(name) > 1})
            raise ValueError(f"two collections have domains named {', '.join(twice)}; rename one")
        self.default_roles = self.sources[0].default_roles  # type: ignore[misc]

    @override
    def bind(self, roles: dict[Role, list[str]]) -> None:
        super().bind(roles)
        for source in self.sources:
            source.bind({role: [n for n in names if self._of[n] is source] for role, names in roles.items()})

    @override
    def kind(self, domain: str) -> Kind:
        return self._of[domain].kind(domain)

    @override
    def labels(self, domains: Sequence[str]) -> list[str]:
        # Collection by collection: the labels of domains of one collection are in its own order.
        by_source = [[name for name in domains if self._of[name] is source] for source in self.sources]
        pairs = zip(self.sources, by_source, strict=True)
        return list(dict.fromkeys(label for source, names in pairs for label in source.labels(names)))

    @override
    def identity(self, domain: str) -> Any:
        return self._of[domain].identity(domain)

    @override
    def parts(self, domain: str) -> Sequence[str]:
        return self._of[domain].parts(domain)

    @override
    def missing(self, domain: str, cache: Path | None) -> str | None:
        return self._of[domain].missing(domain, cache)

    @override
    def prepare(self, cache: Path | None) -> None:
        for source in self.sources:
            source.prepare(cache)

    @override
    def clips(self, domain: str, split: Split, cache: Path | None) -> list[Clip]:
        return self._of[domain].clips(domain, split, cache)

    @override
    def describe(self, domain: str) -> str:
        return self._of[domain].describe(domain)
