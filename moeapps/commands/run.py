# SPDX-License-Identifier: Apache-2.0
"""``moeapps fit | validate | test | predict``: LightningCLI in subclass mode, made friendlier."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, cast

import lightning as L
import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from moeapps.allocator import keep_freed_memory
from moeapps.commands.boundary import UsageError, guarded, without_debug
from moeapps.commands.checkpoints import expand_run, named_checkpoint, ours_first, refuse_taken_names
from moeapps.commands.later import collect_again
from moeapps.commands.listing import located
from moeapps.commands.messages import RAW, ShortErrorParser, explain, merged_config
from moeapps.commands.tasks import refuse_moved, task_names
from moeapps.commands.threads import busy_hint
from moeapps.commands.trust import Trust, given_run, named_by, take_trust
from moeapps.data.domain import DomainDataModule
from moeapps.text import VisibleLines
from moeapps.training import callbacks as ours
from moeapps.training.checkpoints import WholeCheckpoints
from moeapps.training.contract import check_predicts
from moeapps.training.folders import RunError, claim_version, drop_unbegun, next_version, run_place, runs_root
from moeapps.training.precedence import checkpoint_hparams, differences, insert_config
from moeapps.training.task import BaseTask

_SUBCOMMAND: ContextVar[str | None] = ContextVar("moeapps_subcommand", default=None)
log = logging.getLogger("moeapps")


DESCRIPTIONS = {
    "fit": "Train, then test the best checkpoint on seen, validation and unseen domains.",
    "validate": "Score a checkpoint on the validation data of every domain.",
    "test": "Score a checkpoint on the test data of every domain; metrics/test.json of the run is written anew.",
    "predict": "Write what a checkpoint says about the test data to the folder predictions of the run; what an earlier "
    "predict wrote there of the same domains is removed.",
}


def usage(command: str) -> str:
    """Return the first lines of a command's help: the most common uses, before the list of all options."""
    if command != "fit":
        return f"""moeapps {command} --run runs/SYSTEM/NAME [--OPTION VALUE ...]
       moeapps {command} --config FILE [--config OVERLAY ...] (--ckpt_path FILE|last|best | --untrained)
       --trust none|PACKAGE,...  what files may import beside tasks, moeapps, lightning, torch and torchmetrics

  moeapps {command} --run runs/home/base                              the newest version, its best checkpoint
  moeapps {command} --run runs/home/base --data.init_args.batch_size 64    any option can be a flag"""
    return """lightning fit --config FILE [--config OVERLAY ...] [--OPTION VALUE ...]

  lightning fit --config configs/home.yaml                                               train and test HoME
  lightning fit --config configs/home.yaml --config configs/baselines/home_mmoe.yaml     a rival: an overlay
  lightning fit --config configs/home.yaml --name short --trainer.max_epochs 1           any option can be a flag
  lightning fit --config configs/home.yaml --print_config                                every option and its value
  lightning fit --run runs/home/base --trainer.max_epochs 9                              go on with a run
  lightning fit --run FOLDER --trust none                                                import no code but ours
  lightning fit --model.help tasks.recommendation.module.RankingTask                     what an option means

  moeapps list                                                                           systems and overlays"""


