# SPDX-License-Identifier: Apache-2.0
"""What wins when a checkpoint is given: explicit flag > checkpoint > YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def checkpoint_hparams(path: str | Path | None) -> dict[str, Any]:
    """Return the model options stored in a checkpoint as ``class_path`` and ``init_args``; empty if there are none.

    The data module's facts are left out: they come from the data of this run.
    """
    if not path or not Path(path).is_file():
        return {}
    stored = torch.load(path, weights_only=True, map_location="cpu").get("hyper_parameters", {})
    if "_class_path" not in stored:
        return {}
    options = {key: value for key, value in stored.items() if key not in ("_class_path", "_instantiator", "facts")}
    return {"class_path": stored["_class_path"], "init_args": options}


def explicit_flags(words: Sequence[str], key: str) -> list[str]:
    """Return the words that set ``key`` or something below it, as ``--key.a 1``, ``--key.a=1`` or ``--key Class``.

    A file given as the whole value (``--model model.yaml``) counts as YAML, not as a flag.
    """
    flags: list[str] = []
    i = 0
    while i < len(words):
        name, equals, value = words[i].partition("=")
        takes = 1 if equals else 2
        if name == f"--{key}" or name.startswith(f"--{key}."):
            value = value if equals else (words[i + 1] if i + 1 < len(words) else "")
            if not value.endswith((".yaml", ".yml", ".json")):
                flags += words[i : i + takes]
            i += takes
        else:
            i += 1
    return flags


def differences(yaml: dict[str, Any], stored: dict[str, Any], final: dict[str, Any]) -> list[str]:
    """Return one line per option where the checkpoint won over YAML, or a flag over the checkpoint."""
    a, b, c = (flatten(value) for value in (yaml, stored, final))
    lines = []
    for key in sorted(a | b | c):
        if c.get(key) != b.get(key):
            lines.append(f"model.{key}: flag {c.get(key)!r} wins over checkpoint {b.get(key)!r}")
        elif b.get(key) != a.get(key):
            lines.append(f"model.{key}: checkpoint {b.get(key)!r} wins over config {a.get(key)!r}")
    return lines


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dictionary as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = item
    return flat
