# SPDX-License-Identifier: Apache-2.0
"""Generated families: conserved quantities, equal fields, honest splits, and the data module over them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.dynamics.data import fields
from tasks.dynamics.data.families import (
    Glycolytic,
    Lorenz,
    LotkaVolterra,
    OdeBench10,
    OdeBench10B,
    OdeFamilies,
    Selkov,
)
from tasks.dynamics.data.fields import FORMULAS, Family, field_of, integrate
from tasks.dynamics.datamodule import DynamicsData

F64 = torch.float64
SETS: list[type[OdeFamilies]] = [OdeFamilies, OdeBench10, OdeBench10B, LotkaVolterra, Glycolytic, Selkov, Lorenz]
FAMILIES = [*fields.ODEFAM, *fields.odebench(5), *fields.LOTKA_VOLTERRA, *fields.GLYCOLYTIC, *fields.SELKOV]


def family(name: str) -> Family:
    return next(f for f in fields.ODEFAM if f.name == name)


def solutions(name: str) -> tuple[Tensor, Tensor]:
    """Settings [S, P, 1, 1] and float64 trajectories [S, N, T, D] of a family."""
    chosen = family(name)
    settings = torch.tensor([s for group in chosen.settings.values() for s in group], dtype=F64)
    return settings[..., None, None], torch.from_numpy(OdeFamilies().generate(chosen))


CONSERVED: dict[str, Callable[..., Tensor]] = {
    "lotka_volterra": lambda x, y, a, b, d, g: d * x - g * x.log() + b * y - a * y.log(),
    "harmonic": lambda x, y, c: y**2 / 2 + c * x**2 / 2,
}


@pytest.mark.parametrize("name", CONSERVED)
def test_conserved_quantity_is_conserved(name: str) -> None:
    settings, x = solutions(name)
    value = CONSERVED[name](*x.unbind(-1), *settings.unbind(1))

    assert float((value - value[..., :1]).abs().max()) < 1e-6
    assert float(value.std()) > 1e-2  # and it is not a constant of the formula


@pytest.mark.parametrize(("name", "friction"), [("double_well", 0), ("damped", 1), ("pendulum", 1)])
def test_friction_takes_as_much_energy_as_its_power_says(name: str, friction: int) -> None:
    """E(t) - E(0) = -c * integral of y^2, with a potential each; Simpson's rule on a fine grid."""
    potential: dict[str, Callable[..., Tensor]] = {
        "double_well": lambda x, c: x**4 / 4 - x**2 / 2,
        "damped": lambda x, c: c * x**2 / 2,
        "pendulum": lambda x, c: c * (1 - x.cos()),
    }
    chosen = family(name)
    setting = torch.tensor([chosen.settings["train"][1]], dtype=F64)
    coarse = replace(chosen, substeps=1)
    x = integrate(coarse, setting, torch.tensor([[chosen.low, chosen.high]], dtype=F64), 801)
    position, speed = x.unbind(-1)
    energy = speed**2 / 2 + potential[name](position, setting[0, 0])
    h = chosen.horizon / 800
    power = speed**2
    integral = h / 3 * (power[..., :-2:2] + 4 * power[..., 1:-1:2] + power[..., 2::2]).sum(-1)

    torch.testing.assert_close(energy[..., -1] - energy[..., 0], -setting[0, friction] * integral, atol=1e-7, rtol=0)


def test_families_37_and_40_of_odebench_are_one_field() -> None:
    x, c = torch.randn(3, 5, 2, dtype=F64), torch.tensor([[0.3], [0.9], [1.4]], dtype=F64)
    t = torch.zeros(3, dtype=F64)

    torch.testing.assert_close(field_of("van_der_pol", c)(t, x), field_of("duffing", c)(t, x))


def test_a_harmonic_oscillator_is_a_damped_one_without_friction() -> None:
    x, c, t = torch.randn(2, 5, 2, dtype=F64), torch.rand(2, 1, dtype=F64), torch.zeros(2, dtype=F64)
    damped = field_of("damped", torch.cat([c, torch.zeros_like(c)], 1))

    torch.testing.assert_close(field_of("harmonic", c)(t, x), damped(t, x))


def test_lorenz_rings_are_mirror_images() -> None:
    x, forcing, t = torch.randn(2, 3, 10, dtype=F64), torch.rand(2, 1, dtype=F64), torch.zeros(2, dtype=F64)
    mirrored = field_of("lorenz96_mirrored", forcing)(t, x.flip(-1)).flip(-1)

    torch.testing.assert_close(field_of("lorenz96", forcing)(t, x), mirrored)
    assert not torch.allclose(field_of("lorenz96", forcing)(t, x), field_of("lorenz96_mirrored", forcing)(t, x))


