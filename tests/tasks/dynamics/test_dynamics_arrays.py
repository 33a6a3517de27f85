# SPDX-License-Identifier: Apache-2.0
"""Trajectories in npz archives and generated control charts as environments: they round-trip, split and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from series_files import write_npz

from tasks.dynamics.data.batch import Trajectories, collate_environments
from tasks.dynamics.data.readers.npz_format import NpzTrajectories, read_npz
from tasks.dynamics.data.readers.ts_format import SeriesFormatError
from tasks.dynamics.data.series import SyntheticControl, control_charts
from tasks.dynamics.datamodule import DynamicsData, Environments

RNG = np.random.default_rng(0)


# --- npz --------------------------------------------------------------------------------------------------------------


def npz_files(root: Path, leak: bool = False) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Two families of three environments with different horizons, and two new environments each."""
    t = np.stack([np.linspace(0, 6, 20), np.linspace(0, 8, 20)])
    shapes = {"train": (2, 3, 4), "test": (2, 3, 8), "adapt_support": (2, 2, 1), "adapt_query": (2, 2, 6)}
    arrays = {name: RNG.normal(size=(*shape, 20, 2)) for name, shape in shapes.items()}
    if leak:
        arrays["test"][:, :, 1, 0] = arrays["train"][:, :, 2, 0]
    for name, x in arrays.items():
        write_npz(root / f"{name}.npz", x, t, parameters=[[1.0], [2.0]] if "adapt" in name else [[3.0]])
    return arrays


ADAPT = {"adapt_support": "adapt_support.npz", "adapt_query": "adapt_query.npz"}


def test_npz_round_trip_of_both_layouts(tmp_path: Path) -> None:
    x, t = RNG.normal(size=(3, 4, 20, 2)), np.linspace(0, 9.5, 20)
    write_npz(tmp_path / "lv.npz", x, t)
    found = read_npz(tmp_path / "lv.npz")
    np.testing.assert_array_equal(found.x, x)
    assert found.dt == pytest.approx([0.5] * 3)
    assert found.bounds is None

    arrays = npz_files(tmp_path)
    found = read_npz(tmp_path / "train.npz")
    np.testing.assert_array_equal(found.x, arrays["train"].reshape(6, 4, 20, 2))
    assert found.dt == pytest.approx([6 / 19] * 3 + [8 / 19] * 3)
    assert found.bounds is not None
    np.testing.assert_array_equal(found.bounds, np.abs(arrays["train"]).max((2, 3)).reshape(6, 2))
    assert found.parameters == [[3.0]]
    assert np.load(tmp_path / "train_bounds.npy").shape == (2, 3, 1, 1, 2)


def test_npz_domains_and_splits(tmp_path: Path) -> None:
    arrays = npz_files(tmp_path)
    source = NpzTrajectories(root=tmp_path, choice_environments=1, **ADAPT)  # type: ignore[arg-type]
    data = DynamicsData(source=source)

    assert data.roles == {"seen": ["trained"], "validation": ["for_choices"], "unseen": ["adapt"]}
    val, test = data.trajectories("trained", "val"), data.trajectories("trained", "test")
    assert (val.x.shape[:2], test.x.shape[:2]) == ((6, 4), (6, 4))
    choices, adapt = data.trajectories("for_choices", "val"), data.trajectories("adapt", "test")
    assert (choices.x.shape[:2], adapt.x.shape[:2]) == ((1, 5), (3, 3))
    torch.testing.assert_close(
        adapt.support.x[1:, 0].double(), torch.tensor(arrays["adapt_support"][1, :, 0]).float().double()
    )
    torch.testing.assert_close(
        choices.query.x[0].double(), torch.tensor(arrays["adapt_query"][0, 0, :4]).float().double()
    )
    assert adapt.family.tolist() == [0, 1, 1]


def test_test_trajectories_that_start_like_training_ones_are_left_out(tmp_path: Path) -> None:
    npz_files(tmp_path, leak=True)
    data = DynamicsData(source=NpzTrajectories(root=tmp_path))
    starts = torch.cat([data.trajectories("trained", s).x[:, :, 0] for s in ("val", "test")], 1)  # type: ignore[arg-type]
    train = data.trajectories("trained", "train").x[:, :, 0]

    assert starts.shape[1] == 7
    assert not (starts[:, :, None] == train[:, None]).all(-1).any()


def test_stride_keeps_times(tmp_path: Path) -> None:
    npz_files(tmp_path)
    data = DynamicsData(source=NpzTrajectories(root=tmp_path, stride=5))
    batch = next(iter(data.train_dataloader()))

    assert batch.x.shape[2] == data.facts["num_steps"] == 4
    assert sorted({round(v, 4) for v in batch.dt.tolist()}) == [round(5 * 6 / 19, 4), round(5 * 8 / 19, 4)]


