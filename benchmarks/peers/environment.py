# SPDX-License-Identifier: Apache-2.0
"""An environment for the packages of other projects: it sees ours and adds theirs, so that nothing of ours changes.

They stay out of the project's own: torchmetrics and others import transformers where they find it. Each package is
installed by itself, because each may fail on some machine without the others.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
FOLDER = ROOT / "build" / "peers"
ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ARROW_NUM_THREADS"), "1"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
}


def pinned(file: Path = REQUIREMENTS) -> dict[str, str]:
    """Name -> version of every package that the file pins.

    Raises:
        ValueError: a line that pins no version.
    """
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        words = line.split("#")[0].strip()
        if words:
            name, equal, version = words.partition("==")
            if not (name and equal and version):
                raise ValueError(f"{file.name}: {words!r} pins no version; write name==version")
            found[name] = version
    return found


class Environment:
    """A folder with a Python of its own.

    Args:
        folder: where it is, or will be made.
        requirements: file of the pinned packages.
        source: further options of ``pip install``, such as ``--no-index --find-links FOLDER``.
    """

    def __init__(
        self, folder: Path = FOLDER / "systems", requirements: Path = REQUIREMENTS, source: Sequence[str] = ()
    ) -> None:
        self.folder, self.versions, self.source = folder, pinned(requirements), list(source)
        self.python = folder / "bin" / "python"

    def make(self) -> None:
        """Make it unless it is there: a plain one, with the folders of this process' packages behind its own."""
        if (self.folder / "made").exists():
            return
        subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        (target,) = self.folder.glob("lib/python*/site-packages")
        (target / "ours.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
        (self.folder / "made").touch()

    def missing(self, packages: Sequence[str]) -> str:
        """Install what is not there yet; return why a package is not installable here, or nothing.

        Raises:
            KeyError: a package that the requirements do not pin.
        """
        self.make()
        for name in packages:
            wanted = f"{name}=={self.versions[name]}"
            done = self.folder / f"{wanted}.done"
            if done.exists():
                continue
            quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
            pip = [str(self.python), "-m", "pip", "install", *quiet, *self.source, wanted]
            process = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if process.returncode:
                said = [line for line in process.stdout.splitlines() if line.startswith("ERROR")]
                return f"{wanted} is not installable here: {(said or ['pip failed'])[-1].removeprefix('ERROR: ')}"
            done.touch()
        return ""

    def run(
        self, words: Sequence[str], variables: Mapping[str, str] | None = None, root: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """Run its Python from the root of the repository, or of a tree, on one thread; return what it wrote."""
        known = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(root), **(variables or {})}
        return subprocess.run([str(self.python), *words], cwd=root, env=known, capture_output=True, text=True)


def tree_with_race(before: Path, folder: Path) -> Path:
    """Make a tree of links: another checkout, with this one's race and what else of its benchmarks the race needs.

    Args:
        before: the checkout; its own benchmarks stay where it has them, since they know its code.
        folder: where the links are made; must not be there.

    Raises:
        FileNotFoundError: it is no checkout of this project.
    """
    if not (before / "moeapps").is_dir():
        raise FileNotFoundError(f"{before} has no folder moeapps: give a checkout of this project")
    (folder / "benchmarks").mkdir(parents=True)
    for source in (before, before / "benchmarks", ROOT / "benchmarks"):
        for path in source.iterdir():
            link = folder / path.relative_to(source.parent if source.name == "benchmarks" else source)
            if path.name not in (".git", ".venv", "benchmarks", "peers") and not link.exists():
                link.symlink_to(path)
    (folder / "benchmarks" / "peers").symlink_to(ROOT / "benchmarks" / "peers")
    return folder


def python_with(packages: Sequence[str], folder: Path) -> Path:
    """The Python of an environment that has these packages.

    Raises:
        RuntimeError: one that is not installable here.
    """
    environment = Environment(folder)
    reason = environment.missing(packages)
    if reason:
        raise RuntimeError(reason)
    return environment.python