def test_lorenz_advection_conserves_energy() -> None:
    """sum_i x_i dx_i/dt = -sum x_i^2 + F sum x_i: the quadratic part does no work."""
    x, forcing, t = torch.randn(2, 3, 10, dtype=F64), torch.rand(2, 1, dtype=F64), torch.zeros(2, dtype=F64)
    power = (x * field_of("lorenz96", forcing)(t, x)).sum(-1)

    torch.testing.assert_close(power, -(x**2).sum(-1) + forcing * x.sum(-1))


@pytest.mark.parametrize("b", [-0.7, 0.3, 1.2])
def test_selkov_rests_at_its_fixed_point(b: float) -> None:
    rest = torch.tensor([[[b, b / (0.1 + b * b)]]], dtype=F64)

    assert float(field_of("selkov", torch.tensor([[0.1, b]], dtype=F64))(torch.zeros(1), rest).abs().max()) < 1e-12


def test_glycolysis_keeps_the_balance_of_its_pools() -> None:
    """Reactions move matter: dS1 + dS6 = J0 - 3 v1 + 2 v3 - v5, written from the scheme and not from the code."""
    x = torch.tensor([[[0.5, 1.9, 0.18, 0.15, 0.16, 0.1, 0.064]]], dtype=F64)
    s1, s2, s3, s4, s5, s6, s7 = x[0, 0].tolist()
    k1, big_k1 = 90.0, 0.75
    v1, v3 = k1 * s1 * s6 / (1 + (s6 / big_k1) ** 4), 16 * s3 * (4 - s6)
    d = field_of("glycolytic", torch.tensor([[k1, big_k1]], dtype=F64))(torch.zeros(1), x)[0, 0].tolist()

    assert d[0] + d[5] == pytest.approx(2.5 - 3 * v1 + 2 * v3 - 1.28 * s6)
    assert d[1] + d[4] == pytest.approx(2 * v1 - 100 * s4 * s5 - 24 * s2 * s5)
    assert d[3] + 10 * d[6] == pytest.approx(v3 - 100 * s4 * s5 - 18 * s7)


@pytest.mark.parametrize("chosen", FAMILIES, ids=lambda f: f.name)
def test_trajectories_are_resolved(chosen: Family) -> None:
    settings = torch.tensor([chosen.settings["train"][0], chosen.settings["train"][-1]], dtype=F64)
    x0 = torch.tensor([[chosen.low, chosen.high]] * 2, dtype=F64)
    x, finer = (integrate(chosen, settings, x0, 11, refine=refine) for refine in (1, 2))

    assert float((x - finer).abs().max() / x.abs().max()) < 2e-5


def test_default_families_are_generated_in_two_seconds(tmp_path: Path) -> None:
    data = DynamicsData(cache_dir=tmp_path)
    start = time.thread_time()
    data.prepare_data()

    assert time.thread_time() - start < 2
    assert len(list((tmp_path / "dynamics").glob("*.npz"))) == 6


def starts(data: DynamicsData, domain: str, split: str) -> np.ndarray:
    return data.trajectories(domain, split).query.x[:, :, 0].flatten(0, 1).numpy()  # type: ignore[arg-type]


@pytest.mark.parametrize("make", SETS[:6], ids=lambda c: c.__name__)
def test_splits_and_domains_share_no_initial_condition(make: type[OdeFamilies]) -> None:
    """The public generator puts the reference conditions of training into the test too."""
    data = DynamicsData(source=make())
    seen = data.roles["seen"]
    parts = [starts(data, d, s) for d in seen for s in ("train", "val", "test")]
    parts += [starts(data, d, s) for d in data.domain_names if d not in seen for s in ("val", "test")]
    parts += [data.trajectories(d, "test").support.x[:, :, 0].flatten(0, 1).numpy() for d in data.roles["unseen"]]
    rows = np.concatenate(parts).round(6)
    references = sum(len(f.first) for f in data.source.catalogue.values() if f.name in seen)  # type: ignore[attr-defined]

    if references == 0:
        assert len(np.unique(rows, axis=0)) == len(rows)
    else:  # the references are in the training split of every environment, and in the support of new ones, alone
        train = np.concatenate(parts[0 : 3 * len(seen) : 3]).round(6)
        others = np.concatenate(
            [p for i, p in enumerate(parts[: -len(data.roles["unseen"])]) if i % 3 or i >= 3 * len(seen)]
        )
        for f in data.source.catalogue.values():  # type: ignore[attr-defined]
            for first in f.first:
                assert (np.abs(train - first).max(1) < 1e-5).any()
                assert not (np.abs(others - first).max(1) < 1e-5).any()


