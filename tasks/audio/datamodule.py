# SPDX-License-Identifier: Apache-2.0
"""Collections of speech and music as domains, in codes of a tokenizer that the training clips are fitted to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import SPLITS, Split
from moeapps.data.mixing import DomainMixing, MixingSampler
from moeapps.data.source import SourceDataModule
from moeapps.files import write_arrays
from tasks.audio.data.batch import AudioBatch, CodeClips, right_aligned
from tasks.audio.data.generated import GeneratedAudio
from tasks.audio.data.prompt import Prompt, PromptVocabulary
from tasks.audio.data.readers.audio_files import read_audio, wave_of
from tasks.audio.data.source import AudioSource, Clip
from tasks.audio.data.store import load_arrays
from tasks.audio.nets.tokenizers import MelRVQ, Tokenizer

CODES_VERSION = 1

TOKENIZER = "tokenizer.safetensors"

log = logging.getLogger("moeapps")


class AudioData(SourceDataModule):
    """Clips as codes, with prompts.

    The first `prepare_data` makes or reads the waves, fits the tokenizer to training clips and keeps its codes; later
    runs read the codes alone. Labels that no seen domain has are one unknown label to the model.

    Args:
        source: the clips; None means the generated ones of `GeneratedAudio`.
        tokenizer: what makes codes of waves, not fitted yet; None means `MelRVQ` with its defaults.
        tokenizer_domains: domains whose training clips the tokenizer is fitted to, none of them held out; None means
            the seen ones. Name them to compare runs that see different domains on one and the same tokenizer.
        batch_size: clips per training step and process.
        max_frames: most frames of an item: longer clips are cut at random in training, at a fixed place in evaluation.
        mixing: how training batches mix domains: concat (in proportion to size), balanced (each domain equally often)
            or one_domain (each batch from one domain).
        prompt_symbols: symbols of a prompt, labels first; what does not fit of the text is cut off.
        label_dropout: probability with which training replaces a label by the unknown one.
        music_share: share of the training clips of each music domain that is used; a larger share contains a smaller.
        options: further arguments of `SourceDataModule`.

    Raises:
        ValueError: a domain the source does not have, roles that overlap, another sample rate than the tokenizer's, a
            tokenizer fitted to held-out domains, or a number out of its range.
    """

    eval_factor = 2
    source: AudioSource

    def __init__(
        self,
        *,
        source: AudioSource | None = None,
        tokenizer: Tokenizer | None = None,
        tokenizer_domains: list[str] | None = None,
        batch_size: int = 16,
        max_frames: int = 96,
        mixing: DomainMixing = "concat",
        prompt_symbols: int = 48,
        label_dropout: float = 0.05,
        music_share: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(source=source or GeneratedAudio(), batch_size=batch_size, mixing=mixing, **options)
        self._tokenizer = MelRVQ(sample_rate=self.source.sample_rate) if tokenizer is None else tokenizer
        self.tokenizer_domains = list(self.roles["seen"] if tokenizer_domains is None else tokenizer_domains)
        self.max_frames, self.prompt_symbols = max_frames, prompt_symbols
        self.label_dropout, self.music_share = label_dropout, music_share
        self._check()
        self.vocabulary = PromptVocabulary(self.source.labels(self.roles["seen"]))

    def _check(self) -> None:
        self.source.check(self.tokenizer_domains)
        for name in ("max_frames", "prompt_symbols"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; use 1 or more")
        if not 0 <= self.label_dropout < 1 or not 0 < self.music_share <= 1:
            raise ValueError(
                f"label_dropout={self.label_dropout}, music_share={self.music_share}; allowed are [0, 1) and (0, 1]"
            )
        self._check_parts()
        if self._tokenizer.sample_rate != self.source.sample_rate:
            raise ValueError(
                f"the tokenizer takes {self._tokenizer.sample_rate} samples per second, the clips have "
                f"{self.source.sample_rate}; set both to one sample_rate"
            )

    def _check_parts(self) -> None:
        """Raise ValueError where two domains share recordings, or the tokenizer would be fitted to held-out ones."""
        owner: dict[str, str] = {}
        for domain in self.domain_names:
            for part in self.source.parts(domain):
                if part in owner:
                    raise ValueError(f"domains {owner[part]!r} and {domain!r} both hold {part!r}; name one of them")
                owner[part] = domain
        held = [*self.roles["validation"], *self.roles["unseen"]]
        fitted = {part for domain in self.tokenizer_domains for part in self.source.parts(domain)}
        if not fitted or fitted & {part for part, domain in owner.items() if domain in held}:
            raise ValueError(
                f"tokenizer_domains={self.tokenizer_domains}; name at least one, and none that is held out: "
                f"{', '.join(held)}"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """Domain names per role, and what a network and a checkpoint need to know of the codes and prompts.

        num_codebooks, num_codes, frame_rate and sample_rate (1/s), labels, num_symbols, max_frames, prompt_symbols,
        tokenizer (a hash of its settings and of the clips it is fitted to), kinds (domain -> speech or music).
        """
        return {
            **super().facts,
            "num_codebooks": self._tokenizer.num_codebooks,
            "num_codes": self._tokenizer.num_codes,
            "frame_rate": self._tokenizer.frame_rate,
            "sample_rate": self._tokenizer.sample_rate,
            "labels": self.vocabulary.labels,
            "num_symbols": len(self.vocabulary),
            "max_frames": self.max_frames,
            "prompt_symbols": self.prompt_symbols,
            "tokenizer": self.tokenizer_key,
            "kinds": {name: self.source.kind(name) for name in self.domain_names},
        }

    @property
    def tokenizer_key(self) -> str:
        """Hash of the tokenizer's settings and of the clips it is fitted to; known before it is fitted."""
        clips = [self.source.identity(name) for name in self.tokenizer_domains]
        return config_hash([CODES_VERSION, self._tokenizer.settings(), clips])

    @property
    def tokenizer(self) -> Tokenizer:
        """The fitted tokenizer; fitted or read on first use."""
        if not bool(self._tokenizer.fitted):
            self._tokenizer.load(build_once(self._file("tokenizer", self.tokenizer_key, "safetensors"), self._fit))
        return self._tokenizer

    @override
    def prepare_data(self) -> None:
        super().prepare_data()
        for name in self.eval_domains("test"):
            self._arrays(name)

    @override
    def dataset(self, domain: str, split: Split) -> CodeClips:
        arrays = self._arrays(domain)
        prompts = [self.vocabulary.encode(prompt) for prompt in self._prompts(arrays, split)]
        codes, lengths = torch.from_numpy(arrays[f"{split}_codes"]), torch.from_numpy(arrays[f"{split}_length"])
        dataset = CodeClips(
            codes,
            lengths,
            right_aligned(prompts, self.prompt_symbols),
            torch.from_numpy(arrays[f"{split}_ends"]),
            max_frames=self.max_frames,
            seed=self.seed,
            num_labels=len(self.vocabulary.labels),
            label_dropout=self.label_dropout,
            train=split == "train",
            domain=self.domain_names.index(domain),
        )
        shared = split == "train" and self.role_of(domain) == "seen" and self.source.kind(domain) == "music"
        return dataset.part(self.music_share) if shared and self.music_share < 1 else dataset

    @override
    def follow(self, sampler: MixingSampler) -> None:
        """The epoch of the sampler decides where clips are cut."""
        for name in self.present("seen"):
            cast(CodeClips, self.get_dataset(name, "train")).clock = sampler

    def clips(self, domain: str, split: Split) -> list[Clip]:
        """Return waves and prompts of all clips of one domain and split; row i of its data set is clip i.

        Of music domains with a `music_share` the data set has only some rows, named by its ``rows``.
        """
        self.role_of(domain)
        return self.source.clips(domain, split, self.cache_dir)

    def codes(self, domain: str, split: Split, rows: Tensor | None = None) -> AudioBatch:
        """Return clips of one domain and split as one batch; all of them where ``rows`` (int64) are not named."""
        dataset = cast(CodeClips, self.get_dataset(domain, split))
        return dataset.batch(torch.arange(len(dataset)) if rows is None else rows)

    def batches_of(self, inputs: Any, *, clips: Any = None) -> list[AudioBatch]:
        """Return a batch of prompts, each with the clip to go on with, if any.

        Args:
            inputs: a prompt or a list of them, as ``'speech voice=low: la mo ti'``.
            clips: for each prompt an audio file, or a wave float32 [n] at the sample rate of the codes; None for none.

        Raises:
            ValueError: a prompt that is not understood or names a label that the network does not know, another number
                of clips, or a clip that cannot be read.
        """
        prompts = [Prompt.parse(line) for line in ([inputs] if isinstance(inputs, str) else inputs)]
        unknown = {label for prompt in prompts for label in prompt.label_names} - set(self.vocabulary.labels)
        if unknown or not prompts:
            known = ", ".join(self.vocabulary.labels)
            raise ValueError(f"{len(prompts)} prompts, unknown labels {sorted(unknown)}; known are {known}")
        given: list[Any] = (
            [None] * len(prompts) if clips is None else [clips] if isinstance(clips, str | Path) else list(clips)
        )
        if len(given) != len(prompts):
            raise ValueError(f"{len(given)} clips for {len(prompts)} prompts; give one for each, or None")
        symbols = right_aligned([self.vocabulary.encode(prompt) for prompt in prompts], self.prompt_symbols)
        rows = torch.arange(1)
        parts = [
            AudioBatch(self._codes_of(clip)[None], symbols[i : i + 1], rows < 0, rows, rows + i)
            for i, clip in enumerate(given)
        ]
        return [AudioBatch.cat(parts)]

    def _codes_of(self, clip: Any) -> Tensor:
        """Codes int64 [K, T] of a file or a wave; none of no clip."""
        if clip is None:
            return torch.empty(self._tokenizer.num_codebooks, 0, dtype=torch.int64)
        rate = self._tokenizer.sample_rate
        wave = read_audio(Path(clip), rate) if isinstance(clip, str | Path) else wave_of(clip)
        if wave.ndim != 1 or not len(wave):
            raise ValueError(f"a clip of shape {tuple(wave.shape)}; give a wave [n] at {rate} samples per second")
        return self.tokenizer.encode(wave[None])[0]

    @override
    def save_parts(self, folder: Path) -> list[str]:
        self.tokenizer.save(folder / TOKENIZER)
        return [TOKENIZER]

    @override
    def load_parts(self, folder: Path) -> None:
        if (folder / TOKENIZER).is_file():
            self._tokenizer.load(folder / TOKENIZER)

    def collate(self, items: AudioBatch | list[AudioBatch]) -> AudioBatch:
        """Return the batch: clips come whole, except for single ones asked for one by one."""
        return items if isinstance(items, AudioBatch) else AudioBatch.cat(items)

    # Checkpoints --------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        codes = {"tokenizer": self.tokenizer_key, "digest": self.tokenizer.digest, "labels": self.vocabulary.labels}
        return {**super().state_dict(), "codes": codes}

    @override
    def check_trained_on(self, state_dict: dict[str, Any]) -> None:
        """Refuse weights that were trained on other codes or on other symbols of prompts.

        Raises:
            ValueError: they were.
        """
        trained = state_dict.get("codes", {})
        here = (self.tokenizer_key, self.tokenizer.digest)
        if trained and trained["tokenizer"] != here[0] and trained["digest"] != here[1]:
            raise ValueError(
                f"the checkpoint was trained on codes of tokenizer {trained['tokenizer']}, this data has codes of "
                f"{here[0]}; give the source, seed, tokenizer and tokenizer_domains of its training (for other clips "
                "beside them see configs/data/own_clips.yaml), or train anew"
            )
        if trained and trained["labels"] != self.vocabulary.labels:
            raise ValueError(
                f"the checkpoint knows the labels {', '.join(trained['labels'])}, this data has "
                f"{', '.join(self.vocabulary.labels)}; give the seen domains of its training"
            )

    # Codes --------------------------------------------------------------------------------------------------------

    def _file(self, name: str, key: str, ending: str) -> Path:
        return cache_dir("audio", root=self.cache_dir) / f"{name}-{key}.{ending}"

    def _fit(self, path: Path) -> None:
        clips = [clip for name in self.tokenizer_domains for clip in self.source.clips(name, "train", self.cache_dir)]
        log.info("fitting %s to %d training clips", type(self._tokenizer).__name__, len(clips))
        self._tokenizer.fit([clip.wave for clip in clips]).save(path)

    def _arrays(self, domain: str) -> dict[str, Any]:
        key = config_hash([self.tokenizer_key, self.source.identity(domain)])
        path = build_once(self._file(f"{domain}-codes", key, "npz"), lambda path: self._encode(domain, path))
        arrays = load_arrays(path)
        if str(arrays.get("digest")) != self.tokenizer.digest:
            raise ValueError(
                f"{path} holds codes of another tokenizer ({arrays.get('digest')}, here {self.tokenizer.digest}); "
                "delete it, it is made anew"
            )
        return arrays

    def _encode(self, domain: str, path: Path) -> None:
        arrays: dict[str, Any] = {"digest": self.tokenizer.digest}
        for split in SPLITS:
            clips = self.source.clips(domain, split, self.cache_dir)
            codes = [self.tokenizer.encode(clip.wave[None])[0] for clip in clips]
            empty = torch.empty(self._tokenizer.num_codebooks, 0, dtype=torch.int64)
            arrays[f"{split}_codes"] = torch.cat([empty, *codes], 1).to(torch.int32).numpy()
            arrays[f"{split}_length"] = np.array([code.shape[1] for code in codes], np.int64)
            arrays[f"{split}_ends"] = np.array([clip.ends for clip in clips], np.bool_)
            arrays[f"{split}_prompt"] = json.dumps([vars(clip.prompt) for clip in clips])
        write_arrays(path, **arrays)

    @staticmethod
    def _prompts(arrays: dict[str, Any], split: Split) -> list[Prompt]:
        return [Prompt(**entry) for entry in json.loads(str(arrays[f"{split}_prompt"]))]
