# SPDX-License-Identifier: Apache-2.0
"""The public face of the core: every class has an example that runs, and nothing is named by accident."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import moeapps.moe as core
import moeapps.moe.presets as presets

MODULES = ["moeapps.moe", *(m.name for m in pkgutil.walk_packages(core.__path__, "moeapps.moe."))]
CLASSES = [name for name in core.__all__ if inspect.isclass(getattr(core, name))]


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_class_has_a_short_example(name: str) -> None:
    doc = inspect.getdoc(getattr(core, name)) or ""
    examples = doctest.DocTestParser().get_examples(doc)
    assert examples
    assert sum(e.source.count("\n") + e.want.count("\n") for e in examples) <= 8


@pytest.mark.parametrize("name", presets.__all__)
def test_every_preset_explains_its_options(name: str) -> None:
    function = getattr(presets, name)
    doc = inspect.getdoc(function) or ""
    assert "Example:" in doc
    for option in inspect.signature(function).parameters.values():
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert f"{option.name}:" in doc


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_public_names_are_sorted_unique_and_exist() -> None:
    for module in (core, presets, importlib.import_module("moeapps.moe.routers")):
        assert sorted(set(module.__all__)) == list(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