@pytest.mark.parametrize("make", SETS, ids=lambda c: c.__name__)
def test_new_environments_have_parameters_of_their_own(make: type[OdeFamilies]) -> None:
    """The public code adapts on the grid of training and tests on another one."""
    source = make()
    seen = list(source.default_seen)
    groups = [d for d in (*source.default_validation, *source.default_unseen) if d not in source.catalogue]
    everything = [(f.name, s) for d in [*seen, *groups] for f, _, s in source._members(d, seen)]

    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("make", [OdeFamilies, OdeBench10, OdeBench10B, Lorenz], ids=lambda c: c.__name__)
def test_inside_is_inside_and_outside_outside(make: type[OdeFamilies]) -> None:
    source = make()
    for f in (source.catalogue[name] for name in source.default_seen):
        train = np.array(f.settings["train"])
        low, high = train.min(0), train.max(0)
        for group in ("between", "inside"):
            assert ((np.array(f.settings[group]) >= low) & (np.array(f.settings[group]) <= high)).all()
        outside = np.array(f.settings["outside"])
        assert ((outside < low) | (outside > high))[:, low < high].all()


def test_support_and_query_come_from_one_environment() -> None:
    """Of a harmonic oscillator, c = (change of y^2) / -(change of x^2): the same on support and queries."""
    batch = DynamicsData().trajectories("inside", "test").environments(torch.arange(2))
    x = batch.x.double()
    c = -(x[..., -1, 1] ** 2 - x[..., 0, 1] ** 2) / (x[..., -1, 0] ** 2 - x[..., 0, 0] ** 2)

    torch.testing.assert_close(c, torch.tensor([[0.85 * 2.1], [1.15 * 2.1]], dtype=F64).expand_as(c), rtol=1e-3, atol=0)


def test_number_of_an_environment_does_not_tell_its_family() -> None:
    data = DynamicsData()
    batch = next(iter(data.train_dataloader()))
    first = DynamicsData(seed=1).facts["environments"]

    assert batch.env.tolist() == list(range(20))
    assert batch.family.tolist() != sorted(batch.family.tolist())
    assert sorted(batch.family.tolist()) == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert (batch.family.diff() != 0).sum() > 8
    assert first != data.facts["environments"]
    assert sorted(first) == sorted(data.facts["environments"])


def test_facts_agree_with_the_batches() -> None:
    data = DynamicsData()
    facts, batch = data.facts, next(iter(data.train_dataloader()))

    assert (facts["num_environments"], facts["num_steps"], facts["state_dim"]) == (20, 20, 2)
    assert batch.x.shape == (20, 4, 20, 2)
    assert facts["kind"] == "field"
    for row in range(20):
        name = facts["environments"][int(batch.env[row])]
        assert name.startswith(facts["families"][int(batch.family[row])] + "(")


def test_every_step_of_an_epoch_holds_every_environment_and_resuming_repeats_nothing() -> None:
    data = DynamicsData(batch_size=7, steps_per_epoch=5)
    loader = data.train_dataloader()
    rows = [batch.env.tolist() for batch in loader]
    assert [len(r) for r in rows] == [7] * 5
    assert all(r == sorted(set(r)) for r in rows)
    assert len({tuple(r) for r in rows}) == 5

    assert data._sampler is not None
    data._sampler.load_state_dict({"epoch": 0, "start": 2})
    assert [batch.env.tolist() for batch in loader] == rows[2:]


def test_scale_is_the_root_mean_squared_increment_of_training_and_reaches_the_test() -> None:
    data = DynamicsData()
    train, test = data.trajectories("harmonic", "train"), data.trajectories("harmonic", "test")

    torch.testing.assert_close(train.scale, train.x.diff(dim=2).square().mean((1, 2, 3)).sqrt())
    torch.testing.assert_close(test.scale, train.scale)
    new = data.trajectories("outside", "test")
    torch.testing.assert_close(new.scale, new.x[:, :1].diff(dim=2).square().mean((1, 2, 3)).sqrt())


def test_noise_is_on_what_is_observed_and_nowhere_else(tmp_path: Path) -> None:
    clean, noisy = (DynamicsData(source=OdeFamilies(noise=s), cache_dir=tmp_path) for s in (0.0, 0.05))
    difference = noisy.trajectories("harmonic", "train").x - clean.trajectories("harmonic", "train").x
    assert float(difference.std()) == pytest.approx(0.05, rel=0.1)
    torch.testing.assert_close(
        noisy.trajectories("harmonic", "test").x, clean.trajectories("harmonic", "test").x, atol=0, rtol=0
    )
    a, b = noisy.trajectories("inside", "test"), clean.trajectories("inside", "test")
    assert float((a.support.x - b.support.x).std()) == pytest.approx(0.05, rel=0.2)
    torch.testing.assert_close(a.query.x, b.query.x, atol=0, rtol=0)