class Cli(LightningCLI):
    """The parser and runner of one training command.

    Args:
        args: the words after the program name, the command first.
        run_folder: folder of an earlier run to continue in (``--run``), or None for a new one.
        run: False only builds trainer, model and data (for notebooks and tests).
        trust: what may be imported.

    Raises:
        TrustError: a file names code of a run folder.
    """

    def __init__(
        self, args: Sequence[str], *, run_folder: Path | None = None, run: bool = True, trust: Trust | None = None
    ) -> None:
        self.words = list(args)
        self.run_folder = run_folder
        self.trust = trust or Trust(run=run_folder)
        self.trust.admit(named_by(self.words))
        self._claimed: Path | None = None
        self._own_loggers: list[Logger] = []
        token = _SUBCOMMAND.set(args[0] if run else None)
        raw = RAW.set(merged_config(self.words))
        try:
            super().__init__(
                BaseTask,
                DomainDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_callback=ours.SaveRun,
                save_config_kwargs={"overwrite": True},
                parser_class=ShortErrorParser,
                trainer_defaults={
                    "accelerator": "auto",
                    "devices": 1,
                    "log_every_n_steps": 10,
                    "use_distributed_sampler": False,
                },
                auto_configure_optimizers=False,
                args=self.words,
                run=run,
            )
        except BaseException:
            if self._claimed is not None and not ours.has_begun(self.trainer):
                drop_unbegun(self._claimed)
            raise
        finally:
            _SUBCOMMAND.reset(token)
            RAW.reset(raw)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the requested command alone: building the other parsers would only cost time."""
        wanted = _SUBCOMMAND.get()
        return {name: skip for name, skip in LightningCLI.subcommands().items() if wanted in (None, name)}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Model and data first, as in our files; the trainer's many options after them."""
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options and hand the data module's facts to the model."""
        command = _SUBCOMMAND.get()
        if command is not None:
            parser.usage, parser.description = usage(command), DESCRIPTIONS[command]
        parser.add_argument("--system", type=str, default="custom", help="Name of the system: runs/<system>/...")
        parser.add_argument(
            "--name", type=str, default="base", help="Name of the variant: runs/<system>/<name>/version_k."
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=True,
            help="After fit, test with the best checkpoint (with fast_dev_run: with the current weights).",
        )
        parser.add_argument(
            "--pictures", type=bool, default=True, help="While fitting, show pictures of the validation in TensorBoard."
        )
        if command not in (None, "fit"):
            parser.add_argument(
                "--untrained", action="store_true", help="Work with weights as they are drawn, without a checkpoint."
            )
        parser.link_arguments("data.facts", "model.init_args.facts", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words given to us; ``sys.argv`` stays as it is, for processes that are started with it."""
        self.config = parser.parse_args(args)

    # Construction -------------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; report their ValueErrors as a wrong configuration, without a traceback."""
        try:
            super().instantiate_classes()
            if self.subcommand == "predict":
                check_predicts(cast(BaseTask, self.model))
        except ValueError as error:
            raise UsageError(explain(str(error), self.parser, RAW.get() or {})) from error
        collect_again()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer with our loggers and callbacks beside the configured ones."""
        config: dict[str, Any] = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        if config.get("default_root_dir"):
            raise RunError(
                f"trainer.default_root_dir: {str(config['default_root_dir'])!r} is not used, since runs lie in "
                f"{runs_root()}/SYSTEM/NAME/version_k; leave it out and set MOEAPPS_RUNS=FOLDER to keep them elsewhere"
            )
        if config.get("barebones"):
            self.save_config_callback = None  # it would fall into the working directory
        else:
            given = config.get("callbacks") or []
            given = given if isinstance(given, list) else [given]
            refuse_taken_names(given)
            config["callbacks"] = ours_first([*given, *self._default_callbacks(config, given)])
            config["logger"] = self._loggers(config.get("logger"))
            config["enable_model_summary"] = False  # MoESummary is the summary
            # Where Lightning looks for what a requeued job has left: its own, never that of a job of the same name.
            job = os.environ.get("SLURM_JOB_ID")
            config["default_root_dir"] = self._folder() if job is None else self._folder() / f"job_{job}"
        trainer = self._instantiate_trainer(config, [])
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        return trainer

    def _folder(self) -> Path:
        if self.run_folder is not None:
            return self.run_folder
        return run_place(str(self._get(self.config, "system")), str(self._get(self.config, "name")))

    def _loggers(self, configured: Any) -> list[Logger]:
        """CSV and TensorBoard in the run folder unless other loggers are configured; CSV is never off.

        A run folder that exists already (``--run``) gets no new log: its results go to metrics/*.json.
        """
        if self.run_folder is not None:
            return []
        parent = self._folder()
        place: dict[str, Any] = {"save_dir": parent.parent, "name": parent.name, "version": next_version(parent)}
        self._own_loggers = [CSVLogger(**place)]
        if configured is None or configured is True:
            self._own_loggers.append(TensorBoardLogger(**place, default_hp_metric=False))
            return self._own_loggers
        extra = configured if isinstance(configured, list) else [configured] if configured else []
        return [*self._own_loggers, *extra]

    def _default_callbacks(self, config: dict[str, Any], given: list[Callback]) -> list[Callback]:
        """Our default callbacks, without those that the configuration gives itself or switches off."""
        task = cast(BaseTask, self.model)
        writer = task.prediction_writer() or ours.PredictionWriter()
        wanted: list[tuple[type[Callback], Callable[[], Callback], bool]] = [
            (ours.RandomState, ours.RandomState, True),
            (ours.InterruptCheckpoint, ours.InterruptCheckpoint, True),
            (ours.StopDiverged, ours.StopDiverged, True),
            (ours.RoutingMonitor, ours.RoutingMonitor, True),
            (ours.MoESummary, ours.MoESummary, config.get("enable_model_summary") is not False),
            (ProgressBar, ours.progress_bar, config.get("enable_progress_bar") is not False),
            (ours.EndTable, ours.EndTable, True),
            (ours.EpochPictures, ours.EpochPictures, bool(self._get(self.config, "pictures"))),
            (type(writer), lambda: writer, self.subcommand == "predict"),
            (
                ours.BestCheckpoint,
                lambda: ours.BestCheckpoint(task.monitor, task.monitor_mode),
                config.get("enable_checkpointing") is not False,
            ),
        ]
        return [make() for kind, make, on in wanted if on and not any(isinstance(callback, kind) for callback in given)]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Let ``predict`` drop each answer once it is written: nobody reads the list, and it may be large.

        ``validate`` and ``test`` show our table alone: Lightning's own is a thousand lines where scores are many.
        """
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in ("validate", "test"):
            kwargs["verbose"] = False
        if subcommand == "predict" and kwargs.get("return_predictions") is None:
            kwargs["return_predictions"] = False
        return kwargs

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _parse_ckpt_path(self) -> None:
        """Merge the checkpoint's model options: explicit flag > checkpoint > YAML, and print what differs."""
        command = self.config.get("subcommand")
        if not command:
            return
        path = named_checkpoint(command, self.config[command])
        self.config[command].ckpt_path = path
        hparams = checkpoint_hparams(path)
        if not hparams:
            return
        refuse_moved(str(path), yaml.safe_dump(hparams))
        self.trust.admit({str(path): hparams})
        before = self.config[command].model.as_dict()
        with NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            yaml.safe_dump({"model": hparams}, file)
            file.flush()
            self.config = self.parser.parse_args(insert_config(self.words, file.name))
        self.config[command].ckpt_path = path  # as a file, where `last` or `best` was said
        for line in differences(before, hparams, self.config[command].model.as_dict()):
            log.info(line)

    # Running ------------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Miss a checkpoint to start from, or a step to take, before data are prepared."""
        start, resumed = cast(BaseTask, self.model).start, self._get(self.config, "ckpt_path")
        if start is not None and not resumed:
            start.check()
        names = ("max_epochs", "max_steps", "limit_train_batches")
        nothing = [f"trainer.{name}={getattr(self.trainer, name)}" for name in names if not getattr(self.trainer, name)]
        if nothing and start is None and not resumed:
            # Its test would be of weights as they are drawn, in a file of results like any other.
            raise RunError(
                f"{nothing[0]}: this training takes no step; allowed is 1 or more, and weights as they are drawn are "
                "tested by: moeapps test --untrained"
            )
        if hint := busy_hint(torch.get_num_threads()):
            log.info(hint)
        self._claim_folder()

    def _claim_folder(self) -> None:
        """Take a version for this run alone, before data are made; other processes are told it by the first."""
        trainer = self.trainer
        dry = getattr(trainer, "fast_dev_run", False) or trainer.barebones
        if not self._own_loggers or dry or not trainer.is_global_zero:
            return
        self._claimed = claim_version(self._folder())
        for logger in self._own_loggers:
            cast(Any, logger)._version = int(self._claimed.name.removeprefix("version_"))

    before_validate = before_test = before_predict = _claim_folder

    def after_fit(self) -> None:
        """Test with the best checkpoint (under fast_dev_run, which saves none, with the weights as they are)."""
        if not self._get(self.config, "test_after_fit") or self.trainer.interrupted:
            return
        checkpoint = self.trainer.checkpoint_callback
        best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
        log.info("testing %s", best or "the weights as they are")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False)


def import_tasks(args: Sequence[str]) -> None:
    """Import the task packages that the words or their config files name, so that short class names resolve.

    If none is named, all packages below ``tasks`` are imported.

    Raises:
        UsageError: a task package or class path that is not there (any more).
    """
    texts = {"the command line": " ".join(args)}
    for word in args:
        path = Path(word.partition("=")[2] if word.startswith("--") and "=" in word else word)
        if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
            texts[str(path)] = path.read_text(encoding="utf-8")
    for where, text in texts.items():
        refuse_moved(where, text)
    named = {name for text in texts.values() for name in re.findall(r"(?<![\w./])tasks\.([a-z_0-9]+)", text)}
    known = task_names()
    for name in sorted(named) or known:
        if name not in known:
            raise UsageError(f"there is no task package tasks.{name}; there are: {', '.join(known) or 'none'}")
        import_module(f"tasks.{name}")


def quiet() -> None:
    """Drop the advertising tips and the one deprecation warning that Lightning itself causes; show our own lines."""
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logger = logging.getLogger(f"lightning.pytorch.{name}")
        if not any(isinstance(known, ours.TipFilter) for known in logger.filters):
            logger.addFilter(ours.TipFilter())
    os.environ.setdefault(
        "JSONARGPARSE_DEPRECATION_WARNINGS", "off"
    )  # Lightning 2.6 calls what jsonargparse 5 will drop
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec")
    warnings.filterwarnings(
        "ignore", message=r".*torch\.jit\.script.* is deprecated"
    )  # timm and torch-geometric, at import
    warnings.filterwarnings("ignore", message="You are using a custom batch sampler `ShardedBatches` for prediction")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(VisibleLines("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def run(args: Sequence[str]) -> Cli:
    """Run one training command and return its objects (``trainer``, ``model``, ``datamodule``).

    Raises:
        UsageError: wrong usage or configuration.
    """
    quiet()
    keep_freed_memory()
    given, packages = take_trust(args)
    words, folder = expand_run(located(given))
    import_tasks(words)
    return Cli(words, run_folder=folder, trust=Trust(packages, given_run(given)))


def main(args: list[str]) -> int:
    """Run one training command; report what a user can cause in a line or two (--debug: with its traceback)."""
    words, debug = without_debug(args)

    def work() -> int:
        run(words)
        return 0

    return guarded(work, debug=debug)
