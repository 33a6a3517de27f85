# SPDX-License-Identifier: Apache-2.0
"""The rows of the race: what of ours runs beside what of theirs, and what each needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module

Work = Callable[[], object]


@dataclass(frozen=True)
class Race:
    """Two works on equal inputs.

    Args:
        ours: one call of ours.
        theirs: one call of the peer's.
        equal: what is equal on both sides, and what is not.
        floor: what neither side can do without, where it is no matrix product; None counts the products of ``ours``.
        factor: what the ratio of the times is multiplied with, where one call of ours is worth less than theirs.
        ways: other ways of ours, raced where the row's gate is missed.
    """

    ours: Work
    theirs: Work
    equal: str
    floor: Work | None = None
    factor: float = 1.0
    ways: Mapping[str, Work] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Args:
        name: what ``--rows`` is matched with.
        group: rows of one group share a process and a heading.
        peer: name of the other project.
        packages: pinned packages that it needs beside those of our environment.
        shared: packages of our environment that it is, or is built on.
        make: ``module:function`` below ``benchmarks.peers`` that gives the `Race`; nothing where there is none.
        gate: most that ours may cost over theirs, where that was agreed beforehand.
        absent: why the peer cannot be raced anywhere, where it cannot.
    """

    name: str
    group: str
    peer: str
    packages: Sequence[str] = ()
    make: str = ""
    gate: float | None = None
    absent: str = ""
    shared: Sequence[str] = ()

    def race(self) -> Race:
        """Build both sides."""
        module, function, *arguments = self.make.split(":")
        found: Race = getattr(import_module(f"benchmarks.peers.{module}"), function)(*arguments)
        return found


RANKING, SOLVING, DRAWING, READING, HEARING = "ranking", "solving", "drawing", "reading", "hearing"
HEADINGS = {
    RANKING: "A training step of ranking",
    SOLVING: "A solve of a mixture of vector fields",
    DRAWING: "A training step of a diffusion transformer",
    READING: "Reading logs and tables",
    HEARING: "Reading sound and its mel spectra",
}
LOG_GATE, SOLVE_GATE = 1.5, 1.1
TABLES = (
    ("films", "ratings of MovieLens 25M (CSV)"),
    ("reviews", "reviews of Amazon 2023 (JSON lines)"),
    ("clips", "table of clips (CSV)"),
    ("images", "table of images (CSV)"),
)


def ranking_rows() -> list[Row]:
    """MMoE, PLE and DIN beside both libraries."""
    rows = []
    for peer, package in (("torch-rechub", "torch-rechub"), ("DeepCTR-Torch", "deepctr-torch")):
        for name in ("MMoE", "PLE", "DIN"):
            make = f"recommenders:{name.lower()}:{package}"
            rows.append(Row(f"{name} / {peer}", RANKING, peer, [package], make))
    return rows


def reading_rows() -> list[Row]:
    """Logs beside plain loops of pyarrow and of pandas; every other reader of tables beside a plain loop of pyarrow."""
    rows, arrow = [], ["pyarrow"]
    for ending in ("csv", "parquet"):
        for use in ("first use", "epoch"):
            name, make = f"log, {ending}, {use}", f"tables:log:{ending}:{use.split()[0]}"
            rows.append(Row(f"{name} / pyarrow", READING, "pyarrow", (), f"{make}:pyarrow", LOG_GATE, shared=arrow))
            rows.append(Row(f"{name} / pandas", READING, "pandas", ["pandas"], f"{make}:pandas"))
    for what, told in TABLES:
        rows.append(Row(f"{told} / pyarrow", READING, "pyarrow", (), f"tables:{what}", shared=arrow))
    return rows


def all_rows() -> list[Row]:
    """Every row that a complete result has."""
    unpackaged = "not installable here: its authors publish a repository, and no package index has it"
    diffeq, sound = ["torchdiffeq"], ["soundfile", "torchaudio"]
    return [
        *ranking_rows(),
        Row("RK4, mixture / torchdiffeq", SOLVING, "torchdiffeq", (), "solvers:diffeq", SOLVE_GATE, shared=diffeq),
        Row("RK4, mixture / JAX, written by us", SOLVING, "JAX", ["jax"], "solvers:jax_rk4"),
        Row("MixER / official JAX code", SOLVING, "official MixER", absent=unpackaged),
        Row("ProMoE / DiT", DRAWING, "diffusers", ["diffusers"], "images:promoe"),
        Row("our dense twin / DiT", DRAWING, "diffusers", ["diffusers"], "images:dense"),
        *reading_rows(),
        Row("read and resample / soundfile, torchaudio", HEARING, "torchaudio", (), "sound:files", shared=sound),
        Row("log mel spectra / torchaudio", HEARING, "torchaudio", (), "sound:spectra", shared=["torchaudio"]),
    ]
