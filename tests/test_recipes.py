# SPDX-License-Identifier: Apache-2.0
"""What others build and run from: the image's recipe, locked versions, the workflow, templates, the citation."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

RECIPES = [Path("Dockerfile"), *sorted(Path(".github").rglob("*.yml")), *sorted(Path(".github").rglob("*.md"))]
SYSTEMS = sorted(path.stem for path in Path("configs").glob("*.yaml"))


def name_of(text: str) -> str:
    """The name of a distribution as an index compares it."""
    return re.sub(r"[-_.]+", "-", text).lower()


def pins(file: str) -> dict[str, str]:
    lines = [line for line in Path(file).read_text().splitlines() if "==" in line and not line.startswith("#")]
    return {name_of(name): version.split()[0] for name, version in (line.split("==") for line in lines)}


def instructions() -> list[tuple[str, str]]:
    """Word and rest of each instruction of the Dockerfile, continued lines joined."""
    text = "\n".join(line for line in Path("Dockerfile").read_text().splitlines() if not line.startswith("#"))
    return [
        (word, rest)
        for word, _, rest in (line.partition(" ") for line in text.replace("\\\n", " ").splitlines() if line.strip())
    ]


# The image -----------------------------------------------------------------------------------------------------------


def test_the_image_is_built_on_one_pinned_version() -> None:
    (base,) = [rest for word, rest in instructions() if word == "FROM"]

    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", base)
    wanted = tomllib.loads(Path("pyproject.toml").read_text())["project"]["requires-python"]
    assert [int(part) for part in re.findall(r"\d+", base)[:2]] >= [int(part) for part in re.findall(r"\d+", wanted)]


def test_nothing_is_installed_or_run_as_root_but_packages_of_the_system() -> None:
    steps = instructions()
    user = [word for word, _ in steps].index("USER")
    as_root = [rest for word, rest in steps[:user] if word == "RUN"]

    assert [rest for word, rest in steps if word == "USER"] == ["moe"]
    assert all(rest.startswith(("apt-get update", "useradd")) for rest in as_root)
    assert [word for word, _ in steps if word in ("CMD", "ENTRYPOINT")] == ["CMD"]


def test_packages_are_installed_by_their_hashes_and_the_code_without_any_other() -> None:
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]

    assert "--require-hashes --requirement requirements.lock" in installs[0]
    assert "--no-deps --no-build-isolation --editable ." in installs[1]
    assert len(installs) == 2


def test_the_image_runs_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), flags=re.MULTILINE))
    ran = re.findall(r"\bmake ([a-z-]+)", Path("Dockerfile").read_text()) + re.findall(
        r'"make", "([a-z-]+)"', Path("Dockerfile").read_text()
    )

    assert {"demo", "test"} <= set(ran) <= targets
    # What `make setup` would look for is there, and newer than what it depends on: nothing is installed twice.
    assert "touch .venv/.installed" in Path("Dockerfile").read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_no_secret_and_no_host_stands_in_a_recipe(recipe: Path) -> None:
    text = recipe.read_text()

    assert not re.search(r"(?i)(password|passwd|api[_-]?key|secret|token)\s*[=:]", text)
    assert not re.search(r"https?://|index-url|find-links|trusted-host", text)


def test_what_a_checkout_makes_is_no_part_of_the_image() -> None:
    ignored = set(Path(".dockerignore").read_text().split())

    assert {".venv", "runs", "data", "build", "dist", ".env"} <= ignored


# Versions ------------------------------------------------------------------------------------------------------------


def test_the_lock_has_the_tested_versions_each_with_hashes() -> None:
    text = Path("requirements.lock").read_text()

    assert pins("requirements.lock") == pins("constraints.txt")
    blocks = re.split(r"\n(?=\S)", text.strip())
    assert len(blocks) == len(pins("constraints.txt"))
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
    assert "http" not in re.sub(r"httpcore\w*|httpx\w*|aiohttp", "", text)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]

    names = {name_of(re.match(r"[\w.-]+", line)[0]) for line in wanted}  # type: ignore[index]
    assert names <= set(pins("constraints.txt"))


# Elsewhere -----------------------------------------------------------------------------------------------------------


def test_the_workflow_runs_the_gates_that_are_in_one_file() -> None:
    workflow = yaml.safe_load(Path(".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()

    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert workflow["permissions"] == {"contents": "read"}
    assert Path(".ci/run").stat().st_mode & 0o111
    gates = re.findall(r"^make ([a-z-]+)$", Path(".ci/run").read_text(), flags=re.MULTILINE)
    assert gates == ["test", "check", "docs"]


@pytest.mark.parametrize("template", sorted(Path(".github/ISSUE_TEMPLATE").glob("*.md")), ids=lambda path: path.stem)
def test_a_template_says_what_it_is_for(template: Path) -> None:
    _, head, body = template.read_text().split("---\n", 2)

    assert set(yaml.safe_load(head)) == {"name", "about"}
    assert body.strip()


def test_every_system_is_cited_with_its_paper() -> None:
    citation = yaml.safe_load(Path("CITATION.cff").read_text())
    version = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]

    assert citation["version"] == version
    cited = {re.search(r"arXiv ([\d.]+)", paper["notes"])[1] for paper in citation["references"]}  # type: ignore[index]
    pages = {system: Path(f"docs/papers/{system}.md").read_text() for system in SYSTEMS}
    assert {re.search(r"arXiv\s+(\d{4}\.\d{5})", page)[1] for page in pages.values()} == cited  # type: ignore[index]
    assert len(citation["references"]) == len(SYSTEMS)
    for paper in citation["references"]:
        assert paper["title"]
        assert paper["authors"]
        assert 2000 < paper["year"] < 2100
