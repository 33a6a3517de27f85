# SPDX-License-Identifier: Apache-2.0
"""Give finished cells the digest of today's configs where these say the same in other words.

``python -m benchmarks.evidence.restamp SYSTEM --before COMMIT`` compares what every variant came to at that commit with
what it comes to now and prints each difference with the variants it is found in. Class paths that moved are told by
``--moved FILE`` (a JSON mapping of old prefixes to new ones) and are no difference. With ``--because REASON`` the cells
that carry the old digest get the new one, and ``benchmarks/results/<system>/restamps.json`` keeps differences and
reason for every reader. Numbers are never touched; ``--verify`` shows that they still come out.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeapps.commands.messages import UsageError
from moeapps.evidence.cells import read_cell, write_cell
from moeapps.files import write_text

ROOT = Path(__file__).resolve().parents[2]
# Runs inside the tree it asks about: an old tree knows its own grid.
_SNAPSHOT = """
import json, sys, yaml
from pathlib import Path
try:
    from benchmarks.grids import load_grid
    from moeapps.evidence.grid import overlaid
except ImportError:
    from benchmarks.evidence.grid import _overlaid as overlaid, load_grid
grid, found = load_grid(sys.argv[1]), {}
for name, variant in grid.all_variants.items():
    merged = {}
    for config in (grid.config, *variant.overlays):
        merged = overlaid(merged, yaml.safe_load(Path(config).read_text(encoding="utf-8")))
    words = [*grid.flags, *variant.flags, "--seeds", *grid._data_seed_flags(variant)]
    found[name] = {"digest": grid.definition(name, Path(".")), "says": {"config": merged, "words": words}}
print(json.dumps(found, default=str))
"""

Snapshot = dict[str, dict[str, Any]]


def snapshot(system: str, tree: Path) -> Snapshot:
    """Ask a tree what each variant of a system comes to: name -> digest and the merged configs with the words."""
    command = [sys.executable, "-c", _SNAPSHOT, system]
    answer = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    found: Snapshot = json.loads(answer.stdout)
    return found


def snapshot_at(system: str, commit: str) -> Snapshot:
    """Ask the tree of a commit, checked out into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
        try:
            return snapshot(system, tree)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def renamed(value: Any, moved: Mapping[str, str]) -> Any:
    """Write old class paths in the new way, in every text of a nested value."""
    if isinstance(value, dict):
        return {key: renamed(item, moved) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, moved) for item in value]
    if isinstance(value, str) and moved:
        longest = sorted(moved, key=len, reverse=True)
        pattern = "|".join(rf"(?<![\w.]){re.escape(old)}(?!\w)" for old in longest)
        return re.sub(pattern, lambda match: moved[match.group()], value)
    return value


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Give every leaf of a nested value under its dotted path."""
    if isinstance(value, dict) and value:
        parts = [flat(item, f"{path}.{key}") for key, item in value.items()]
    elif isinstance(value, list) and value:
        parts = [flat(item, f"{path}.{i}") for i, item in enumerate(value)]
    else:
        return {path.lstrip("."): value}
    return {key: leaf for part in parts for key, leaf in part.items()}


def differences(before: Any, after: Any) -> list[str]:
    """List what differs between two nested values, one line a leaf, sorted by path."""
    old, new = flat(before), flat(after)
    lines = []
    for path in sorted(old.keys() | new.keys()):
        if path not in old:
            lines.append(f"added {path}: {new[path]!r}")
        elif path not in new:
            lines.append(f"gone {path}: {old[path]!r}")
        elif old[path] != new[path]:
            lines.append(f"changed {path}: {old[path]!r} -> {new[path]!r}")
    return lines


def compare(before: Snapshot, after: Snapshot, moved: Mapping[str, str], only: str = "*") -> dict[str, list[str]]:
    """Give each difference with the variants that have it, for variants of both trees whose digest changed."""
    found: dict[str, list[str]] = {}
    for name in after:
        if name in before and fnmatch.fnmatch(name, only) and before[name]["digest"] != after[name]["digest"]:
            lines = differences(renamed(before[name]["says"], moved), after[name]["says"])
            for line in lines or ["nothing but moved class paths"]:
                found.setdefault(line, []).append(name)
    return found


def restamp(folder: Path, system: str, before: Snapshot, after: Snapshot, only: str = "*") -> int:
    """Give cells that carry a variant's old digest its new one; return how many."""
    count = 0
    for path in sorted(folder.glob("[!.]*.json")):
        cell = read_cell(path, system)
        if cell.variant not in before or cell.variant not in after or not fnmatch.fnmatch(cell.variant, only):
            continue
        old, new = before[cell.variant]["digest"], after[cell.variant]["digest"]
        if cell.definition == old != new:
            write_cell(folder, replace(cell, definition=new))
            count += 1
    return count


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.restamp", description=__doc__)
    parser.add_argument("system")
    parser.add_argument("--before", required=True, metavar="COMMIT", help="commit whose configs made the cells")
    parser.add_argument("--moved", type=Path, metavar="FILE", help="JSON: old prefix of class paths -> new prefix")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only the variants that match (* and ?)")
    parser.add_argument("--because", metavar="REASON", help="why no number changes; without it nothing is written")
    options = parser.parse_args(words)
    moved: dict[str, str] = json.loads(options.moved.read_text(encoding="utf-8")) if options.moved else {}
    try:
        before, after = snapshot_at(options.system, options.before), snapshot(options.system, ROOT)
    except subprocess.CalledProcessError as error:
        raise UsageError(f"{options.system} at {options.before}: {error.stderr or error}") from error
    found = compare(before, after, moved, options.only)
    for line, names in found.items():
        print(f"{line}  [{', '.join(names) if len(names) < 4 else f'{len(names)} variants'}]")
    if not options.because:
        print("Nothing is written without --because REASON.")
        return 0
    results = ROOT / "benchmarks" / "results" / options.system
    count = restamp(results / "cells", options.system, before, after, options.only)
    log = results / "restamps.json"
    entries = json.loads(log.read_text(encoding="utf-8")) if log.exists() else []
    commit = subprocess.run(
        ["git", "rev-parse", "--short", options.before], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()  # a branch moves on, a commit does not
    entries.append({"before": commit, "cells": count, "because": options.because, "differences": found})
    write_text(log, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    print(f"{count} cells have the new digest; {log.relative_to(ROOT)} says why.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
