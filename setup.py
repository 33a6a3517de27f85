# SPDX-License-Identifier: Apache-2.0
"""Which files the wheel holds, and what a package index shows of README.md; all else is said in pyproject.toml.

The configs lie at the top of the repository, and in the wheel as ``moeapps/configs``: pyproject.toml cannot say that.
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

SOURCE = os.environ.get("MOEAPPS_SOURCE", "")
"""Address below which the files of this version can be read (``https://.../raw/v0.2.0``); empty where there is none."""


def index_page(readme: str, source: str) -> str:
    """Return README.md for a package index, which knows none of our files.

    Links and pictures get addresses below ``source``. Without one, a link is its text, with the file that it means (it
    is in the source archive), and a picture is left out with what it shows; no link leads nowhere.

    Args:
        readme: the text; blocks of code are left as they are.
        source: address of the folder that holds it.
    """

    def elsewhere(found: re.Match[str]) -> str:
        picture, text, target = found[1], found[2], found[3]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        if source:
            return f"{picture}[{text}]({source.rstrip('/')}/{target})"
        plain = text.strip("`")
        return f"*({plain})*" if picture else text if plain == target else f"{text} (`{target}`)"

    parts = re.split(r"(^```.*?^```$)", readme, flags=re.MULTILINE | re.DOTALL)
    link = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
    return "".join(part if part.startswith("```") else link.sub(elsewhere, part) for part in parts)


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["moeapps", "moeapps.*", "tasks", "tasks.*"]), "moeapps.configs"],
        package_dir={"moeapps.configs": "configs"},
        package_data={
            "moeapps": ["py.typed", "templates/**/*"],
            "moeapps.reporting": ["templates/*"],
            "moeapps.configs": ["**/*.yaml"],
            "": ["*.json", "README.md"],
        },
        include_package_data=False,
        long_description=index_page(Path("README.md").read_text(encoding="utf-8"), SOURCE),
        long_description_content_type="text/markdown",
    )
