# SPDX-License-Identifier: Apache-2.0
"""What a task owes the library, checked before the first epoch: each breach is one sentence that says what to change.

Called by `BaseTask` and `DomainScores` at the first moment at which a clause can be checked: construction, setup, the
first batch, and the validation before training.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from moeapps.moe.layer import MoELayer

if TYPE_CHECKING:
    from moeapps.training.scores import DomainScores, ScoreTable
    from moeapps.training.task import BaseTask

_PLAIN = (str, int, float, bool, type(None))
log = logging.getLogger("moeapps")


class ContractError(ValueError, TypeError):
    """A task or data module that breaks a clause of the contract; the text says which, and what to change."""


def check_facts(task: str, facts: Any, where: str = "facts") -> None:
    """Check that facts are plain values: checkpoints hold them, and are loaded without running code.

    Args:
        task: name of the task, for the text.
        facts: the facts, or a part of them.
        where: the part.

    Raises:
        ContractError: a value of another type, numpy's numbers among them.
    """
    if type(facts) is dict:
        for key, value in facts.items():
            check_facts(task, value, f"{where}[{key!r}]")
            if type(key) not in (str, int):
                raise ContractError(f"{task}: {where} has the key {key!r}; keys must be str or int")
    elif type(facts) in (list, tuple):
        for place, value in enumerate(facts):
            check_facts(task, value, f"{where}[{place}]")
    elif type(facts) not in _PLAIN:
        kind = type(facts)
        raise ContractError(
            f"{task}: {where} is a {kind.__module__}.{kind.__qualname__}; facts of the data must be plain values (str, "
            "int, float, bool, None, lists and dicts of them), since checkpoints keep them: convert it, as by int(...)"
        )


def check_mode(task: BaseTask) -> None:
    """Check in which direction the monitor improves.

    Raises:
        ContractError: in none.
    """
    if task.monitor_mode not in ("min", "max"):
        raise ContractError(f"{type(task).__name__}.monitor_mode is {task.monitor_mode!r}; allowed: 'min' and 'max'")


def check_predicts(task: BaseTask) -> None:
    """Check that there is something to predict with; Lightning would ask for ``forward`` alone.

    Raises:
        ContractError: there is not.
    """
    kind, base = type(task), L.LightningModule
    if kind.predict_step is base.predict_step and kind.forward is base.forward:
        raise ContractError(
            f"{kind.__name__} has neither predict_step nor forward, so there is nothing to predict; define one of them"
        )


def check_output(task: BaseTask, out: Any, output: type) -> None:
    """Check what ``shared_step`` gave.

    Raises:
        ContractError: no ``StepOutput``, or a loss that is no scalar.
    """
    name = type(task).__name__
    if not isinstance(out, output):
        raise ContractError(
            f"{name}.shared_step returned {type(out).__name__}; it must return a StepOutput(loss, batch_size, ...)"
        )
    loss = getattr(out, "loss", None)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        shown = f"a tensor {list(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ContractError(f"{name}.shared_step gave a loss that is {shown}; it must be a scalar of floating point")


def check_metrics(domain: str, metrics: Any) -> None:
    """Check what ``configure_metrics`` gave for a domain.

    Raises:
        ContractError: no ``MetricCollection``.
    """
    if not isinstance(metrics, MetricCollection):
        raise ContractError(
            f"configure_metrics({domain!r}) returned {type(metrics).__name__}; it must return a MetricCollection, "
            "MetricCollection({}) for none"
        )


def scalar(domain: str, metric: str, value: Any) -> float:
    """Return the value of a metric as a number.

    Raises:
        ContractError: it is not one number.
    """
    number = torch.as_tensor(value)
    if number.numel() != 1:
        raise ContractError(
            f"metric {metric!r} of domain {domain!r} gave {list(number.shape)} numbers; a metric must give one: "
            "average it, or give each number a metric of its own"
        )
    return float(number)


def check_scores(task: BaseTask, stage: str, scores: DomainScores, table: ScoreTable, monitor: str | None) -> None:
    """Check the first evaluation: were all metrics updated, and are the names that the task gives among the scores?

    Args:
        task: the task.
        stage: ``val`` or ``test``.
        scores: the metrics of the stage.
        table: what they gave.
        monitor: the score that a checkpoint is chosen by; None if none is.

    Raises:
        ContractError: they were not, or a name is not.
    """
    name = type(task).__name__
    for domain in {score.domain: None for score in table.scores}:
        left = scores.not_updated(domain)
        if left:
            raise ContractError(
                f"the metrics {', '.join(left)} of domain {domain!r} were never updated; {name}.shared_step must give "
                "their arguments: StepOutput(..., metric_args=(...))"
            )
    metrics = list(dict.fromkeys(score.metric for score in table.scores))
    if metrics and task.main_metric not in metrics:
        raise ContractError(f"{name}.main_metric is {_unknown(task.main_metric, metrics)}")
    keys = table.keys(stage)
    # What a task logs by itself under another name is looked for by Lightning.
    if monitor is not None and monitor.startswith(f"{stage}/") and monitor.count("/") == 2 and monitor not in keys:
        raise ContractError(f"{name}.monitor, which chooses best.ckpt, is {_unknown(monitor, list(keys))}")


def _unknown(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    shown = ", ".join(list(known)[:12]) + (" ..." if len(known) > 12 else "")
    return f"{name!r}{hint}, but the scores are {shown}; correct the name, or add the metric to configure_metrics"


def tell_idle_layers(module: nn.Module, ran: Collection[str]) -> None:
    """Say which MoE layers have not run by the end of the first training batch: their experts learn nothing.

    A warning, not an error: a layer may be there for later steps. One that is frozen, or whose experts got a gradient
    without it (a stage may call them one by one), is left alone.

    Args:
        module: the task.
        ran: names of the layers that have run.
    """
    idle = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, MoELayer) and name not in ran and _waits_for_gradients(layer)
    ]
    if idle:
        log.warning(
            "%s did not run in the first training batch: no loss or report sees %s, and no gradient reaches %s; call "
            "it in forward, or take it out of the network",
            *(f"MoE layer {', '.join(idle)}", *(("it", "it") if len(idle) == 1 else ("them", "them"))),
        )


def _waits_for_gradients(layer: nn.Module) -> bool:
    """Whether a layer has something to train and none of it got a gradient."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return bool(trained) and all(parameter.grad is None for parameter in trained)
