# SPDX-License-Identifier: Apache-2.0
"""``moeapps curriculum``: a chain of trainings, each from the weights of the one before, resumable at every point.

Every stage is a ``fit`` with an overlay of its own. A stage that is done is not run again, one that was interrupted
goes on where it stopped, and one that was made by other settings, or from other weights, is refused. What was done is
kept in ``stage.json`` beside the versions of each stage's run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeapps.commands.boundary import UsageError, guarded, without_debug
from moeapps.commands.names import check, split

USAGE = """usage: moeapps curriculum --config FILE [--config FILE ...] [options of fit] [--redo]
                          --stage FILE [options of this stage] --stage FILE [options of this stage] ...

Train stages one after the other. Each begins with the weights of the one before, as its model.init_args.start says.
What stands before the first --stage is for all of them; options win over the files of the stages.

  --name NAME      of the last stage's run, runs/<system>/NAME (default: curriculum); earlier ones are NAME_stage0, ...
  --shared DIR     keep earlier stages there, found again by any chain that begins with the same ones (and seeds)
  --redo           train stages again whose settings or checkpoints have changed since, and those that follow

The same command goes on after an interruption; stages that are done are left alone. The last stage is tested.

  moeapps curriculum --config configs/unimoe_audio.yaml --stage configs/stages/unimoe_audio_0.yaml \\
      --stage configs/stages/unimoe_audio_1.yaml --trainer.max_epochs 4"""
START = "model.init_args.start"
log = logging.getLogger("moeapps")


@dataclass(frozen=True)
class Stage:
    """One training of the chain.

    Args:
        number: its place, from 0.
        config: the overlay.
        name: of its run.
        words: its words for ``fit``, without the weights that it starts from.
        folder: where its versions are.
        last: whether the chain ends with it.
        root: folder of all runs of the stage, where it is not the usual one.
    """

    number: int
    config: str
    name: str
    words: tuple[str, ...]
    folder: Path
    last: bool
    root: Path | None = None


@dataclass
class Done:
    """What is kept of a stage.

    Args:
        settings: digest of its files and words.
        source: digest of the checkpoint it started from; None for the first.
        run: its run folder, once it is finished.
        checkpoint: digest of the last checkpoint there.
        seconds: how long the last command that worked on it took.
        first: number of the first version that these settings made; earlier ones are of others.
    """

    settings: str
    source: str | None
    run: str | None = None
    checkpoint: str | None = None
    seconds: float = field(default=0.0)
    first: int = 0

    @classmethod
    def read(cls, file: Path) -> Done | None:
        """Return what a file says, None where there is none."""
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def write(self, file: Path) -> None:
        """Write the file whole or not at all."""
        from moeapps.files import write_json

        write_json(file, asdict(self))


def main(args: list[str]) -> int:
    """Run a chain; report what is wrong in a few lines."""
    if not args or {"-h", "--help"} & set(args):
        print(USAGE)
        return 0 if args else 2
    words, debug = without_debug(args)

    def work() -> int:
        run_chain([word for word in words if word != "--redo"], redo="--redo" in words)
        return 0

    return guarded(work, debug=debug)


def run_chain(args: Sequence[str], *, redo: bool = False) -> Path:
    """Run every stage that is not done, in order; return the run folder of the last.

    Raises:
        UsageError: wrong words, or a stage that was made by other settings.
        StageError: a checkpoint that cannot be started from.
    """
    from moeapps.commands.run import quiet

    quiet()
    source: Path | None = None
    for stage in plan(args):
        with _alone(stage):
            source = run_stage(stage, source, redo=redo)
    assert source is not None
    return source


def plan(args: Sequence[str]) -> list[Stage]:
    """Cut the words of a command line into stages.

    Raises:
        UsageError: no stage, a file that is not there, or a later stage that does not say how it starts.
    """
    from moeapps.commands.listing import find_config, located

    common, parts = _cut(args)
    if not parts:
        raise UsageError("give the stages in order, each with --stage FILE; `moeapps curriculum --help` shows how")
    for config, own in parts:
        check(["fit", *common, "--config", config, *own])
    from moeapps.commands.messages import merged_config
    from moeapps.training.folders import run_place
    from moeapps.training.precedence import insert_config

    _tell_replaced(common, parts)
    name, shared = _option(common, "--name") or "curriculum", _option(common, "--shared")
    common = located(_without(_without(common, "--name"), "--shared"))
    stages: list[Stage] = []
    for number, (config, own) in enumerate(parts):
        for word in ("--name", "--shared"):
            if _option(own, word):
                raise UsageError(f"--stage {config}: {word} is for all stages; give it before the first --stage")
        files, flags = split(["--config", config, *own])
        words = ["fit", *common]
        for file in map(find_config, files):
            if not file.is_file():
                raise UsageError(f"--stage {config}: there is no file {file}; `moeapps list` shows all configs")
            words = insert_config(words, str(file))
        words += flags
        merged = merged_config(words)
        if number and not _start_of(merged):
            raise UsageError(f"--stage {config}: a stage after the first must say how it starts; give {START} there")
        last = number == len(parts) - 1
        own_name = name if last else f"{name}_stage{number}"
        root = None if last or shared is None else Path(shared)
        if root is not None:
            chain = "".join([*(settings_digest(stage.words) for stage in stages), settings_digest(words)])
            own_name = f"{hashlib.sha256(chain.encode()).hexdigest()[:12]}_stage{number}"
        system = _option(words, "--system") or str(merged.get("system", "custom"))
        folder = run_place(system, own_name, root)
        stages.append(Stage(number, config, own_name, tuple(words), folder, last, root))
    return stages


def _tell_replaced(common: Sequence[str], parts: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Say which values of the overlays for all stages the files of stages replace, a line for each stage.

    The first file is the base, which stages are made to change; flags before the first stage win over all files.
    """
    from moeapps.commands.listing import find_config
    from moeapps.commands.names import read_config

    files, flags = split(common)
    for number, (config, own) in enumerate(parts):
        stage = [config, *split(own)[0]]
        later = [_leaves(read_config(find_config(file))) for file in stage if find_config(file).is_file()]
        given = {key: value for leaves in later for key, value in leaves.items()}
        words = {word[2:].partition("=")[0].replace(".init_args", "") for word in [*flags, *split(own)[1]]}
        for file in files[1:]:
            common_leaves = _leaves(read_config(find_config(file))) if find_config(file).is_file() else {}
            lost = {key: given[key] for key, value in common_leaves.items() if key in given and given[key] != value}
            lost = {key: value for key, value in lost.items() if key.replace(".init_args", "") not in words}
            if lost:
                values = ", ".join(f"{key}={value} (there {common_leaves[key]})" for key, value in lost.items())
                flag = next(iter(lost))
                wins = f"a flag before the first --stage wins over stages: --{flag}={common_leaves[flag]}"
                log.info("stage %d (%s) replaces what %s says: %s; %s", number, config, file, values, wins)