def test_damaged_npz_is_named(tmp_path: Path) -> None:
    npz_files(tmp_path)
    with pytest.raises(SeriesFormatError, match="no file"):
        NpzTrajectories(root=tmp_path, train="none.npz")
    with pytest.raises(SeriesFormatError, match="differ in"):
        NpzTrajectories(root=tmp_path, test="adapt_query.npz")
    with pytest.raises(ValueError, match="give both or none"):
        NpzTrajectories(root=tmp_path, adapt_query="adapt_query.npz")
    # Support and queries of different parameters: the defect of the public generator.
    (tmp_path / "adapt_query_envs.json").write_text("[[9.0]]")
    with pytest.raises(SeriesFormatError, match="different parameters"):
        NpzTrajectories(root=tmp_path, **ADAPT)  # type: ignore[arg-type]
    np.savez(tmp_path / "x.npz", X=np.zeros((2, 3, 4)), t=np.arange(3))
    with pytest.raises(SeriesFormatError, match="expected X"):
        read_npz(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", Y=np.zeros(3))
    with pytest.raises(SeriesFormatError, match="must hold X and t"):
        read_npz(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", X=np.zeros((1, 1, 3, 1)), t=np.array([0.0, 1.0, 3.0]))
    with pytest.raises(SeriesFormatError, match="evenly"):
        read_npz(tmp_path / "x.npz")


# --- control charts ---------------------------------------------------------------------------------------------------


def test_control_charts_have_the_moments_of_their_formulas() -> None:
    rng = np.random.default_rng(1)
    charts = {name: control_charts(name, 2000, 60, rng) for name in SyntheticControl.default_seen}
    normal, cyclic = charts["normal"], charts["cyclic"]
    slopes = {name: np.polyfit(np.arange(60), charts[name].T, 1)[0] for name in ("increasing", "decreasing")}

    assert normal.mean() == pytest.approx(30, abs=0.05)
    assert normal.std() == pytest.approx(np.sqrt(12), rel=0.01)  # 2 U(-3, 3)
    assert normal.min() >= 24
    assert normal.max() <= 36
    # A sine of amplitude a adds a^2 / 2; E a^2 = (15^3 - 10^3) / 15.
    assert (cyclic.std() ** 2 - 12) == pytest.approx((15**3 - 10**3) / 15 / 2, rel=0.05)
    assert slopes["increasing"].mean() == pytest.approx(0.35, abs=0.01)
    assert slopes["decreasing"].mean() == pytest.approx(-0.35, abs=0.01)
    for name, sign in (("upward_shift", 1), ("downward_shift", -1)):
        change = charts[name][:, 40:].mean(1) - charts[name][:, :20].mean(1)
        assert change.mean() == pytest.approx(sign * 13.75, abs=0.2)
        np.testing.assert_allclose(charts[name][:, :19].mean(), 30, atol=0.1)


def test_control_charts_are_six_families_with_new_recordings() -> None:
    data = DynamicsData(source=SyntheticControl(series=5, new_series=2))

    assert data.facts["num_environments"] == 30
    assert data.facts["state_dim"] == 1
    assert next(iter(data.train_dataloader())).x.shape == (30, 1, 40, 1)
    parts = [data.trajectories(name, "test").query.x[:, 0, :, 0] for name in data.domain_names]
    rows = torch.cat(parts)
    assert len(torch.unique(rows, dim=0)) == len(rows) == 30 + 24


# --- batches ----------------------------------------------------------------------------------------------------------


def test_environments_of_different_form_do_not_share_a_batch() -> None:
    def one(T: int) -> Trajectories:
        number = torch.zeros(1, dtype=torch.int64)
        return Trajectories(torch.zeros(1, 2, T, 3), torch.ones(1), number, number, None, torch.ones(1))

    assert collate_environments([one(4), one(4)]).x.shape == (2, 2, 4, 3)
    with pytest.raises(ValueError, match="differ in"):
        collate_environments([one(4), one(5)])


@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_batch_is_one_index_and_holds_what_its_environments_hold(
    batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DynamicsData(source=SyntheticControl(series=5, new_series=2), batch_size=batch_size, steps_per_epoch=3)
    loader = data.train_dataloader()
    drawn = [list(rows) for rows in loader.batch_sampler]
    calls = []
    index = Trajectories.environments
    monkeypatch.setattr(Trajectories, "environments", lambda self, rows: calls.append(0) or index(self, rows))

    batches = list(loader)

    assert len(calls) == len(batches) == 3
    wholes = [data.trajectories(name, "train") for name in data.present("seen")]
    every = {
        name: torch.cat([getattr(part, name) for part in wholes]) for name in ("x", "dt", "env", "family", "scale")
    }
    for rows, batch in zip(drawn, batches, strict=True):
        rows.sort(key=lambda row: int(every["env"][row]))
        for name, values in every.items():
            assert torch.equal(getattr(batch, name), torch.stack([values[row] for row in rows])), name


def test_environments_without_gaps_make_a_batch_without_a_mask() -> None:
    def one(number: int, mask: torch.Tensor | None) -> Trajectories:
        env = torch.tensor([number])
        return Trajectories(torch.full((1, 2, 4, 3), float(number)), torch.ones(1), env, env, mask, torch.ones(1))

    gap = torch.ones(1, 2, 4, dtype=torch.bool)
    gap[0, 0, 1] = False
    items = Environments(one(2, None), one(0, gap), one(1, None))

    assert items.batch(torch.tensor([0, 2])).mask is None
    batch = items.batch(torch.tensor([0, 1, 2]))
    assert batch.env.tolist() == [0, 1, 2]
    assert batch.mask is not None
    assert batch.mask.sum((1, 2)).tolist() == [7, 8, 8]
    assert items.batch(torch.tensor([1])).mask.sum() == 7  # type: ignore[union-attr]
