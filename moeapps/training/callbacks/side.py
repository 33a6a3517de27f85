# SPDX-License-Identifier: Apache-2.0
"""What is told beside the main results, and may fail without costing them."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L

from moeapps.training.placement import is_placed

log = logging.getLogger("moeapps")
_BEGIN = ("on_validation_start", "on_test_start")
_HOOKS = ("on_validation_", "on_test_", "describe_results")


class SideReport(L.Callback):
    """Base class of reports, figures and further metrics: what fails in their evaluation hooks costs themselves alone.

    A failure (a distance of images that are not numbers, a full disk under a figure) is told as a warning and noted in
    metrics/test.json as ``header.failed_reports``; the report is then left out until the next evaluation. Under
    ``--debug`` it is raised.

    Attributes:
        failure: what went wrong in this evaluation, None for nothing.
    """

    joins_processes: ClassVar[bool] = False
    """Whether the hooks wait for other processes: then a failure ends all of them, since the others would hang."""

    runs_network: ClassVar[bool] = False
    """Whether the first process runs the network by itself: then it is left out where the network is spread."""

    failure: str | None = None
    told = False
    _inside = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, hook in list(vars(cls).items()):
            if name.startswith(_HOOKS) and callable(hook):
                setattr(cls, name, _guarded(name, hook))

    def describe_failure(self) -> dict[str, str]:
        """Return what failed in this evaluation, by the report's name."""
        return {} if self.failure is None else {type(self).__name__: self.failure}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self.failure = None

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self.failure = None


def _left_out(report: SideReport, task: Any) -> bool:
    """Whether the network is spread over processes, of which none can run it by itself; said once."""
    if not is_placed(task):
        return False
    if getattr(getattr(task, "trainer", None), "is_global_zero", False) and not report.told:
        log.info("%s runs the network in one process and is left out: it is spread over several", type(report).__name__)
        report.told = True
    return True


def _guarded(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    nothing: Callable[[], Any] = dict if name == "describe_results" else lambda: None

    @functools.wraps(hook)
    def guarded(self: SideReport, *args: Any, **options: Any) -> Any:
        if self._inside:  # of a hook of a subclass, which is left out as a whole
            return hook(self, *args, **options)
        if name in _BEGIN:
            self.failure = None
        if self.failure is not None or (self.runs_network and len(args) > 1 and _left_out(self, args[1])):
            return nothing()
        self._inside = True
        try:
            return hook(self, *args, **options)
        except Exception as error:  # whatever it is: it is told, noted, and no reason to lose the results
            alone = not args or getattr(args[0], "world_size", 1) == 1
            if os.environ.get("MOEAPPS_DEBUG") or (self.joins_processes and not alone):
                raise
            self.failure = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"{type(self).__name__} failed in {name} ({self.failure}) and is left out; the main results do not "
                "hang on it. MOEAPPS_DEBUG=1 shows where",
                RuntimeWarning,
                stacklevel=2,
            )
            return nothing()
        finally:
            self._inside = False

    return guarded
