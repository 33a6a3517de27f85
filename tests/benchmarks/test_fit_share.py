# SPDX-License-Identifier: Apache-2.0
"""What a fit spends outside of its steps: seconds count once, and the page says what was measured."""

from __future__ import annotations

import json
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.fit_phases import Clock
from benchmarks.fit_share import BEGIN, END, PAGE, PARTS, RESULTS, page_of
from benchmarks.markdown import wrapped


def test_each_second_counts_for_the_innermost_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])

    def spend(seconds: float, then: Any = None) -> None:
        now[0] += seconds
        if then is not None:
            then()

    clock, owner = Clock(), SimpleNamespace(log=spend, step=spend, load=spend)
    clock.wrap(owner, "log", "logging")
    clock.wrap(owner, "step", "steps")
    clock.wrap(owner, "load", "loader", inside="steps")
    spend(3.0)
    clock.base("setup")
    owner.load(5.0)  # outside of a step: no part of its own
    owner.step(1.0, lambda: (owner.log(0.25), owner.load(0.5)))
    with pytest.raises(ZeroDivisionError):
        owner.step(2.0, lambda: 1 / 0)
    spend(4.0)
    clock.tick()

    assert dict(clock.spent) == {"imports": 3.0, "setup": 9.0, "steps": 3.0, "logging": 0.25, "loader": 0.5}
    assert clock.last == sum(clock.spent.values())


def test_the_page_says_what_was_measured() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))

    block = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert block.strip() == wrapped(page_of(report)).strip()
    for fits in report["fits"].values():
        for fit in fits.values():
            assert set(fit["parts_s"]) == set(PARTS)
            assert sum(fit["parts_s"].values()) == pytest.approx(fit["total_s"], abs=0.1)
            assert fit["share"] < fit["bound"] <= 1
    assert all(re.fullmatch(r"[a-z_]+", system) for system in report["starts"])
