# SPDX-License-Identifier: Apache-2.0
"""What wins when a checkpoint is given: explicit flag > checkpoint > YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeapps.training.checkpoints import read_checkpoint


def checkpoint_hparams(path: str | Path | None) -> dict[str, Any]:
    """Return the model options stored in a checkpoint as ``class_path`` and ``init_args``; empty if there are none.

    The data module's facts are left out: they come from the data of this run.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path or not Path(path).is_file():
        return {}
    stored = read_checkpoint(path, weights=False).get("hyper_parameters", {})
    if "_class_path" not in stored:
        return {}
    options = {key: value for key, value in stored.items() if key not in ("_class_path", "_instantiator", "facts")}
    return {"class_path": stored["_class_path"], "init_args": options}


def insert_config(words: Sequence[str], path: str) -> list[str]:
    """Return the words with one more config file, ordered so that it beats the other files and loses to every flag.

    The parser lets the last word win; so the files come first, then this one, then the flags.
    """
    files: list[str] = []
    flags: list[str] = []
    rest = iter(words[1:])
    for word in rest:
        name = word.partition("=")[0]
        target = files if name in ("-c", "--config") else flags
        target.append(word)
        if word in ("-c", "--config"):
            target.append(next(rest, ""))
    return [words[0], *files, "--config", path, *flags]


def differences(yaml: dict[str, Any], stored: dict[str, Any], final: dict[str, Any]) -> list[str]:
    """Return one line per option where the checkpoint won over YAML, or a flag over the checkpoint."""
    a, b, c = (flatten(value) for value in (yaml, stored, final))
    lines = []
    for key in sorted(b):
        if c.get(key) != b[key]:
            lines.append(f"model.{key}: flag {c.get(key)!r} wins over checkpoint {b[key]!r}")
        elif b[key] != a.get(key):
            lines.append(f"model.{key}: checkpoint {b[key]!r} wins over config {a.get(key)!r}")
    return lines


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dictionary as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = list(item) if isinstance(item, tuple) else item
    return flat
