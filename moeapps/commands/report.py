# SPDX-License-Identifier: Apache-2.0
"""``moeapps report RUN... -o report.html``: one page to look at, of any finished runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="moeapps report",
        description="Write ONE page of any runs, of one system or several: who won where, what the experts learned, "
        "samples to see, hear and turn, training, cost, data and licences, command and configuration.",
        epilog="The page is one file that needs no network: send it, print it, open it on a phone. Only files of the "
        "run folders are read; no code of a run is imported, and none of yours that --trust does not name. Runs that "
        "were interrupted or are damaged get a note on the page; a run that does not exist, or no readable run at all, "
        "is an error (exit code 2).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder: runs/SYSTEM/NAME (newest version) or a version"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="page (default: report.html)"
    )
    parser.add_argument(
        "--trust", metavar="PACKAGE", help="import the gallery of a package of your own; several: PACKAGE,PACKAGE"
    )
    parser.add_argument("--title", default="What the experts learned", help="heading of the page")
    return parser


def main(args: list[str]) -> int:
    """Write the page."""
    from moeapps.commands.trust import take_trust

    words, packages = take_trust(args)
    options = parser().parse_args(words)
    from moeapps.files import write_text
    from moeapps.reporting.page import render
    from moeapps.reporting.view import group, read_run
    from moeapps.text import lines
    from moeapps.training.folders import newest_version

    if options.output.is_dir():
        raise ValueError(f"-o {options.output} is a folder; name a file, such as {options.output / 'report.html'}")
    if options.output.suffix.lower() not in (".html", ".htm"):
        page = options.output.with_suffix(".html")
        raise ValueError(f"-o {options.output}: the page is HTML, and no program takes it for anything else; -o {page}")
    once = list({newest_version(path).resolve(): path for path in options.runs}.values())
    views = [read_run(path, number, packages) for number, path in enumerate(once)]
    for view in views:
        for note in view.notes:
            print(f"note: {lines(view.folder)}: {lines(note)}", file=sys.stderr)
    if not any(view.results is not None or view.curves.loss for view in views):
        raise ValueError("none of the runs has results or a training curve that can be read: there is nothing to show")
    write_text(options.output, render(group(views), options.title))
    size = options.output.stat().st_size / 1e6
    print(f"{len(views)} run{'s' if len(views) > 1 else ''}, {size:.1f} MB: {lines(options.output)}")
    return 0
