# SPDX-License-Identifier: Apache-2.0
"""The harness of ``make fuzz``: it counts what was tried, goes on where it stopped, and no way to fail ends it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fuzzing
from tests.fuzzing import CASES, RECORDS, Record, _cases, go_on, guarded, reader_name, record_of, refused

pytestmark = pytest.mark.medium

NUMBERS = st.integers(0, 255)


def reading(act: Callable[[int], object]) -> Callable[[], None]:
    """A reader's test, of which make test would run 5 cases."""

    @settings(max_examples=5)
    @given(number=NUMBERS)
    def test(number: int) -> None:
        act(number)

    return test


def write_seen(file: Path, number: int) -> None:
    with open(file, "a") as seen:
        seen.write(f"{number}\n")


def run(act: Callable[[int], object], item: pytest.Item, cases: int, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setenv(CASES, str(cases))
    record, test = record_of(item), reading(act)
    go_on(record, lambda most: guarded(lambda: _cases(test, {}, most, record.processes)))
    return record


@pytest.fixture
def item(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.Item:
    monkeypatch.setenv(RECORDS, str(tmp_path / "records"))
    found: pytest.Item = request.node
    return found


def test_cases_are_counted_by_what_became_of_them(
    item: pytest.Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"

    def act(number: int) -> None:
        write_seen(seen, number)
        if number % 2:
            refused()

    record = run(act, item, 60, monkeypatch)

    numbers = [int(line) for line in seen.read_text().split()]
    assert record.cases == len(numbers) == 60
    assert record.refused == sum(number % 2 for number in numbers)
    assert record.read == 60 - record.refused
    assert record.losses == []


def test_it_goes_on_where_it_stopped_with_new_cases(
    item: pytest.Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    first = run(lambda number: write_seen(seen, number), item, 30, monkeypatch)
    drawn = seen.read_text().split()
    second = run(lambda number: write_seen(seen, number), item, 60, monkeypatch)
    third = run(lambda number: write_seen(seen, number), item, 60, monkeypatch)

    assert (first.cases, second.cases, third.cases) == (30, 60, 60)
    assert second.processes == third.processes == 2
    assert json.loads(first.file.read_text())["cases"] == 60
    assert seen.read_text().split()[30:] != drawn


def never(number: int) -> None:
    while True:
        pass


def crash(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def take(number: int) -> list[bytes]:
    return [b"x" * 2**20 for _ in range(400)]


def wrong(number: int) -> Any:
    return {}[f"at {number}"]


@pytest.mark.parametrize(
    ("act", "kind"), [(never, "hang"), (crash, "crash (SIGKILL)"), (take, "memory"), (wrong, "exception")]
)
def test_a_reader_that_fails_in_any_way_is_a_loss_and_the_next_cases_are_tried(
    act: Callable[[int], object], kind: str, item: pytest.Item, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "SECONDS", 0.3 if act is never else 5.0)

    record = run(act, item, 100, monkeypatch)

    assert [loss["kind"] for loss in record.losses] == [kind] * fuzzing.MOST_LOSSES
    assert [loss["seed"] for loss in record.losses] == [0, 1, 2]
    assert record.read == 0
    if act is wrong:
        assert "KeyError: 'at 0'" in record.losses[0]["message"]


def test_memory_that_is_free_here_counts_where_a_case_takes_it(
    item: pytest.Item, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [take(0)[::50], take(0)[::50]]  # the rest is free, and glibc keeps it

    record = run(take, item, 1, monkeypatch)

    assert [loss["kind"] for loss in record.losses] == ["memory"]
    assert kept


def test_names_of_readers() -> None:
    assert reader_name("test_a_damaged_image_file_is_read_or_told[.png]") == "image file .png"
    assert reader_name("test_a_mesh_with_a_damaged_header_is_read_or_told") == "a mesh with a damaged header"