def test_any_family_can_be_the_unseen_one() -> None:
    data = DynamicsData(seen=["pendulum", "harmonic"], validation=["between"], unseen=["double_well", "outside"])

    assert data.trajectories("double_well", "test").num_support == 1
    assert data.trajectories("pendulum", "train").num_support == 0
    assert data.facts["families"][:2] == ["pendulum", "harmonic"]
    assert set(data.trajectories("outside", "test").family.tolist()) == {0, 1}


def test_likeness_makes_oscillators_one() -> None:
    names = ["harmonic", "pendulum", "double_well", "van_der_pol"]
    state = torch.rand(5, 8, 2, dtype=F64) - 0.5

    def spread(likeness: float) -> float:
        ends = []
        for name in names:
            settings = torch.tensor(family(name).settings["train"], dtype=F64)
            same = Family(name, family(name).field, (0.0, 0.0), (1.0, 1.0), 4.0, {}, substeps=10)
            ends.append(integrate(same, settings, state, 5, likeness=likeness)[:, :, -1])
        return float(torch.stack(ends).std(0).mean())

    assert spread(0.0) > 1.5 * spread(0.5) > 3 * spread(0.9)
    with pytest.raises(ValueError, match="lotka_volterra"):
        DynamicsData(source=OdeFamilies(likeness=0.5))
    DynamicsData(source=OdeFamilies(likeness=0.5), seen=names, validation=["damped"], unseen=["outside"])


def test_data_seed_and_settings_change_the_cache_key_and_a_second_run_reads_it(tmp_path: Path) -> None:
    first = DynamicsData(source=OdeFamilies(), cache_dir=tmp_path).trajectories("harmonic", "train")
    files = set((tmp_path / "dynamics").glob("*.npz"))
    again = DynamicsData(source=OdeFamilies(), cache_dir=tmp_path).trajectories("harmonic", "train")
    assert set((tmp_path / "dynamics").glob("*.npz")) == files
    torch.testing.assert_close(first.x, again.x, atol=0, rtol=0)
    other = DynamicsData(source=OdeFamilies(data_seed=1), cache_dir=tmp_path).trajectories("harmonic", "train")
    assert not torch.allclose(first.x, other.x)


def test_a_family_of_one_environment_is_a_domain_like_any_other(tmp_path: Path) -> None:
    lone = Family("lone", "harmonic", (0.5, 0.5), (0.7, 0.7), 4.0, {"train": ((2.0,),), "new": ((2.1,),)})
    source = OdeFamilies(catalogue=[lone, family("double_well")])
    data = DynamicsData(
        source=source, seen=["lone", "double_well"], validation=["between"], unseen=["new"], cache_dir=tmp_path
    )

    assert data.trajectories("lone", "train").x.shape == (1, 4, 20, 2)
    assert data.facts["num_environments"] == 6
    assert data.trajectories("new", "test").x.shape[0] == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_samples": 1}, "num_samples=1"),
        ({"test_trajectories": 0}, "test_trajectories=0"),
        ({"support_trajectories": 5}, "support_trajectories=5"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"num_given": 20}, "num_given=20"),
        ({"catalogue": [*fields.ODEFAM, *fields.GLYCOLYTIC]}, "one state size"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        OdeFamilies(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        ({"seen": ["harmonics"]}, "'harmonics' cannot be trained on"),
        ({"seen": ["inside"], "unseen": []}, "'inside' cannot be trained on"),
        ({"unseen": ["far"]}, "unknown domain 'far'; allowed: families harmonic"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
    ],
)
def test_wrong_domains_are_named(roles: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DynamicsData(**roles)  # type: ignore[arg-type]


def test_a_domain_that_is_not_seen_has_no_training_split() -> None:
    with pytest.raises(ValueError, match="no train split"):
        DynamicsData().trajectories("inside", "train")


def test_an_exploding_family_is_an_error_that_names_it(tmp_path: Path) -> None:
    wild = Family("wild", "double_well", (50.0, 50.0), (60.0, 60.0), 50.0, {"train": ((0.1,),)}, substeps=1)
    data = DynamicsData(
        source=OdeFamilies(catalogue=[wild]), seen=["wild"], validation=[], unseen=[], cache_dir=tmp_path
    )

    with pytest.raises(ValueError, match="family 'wild' becomes infinite"):
        data.trajectories("wild", "train")
    assert not list((tmp_path / "dynamics").glob("*.npz"))


def test_every_field_is_named_by_a_family_or_is_a_variant() -> None:
    used = {f.field for f in (*FAMILIES, *fields.LORENZ)}

    assert used == set(FORMULAS)