def _leaves(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return dotted key -> value of all that is no table."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        place = f"{above}.{key}" if above else str(key)
        found |= _leaves(value, place) if isinstance(value, dict) else {place: value}
    return found


@contextmanager
def _alone(stage: Stage) -> Iterator[None]:
    """Put the runs of a shared stage where they are shared; a second chain that wants it waits."""
    if stage.root is None:
        yield
        return
    from filelock import FileLock

    stage.folder.parent.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("MOEAPPS_RUNS")
    with FileLock(stage.folder.with_name(f".{stage.name}.lock")):
        os.environ["MOEAPPS_RUNS"] = str(stage.root)
        try:
            yield
        finally:
            os.environ.pop("MOEAPPS_RUNS")
            if before is not None:
                os.environ["MOEAPPS_RUNS"] = before


def run_stage(stage: Stage, source: Path | None, *, redo: bool) -> Path:
    """Run a stage unless it is done; return its run folder."""
    from moeapps.commands.run import run
    from moeapps.training.checkpoints import CheckpointError
    from moeapps.training.folders import next_version
    from moeapps.training.stages import checkpoint_file, file_digest

    title = f"stage {stage.number} ({stage.config})"
    origin = None if source is None else file_digest(checkpoint_file(source))
    wanted, file = Done(settings_digest(stage.words), origin), stage.folder / "stage.json"
    known = Done.read(file)
    if known is not None and (known.settings, known.source) != (wanted.settings, wanted.source):
        if not redo:
            cause = "other settings" if known.settings != wanted.settings else "other weights of the stage before"
            raise UsageError(
                f"{title}: {stage.folder} was made by {cause}; give another --name, or --redo to train it again"
            )
        known = None
    if known is not None and known.run is not None:
        place = stage.folder / Path(known.run).name  # where it is now: the runs may have been moved since
        changed = _changed(title, place, known.checkpoint)
        if changed is None:
            log.info("%s is done: %s", title, place)
            return place
        if not redo:
            raise UsageError(changed)
        known = None
    words = [*stage.words, "--name", stage.name]
    words += [] if source is None else [f"--{START}.init_args.path={source}"]
    words += [] if stage.last else ["--test_after_fit=false"]
    wanted.first = next_version(stage.folder)
    if known is not None:  # a smaller number comes where versions were deleted
        wanted.first = min(known.first, wanted.first)
    resumed = None if known is None else newest_checkpoint(stage.folder, wanted.first)
    words += [] if resumed is None else [f"--ckpt_path={resumed}"]
    wanted.write(file)
    log.info("%s %s", title, "begins" if resumed is None else f"goes on from {resumed}")
    begun = time.perf_counter()
    try:
        done = run(words)
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        log.info("%s was cut; the same `moeapps curriculum` goes on with it, then with the stages after it", title)
        raise
    folder = Path(str(done.trainer.log_dir))
    wanted.run, wanted.seconds = str(folder), round(time.perf_counter() - begun, 1)
    wanted.checkpoint = file_digest(checkpoint_file(folder))
    wanted.write(file)
    return folder


def settings_digest(words: Sequence[str]) -> str:
    """Return 12 hexadecimal digits of what files and words say; comments and order of keys do not count."""
    import yaml

    from moeapps.commands.messages import deep_merge
    from moeapps.commands.trust import take_trust

    merged: dict[str, Any] = {}
    files, flags = split(take_trust(words[1:])[0])
    for file in files:
        deep_merge(merged, yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {})
    text = json.dumps([merged, flags], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def newest_checkpoint(folder: Path, first: int = 0) -> Path | None:
    """Return the checkpoint with which a run goes on: the newest whole one of the newest version that has any.

    Args:
        folder: of all versions of the run.
        first: number of the first version that may be gone on with.
    """
    from moeapps.training.checkpoints import first_whole
    from moeapps.training.folders import versions_of

    versions = versions_of(folder, first)
    return next(filter(None, (first_whole(version / "checkpoints") for version in versions)), None)


def _changed(title: str, run: Path, digest: str | None) -> str | None:
    """Say what is wrong with the checkpoint of a stage that is done, and what helps; None where nothing is."""
    from moeapps.training.stages import StageError, checkpoint_file, file_digest

    helps = "put it back, or use --redo to train the stage again"
    try:
        found = file_digest(checkpoint_file(run))
    except StageError:
        return f"{title} was done, but its checkpoint is gone: there is no {run / 'checkpoints' / 'last.ckpt'}; {helps}"
    if found != digest:
        return f"{title}: the checkpoint in {run} is not the one that the stage ended with; {helps}"
    return None


def _cut(args: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the words for all stages, and the file and the words of each."""
    common: list[str] = []
    parts: list[tuple[str, list[str]]] = []
    words = iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--stage":
            config = value if equals else next(words, "")
            if not config or config.startswith("--"):
                raise UsageError("--stage needs a file after it")
            parts.append((config, []))
        else:
            (parts[-1][1] if parts else common).append(word)
    return common, parts


def _option(words: Sequence[str], name: str) -> str | None:
    """Return the last value of an option."""
    found = None
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option == name:
            found = value if equals else following
    return found


def _without(words: Sequence[str], name: str) -> list[str]:
    kept, rest = [], iter(words)
    for word in rest:
        option, equals, _ = word.partition("=")
        if option != name:
            kept.append(word)
        elif not equals:
            next(rest, None)
    return kept


def _start_of(merged: dict[str, Any]) -> Any:
    return merged.get("model", {}).get("init_args", {}).get("start")
