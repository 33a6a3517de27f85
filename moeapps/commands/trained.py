# SPDX-License-Identifier: Apache-2.0
"""Rebuild task and data of a run folder, with trained weights, for commands and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from moeapps.commands.listing import find_config

if TYPE_CHECKING:
    from torch import nn

    from moeapps.commands.run import Cli

# What of a run's config makes its task and data; the rest is about training.
_KEPT = ("seed_everything", "system", "name", "model", "data")


def build(run: Path | None, configs: Sequence[Path] = (), packages: frozenset[str] | None = None) -> Cli:
    """Build task and data from a run's config, from config files, or from both, the files on top.

    Args:
        run: a run's own folder, runs/<system>/<name>/version_k; None for the files alone.
        configs: config files.
        packages: what may be imported beside our own packages (``--trust``).

    Raises:
        UsageError: the folder has no config.yaml, or a config is wrong.
        TrustError: a config names code of a run folder.
    """
    import yaml

    from moeapps.bounds import read_yaml
    from moeapps.commands.boundary import UsageError
    from moeapps.commands.checkpoints import config_of
    from moeapps.commands.names import read_config
    from moeapps.commands.overlays import one_system
    from moeapps.commands.run import Cli, import_tasks, quiet
    from moeapps.commands.trust import Trust

    quiet()
    typed = [str(path) for path in configs]
    configs, copies = [find_config(path) for path in typed], {}
    with TemporaryDirectory() as folder:
        words = [word for path in configs for word in ("--config", str(path))]
        held = None
        if run is not None:
            held = read_yaml(config_of(run))
            if not isinstance(held, dict):
                raise UsageError(f"{config_of(run)} holds no options; give the folder of a run")
            part = Path(folder) / "config.yaml"
            part.write_text(yaml.safe_dump({key: held[key] for key in _KEPT if key in held}), encoding="utf-8")
            words, copies = ["--config", str(part), *words], {str(part): config_of(run)}
        there = [(name, read_config(path)) for name, path in zip(typed, configs, strict=True) if path.is_file()]
        one_system(there, held)
        import_tasks(words)
        return Cli([*words, "--trainer.logger", "false"], run=False, trust=Trust(packages, run, copies))


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put the weights of a checkpoint into a model; nothing but tensors is unpickled.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    from moeapps.training.checkpoints import read_checkpoint

    model.load_state_dict(read_checkpoint(checkpoint)["state_dict"])
