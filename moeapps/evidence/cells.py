# SPDX-License-Identifier: Apache-2.0
"""One finished cell is one small JSON file: made from a run folder, written whole or not at all, checked when read."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from moeapps.evidence.grid import Cell, Scale
from moeapps.files import write_text

FORMAT = 1
UNIT_LIMIT = 200  # Values per unit are kept where a domain has at most this many units: a cell stays a few kilobytes.
CHANCE = 0.01  # that a cell run again with other arithmetic is called different though nothing else differs.
ONE_SEED_BOUND = 1e-3  # Relative; what other instruction sets were seen to change (ProMoE 1e-3, Point-MoE 4e-5).
_SCALARS = ("params_total", "params_active", "flops_per_token", "train_flops")
_GEOMETRIC = "geometric."
_ROLES = ("seen", "validation", "unseen")


class CellError(ValueError):
    """A run that left no usable results, or a cell file that cannot be trusted."""


@dataclass(frozen=True)
class CellResult:
    """The content of a cell file.

    Args:
        system: Name of the system.
        variant: Name of the variant.
        seed: Seed of the model.
        data_seed: Seed of the data.
        definition: Digest of the variant's configs and flags when it ran.
        config_hash: Digest of the resolved configuration, from the run.
        commit: Commit of the checkout, with ``-dirty`` if it had changes.
        params_total: Parameters in all, or None if the run did not say.
        params_active: Parameters that work on one row.
        flops_per_token: Forward operations per row.
        metrics: ``<domain or role>/<metric>`` -> value.
        domains: Domains that were tested.
        units: Domain -> metric -> values per test unit, where few.
        sources: Domain -> where its data came from.
        missing_domains: Domain -> reason why it was left out.
        cpu_s: CPU seconds of the whole command (all its processes), with one thread.
        machine: Processor and operating system; no host name.
        instruction_set: What torch's kernels used (``AVX2``, ``AVX512`` ...); empty for a cell older than the field.
        threads: Threads of torch, or None for such a cell.
        versions: Versions of Python and packages.
        roles: Domain -> seen, validation or unseen.
        train_flops: Operations of all training steps, forward and backward, or None if the run did not say.
    """

    system: str
    variant: str
    seed: int
    data_seed: int
    definition: str
    config_hash: str
    commit: str | None
    params_total: int | None
    params_active: int | None
    flops_per_token: float | None
    metrics: dict[str, float]
    domains: list[str]
    units: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    missing_domains: dict[str, str] = field(default_factory=dict)
    cpu_s: float = 0.0
    machine: str = ""
    instruction_set: str = ""
    threads: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    train_flops: int | None = None

    @property
    def cell(self) -> Cell:
        """Which cell of the grid this is."""
        return Cell(self.variant, self.seed, self.data_seed)

    def value(self, metric: str) -> float:
        """Give one metric, or ``params_total``, ``params_active``, ``flops_per_token`` or ``train_flops``.

        ``geometric.<role>/<name>`` is the geometric mean over the domains of a role of each domain's own ``<name>``: a
        domain counts once whatever the size of its errors, where the arithmetic mean is ruled by the worst.

        Raises:
            CellError: If the cell has no such number; the text lists what there is.
        """
        found = getattr(self, metric) if metric in _SCALARS else self._score(metric)
        if found is None:
            raise CellError(f"cell {self.cell.stem} has no finite {metric!r}; it has {', '.join(sorted(self.metrics))}")
        return float(found)

    def has(self, metric: str) -> bool:
        """Whether there is a score of this name."""
        return self._score(metric) is not None

    def _score(self, metric: str) -> float | None:
        if not metric.startswith(_GEOMETRIC):
            return self.metrics.get(metric)
        role, _, name = metric.removeprefix(_GEOMETRIC).partition("/")
        values = [self.metrics.get(f"{domain}/{name}") for domain in self.domains if self.roles.get(domain) == role]
        known = [value for value in values if value is not None and value >= 0]
        if not known or len(known) < len(values):
            return None
        return 0.0 if 0.0 in known else math.exp(math.fsum(map(math.log, known)) / len(known))


def cell_path(folder: Path, cell: Cell) -> Path:
    """Give the file of a cell below ``benchmarks/results/<system>/cells``."""
    return folder / f"{cell.stem}.json"


def write_cell(folder: Path, result: CellResult) -> Path:
    """Write a cell file whole or not at all: a file that is there is finished."""
    path = cell_path(folder, result.cell)
    text = json.dumps({"format": FORMAT, **asdict(result)}, indent=1, sort_keys=True, allow_nan=False)
    write_text(path, text + "\n")
    return path


def read_cell(path: Path, system: str) -> CellResult:
    """Read and check a cell file.

    Raises:
        CellError: If it is not whole, of another format, or not the cell its name says.
    """
    advice = "delete the file and run the grid again"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.pop("format")
        result = CellResult(**data)
        finite = all(isinstance(v, int | float) and math.isfinite(v) for v in result.metrics.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CellError(f"{path} is not a whole cell file ({type(error).__name__}: {error}); {advice}") from error
    if version != FORMAT:
        raise CellError(f"{path} has format {version}, this program reads {FORMAT}; {advice}")
    if result.system != system or f"{result.cell.stem}.json" != path.name:
        raise CellError(f"{path} holds the cell {result.system}/{result.cell.stem}; {advice}")
    if not finite:
        raise CellError(f"{path} holds a metric that is not a finite number; {advice}")
    return result


def read_cells(folder: Path, system: str) -> dict[Cell, CellResult]:
    """Read every cell file of a folder (none if there is no folder)."""
    found = (read_cell(path, system) for path in sorted(folder.glob("[!.]*.json")))
    return {result.cell: result for result in found}


def collect(run_root: Path, cell: Cell, *, system: str, definition: str, cpu_s: float) -> CellResult:
    """Make a cell from the metrics/test.json that a run left somewhere below ``run_root``.

    Raises:
        CellError: If there is no such file or more than one, it cannot be read, or it is the result of another seed.
    """
    files = sorted(run_root.glob("**/metrics/test.json"))
    if len(files) != 1:
        raise CellError(f"the run left {len(files)} metrics/test.json instead of one; did it test after fit?")
    try:
        data = json.loads(files[0].read_text(encoding="utf-8"))
        header, rows = data["header"], data["rows"]
        metrics = {f"{row['domain']}/{row['metric']}": row["value"] for row in rows}
        metrics |= _role_means(rows) | _flat(data.get("summary", {}))
        numbers = {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CellError(f"metrics/test.json of the run is not as expected ({type(error).__name__}: {error})") from error
    if header.get("seed", cell.seed) != cell.seed:
        raise CellError(f"the run used seed {header['seed']}, not {cell.seed}: does its config override the flag?")
    return CellResult(
        system=system,
        variant=cell.variant,
        seed=cell.seed,
        data_seed=cell.data_seed,
        definition=definition,
        config_hash=str(header.get("config_hash", "")),
        commit=header.get("commit"),
        params_total=header.get("params_total"),
        params_active=header.get("params_active"),
        flops_per_token=header.get("flops_per_token"),
        metrics=dict(sorted(numbers.items())),
        domains=sorted({row["domain"] for row in rows}),
        units=_small_units(data.get("units", {})),
        sources=dict(header.get("sources", {})),
        missing_domains=dict(header.get("missing_domains", {})),
        cpu_s=round(cpu_s, 1),
        machine=describe_machine(),
        instruction_set=str(header.get("machine", {}).get("instruction_set", "")),
        threads=header.get("machine", {}).get("threads"),
        versions=dict(header.get("versions", {})),
        roles={row["domain"]: row["role"] for row in rows if row["role"] in _ROLES},
        train_flops=header.get("train_flops"),
    )


def differing_metrics(old: CellResult, new: CellResult, tolerance: float = 1e-6) -> list[str]:
    """List the metrics of two results of one cell that differ by more than ``tolerance``, relative above 1."""
    lines = []
    for name in sorted(old.metrics.keys() | new.metrics.keys()):
        a, b = old.metrics.get(name), new.metrics.get(name)
        if a is None or b is None or abs(a - b) > tolerance * max(1.0, abs(a)):
            lines.append(f"{name}: {a} before, {b} now")
    return lines


def same_arithmetic(old: CellResult, new: CellResult) -> bool:
    """Whether two runs of a cell must agree to the last digits: the same known instruction set and threads."""
    return bool(old.instruction_set) and (old.instruction_set, old.threads) == (new.instruction_set, new.threads)


def beside_seeds(
    old: CellResult, new: CellResult, done: Iterable[CellResult], metrics: Mapping[str, Scale]
) -> tuple[list[str], str]:
    r"""Hold a cell that was run again with other arithmetic to what two seeds of one variant differ by.

    Kernels of another instruction set round in another way, and training carries that on until the run is one of
    another seed: nothing smaller than the difference of two seeds can be asked of it. With :math:`s` the standard
    deviation within variants, pooled over all of them, and :math:`m` metrics, a difference is one of seeds up to
    :math:`t_{1 - \alpha / 2m} \sqrt{2} s`, where :math:`\alpha = 0.01` is the chance that an honest cell fails.

    Args:
        old: The finished cell.
        new: The same cell, run here.
        done: All finished cells of the grid, ``old`` among them.
        metrics: What is compared, and on which scale: the metrics that claims and tables use.

    Returns:
        One line per metric whose difference two seeds do not explain, or that is not known in both, or has no logarithm
        in one; and a sentence on the largest difference beside that spread.
    """
    lines, shares = [], {}
    done = list(done)
    for name, scale in metrics.items():
        if not (old.has(name) and new.has(name)):
            known = [cell.value(name) if cell.has(name) else None for cell in (old, new)]
            lines += [f"{name}: {known[0]} before, {known[1]} now"] if old.has(name) or new.has(name) else []
            continue
        if not (_has_scaled(old, name, scale) and _has_scaled(new, name, scale)):
            if old.value(name) != new.value(name):
                told = f"{name}: {old.value(name)} before, {new.value(name)} now"
                lines.append(f"{told}; a value that is not positive has no logarithm to be compared by")
            continue
        a, b = _scaled(old, name, scale), _scaled(new, name, scale)
        spread, freedom = _pooled_spread(name, scale, done)
        # Where no variant has two seeds there is no spread: a thousandth of the value stands in for it.
        factor = math.sqrt(2) * float(stdtrit(freedom, 1 - CHANCE / 2 / len(metrics))) if freedom else 1.0
        bound = max(factor * (spread if freedom else ONE_SEED_BOUND * abs(a)), 1e-6 * max(1.0, abs(a)))
        if spread > 0:
            shares[name] = abs(a - b) / spread
        if abs(a - b) > bound:
            logs = "log10 " if scale == "log10" else ""
            lines.append(f"{logs}{name}: {a} before, {b} now; two seeds of a variant differ by up to {bound:.3g}")
    if not shares:
        return lines, "no metric has a spread over seeds to set it beside"
    name = max(shares, key=lambda key: shares[key])
    return lines, (
        f"the largest difference is {name}: {old.value(name):.6g} before, {new.value(name):.6g} now, "
        f"{shares[name]:.2g} of the standard deviation over seeds"
    )


def _scaled(cell: CellResult, name: str, scale: Scale) -> float:
    return math.log10(cell.value(name)) if scale == "log10" else cell.value(name)


def _has_scaled(cell: CellResult, name: str, scale: Scale) -> bool:
    return cell.has(name) and (scale != "log10" or cell.value(name) > 0)


def _pooled_spread(name: str, scale: Scale, cells: Iterable[CellResult]) -> tuple[float, int]:
    """Standard deviation of a metric within variants, and its degrees of freedom."""
    values: dict[str, list[float]] = {}
    for cell in cells:
        if _has_scaled(cell, name, scale):
            values.setdefault(cell.variant, []).append(_scaled(cell, name, scale))
    squares = math.fsum(statistics.variance(group) * (len(group) - 1) for group in values.values() if len(group) > 1)
    freedom = sum(len(group) - 1 for group in values.values())
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def describe_machine() -> str:
    """Name processor, cores and operating system."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else processor}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def _role_means(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Mean over the domains of each role; a results file that brings its own summary overrides these."""
    grouped: dict[str, list[float]] = {}
    for row in rows:
        if row["value"] is not None:
            grouped.setdefault(f"{row['role']}/{row['metric']}", []).append(float(row["value"]))
    return {name: math.fsum(values) / len(values) for name, values in grouped.items()}


def _flat(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{role}/{metric}": value for role, metrics in summary.items() for metric, value in metrics.items()}


def _small_units(units: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    small = {
        domain: {name: values for name, values in metrics.items() if len(values) <= UNIT_LIMIT and None not in values}
        for domain, metrics in units.items()
    }
    return {domain: metrics for domain, metrics in small.items() if metrics}
