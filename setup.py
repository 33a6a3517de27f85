# SPDX-License-Identifier: Apache-2.0
"""Which files the wheel holds; all else is said in pyproject.toml.

The configs lie at the top of the repository, and in the wheel as ``moeapps/configs``: pyproject.toml cannot say that.
"""

from setuptools import find_packages, setup

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
)
