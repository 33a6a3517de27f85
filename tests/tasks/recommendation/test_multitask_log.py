# SPDX-License-Identifier: Apache-2.0
"""The generated log: its truth is true, its knobs do what they say, its seeds repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.recommendation.data.factors import FactorModel, features, intercepts, sigmoid
from tasks.recommendation.data.multitask_log import MultitaskLog, Population
from tasks.recommendation.datamodule import RecommendationData
from tasks.recommendation.metrics import auc, gauc
from tests.tasks.recommendation.rec_common import small_log

CATEGORIES = ("a", "a", "b", "b", "b")


def reference(seed: int = 1, rows: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z_u, z_i = rng.standard_normal((2, rows, 16))
    return features(z_u, z_i), rng.uniform(0, np.pi / 4, rows)


@pytest.mark.parametrize("rho", [-1.0, -0.5, 0.0, 0.8])
def test_tasks_are_related_exactly_as_the_weights_say(rho: float) -> None:
    shared, category, alone = 0.5, 0.7, 0.5
    logits = FactorModel(CATEGORIES, (shared, category, alone), rho, seed=3).logits(*reference())

    total = shared**2 + category**2 + alone**2
    same = np.equal.outer(CATEGORIES, CATEGORIES)
    wanted = (shared**2 + category**2 * np.where(same, 1, rho) + alone**2 * np.eye(5)) / total
    np.testing.assert_allclose(np.corrcoef(logits, rowvar=False), wanted, atol=0.03)
    np.testing.assert_allclose(logits.std(0), 1.6, rtol=0.03)


def test_weight_on_what_all_share_alone_makes_all_tasks_one() -> None:
    logits = FactorModel(CATEGORIES, (1.0, 0.0, 0.0), 0.0, seed=3).logits(*reference(rows=100))

    np.testing.assert_allclose(logits, logits[:, :1].repeat(5, 1), atol=1e-12)


def test_preferences_turn_with_the_angle_and_are_back_after_a_whole_turn() -> None:
    model, (x, _) = FactorModel(CATEGORIES, (0.5, 0.7, 0.5), 0.0, seed=0), reference(rows=5000)
    at = [model.logits(x, np.full(len(x), np.radians(degrees)))[:, 0] for degrees in (0, 20, 45, 90, 360)]

    agreement = [float(np.corrcoef(at[0], other)[0, 1]) for other in at]
    assert agreement[:4] == sorted(agreement[:4], reverse=True)
    assert agreement[1] > 0.85
    assert agreement[3] < 0.3
    np.testing.assert_allclose(at[4], at[0], atol=1e-9)


def test_intercepts_give_the_rates() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5000, 3))
    rates = np.array([0.004, 0.3, 0.95])

    np.testing.assert_allclose(sigmoid(logits + intercepts(logits, rates)).mean(0), rates, rtol=1e-6)


def test_labels_are_drawn_from_the_oracle_at_the_configured_rates(tmp_path: Path) -> None:
    table = MultitaskLog(test_rows=40_000).dataset("angle_15", "test", tmp_path).table
    assert table.oracle is not None

    rates = torch.tensor([0.30, 0.20, 0.12, 0.04, 0.01, 0.005])
    se = (rates * (1 - rates) / 40_000).sqrt()
    torch.testing.assert_close(table.oracle.mean(0), rates, rtol=0.1, atol=0)
    assert ((table.label.mean(0) - table.oracle.mean(0)).abs() < 4 * se).all()
    for t in range(6):
        p = table.oracle[:, t]
        # Conditional on p the label is Bernoulli(p): AUC of p is what p expects of itself, within its noise.
        assert float(auc(p, table.label[:, t])) == pytest.approx(float(auc(p, p)), abs=0.04)
        assert 0.75 < float(gauc(p, p, table.user)) < 0.88


def test_label_noise_keeps_the_rates_and_lowers_the_ceiling(tmp_path: Path) -> None:
    clean = small_log(test_rows=8000).dataset("angle_00", "test", tmp_path).table
    noisy = small_log(test_rows=8000, label_noise=0.6).dataset("angle_00", "test", tmp_path).table
    assert clean.oracle is not None
    assert noisy.oracle is not None

    torch.testing.assert_close(noisy.oracle[:, 0].mean(), clean.oracle[:, 0].mean(), rtol=0.02, atol=0)
    torch.testing.assert_close(noisy.oracle[:, 0], 0.4 * clean.oracle[:, 0] + 0.6 * 0.30, rtol=1e-5, atol=1e-6)
    assert float(auc(noisy.oracle[:, 0], noisy.oracle[:, 0])) < float(auc(clean.oracle[:, 0], clean.oracle[:, 0])) - 0.1


def test_missing_labels_are_masked_and_zero(tmp_path: Path) -> None:
    table = small_log(missing_labels=0.3, test_rows=4000).dataset("angle_00", "test", tmp_path).table

    assert float(table.mask.float().mean()) == pytest.approx(0.7, abs=0.02)
    assert not table.label[~table.mask].any()


def test_other_mix_has_other_rates_and_other_tastes(tmp_path: Path) -> None:
    log = small_log(test_rows=20_000, num_users=400)
    near, mix = (log.dataset(name, "test", tmp_path).table for name in ("angle_22", "other_mix"))
    assert near.oracle is not None
    assert mix.oracle is not None

    factor = mix.oracle.mean(0) / near.oracle.mean(0)
    torch.testing.assert_close(factor, torch.tensor([0.5, 0.5, 0.5, 3.0, 3.0, 3.0]), rtol=0.15, atol=0)


def test_zipf_makes_few_users_busy(tmp_path: Path) -> None:
    even = small_log(test_rows=6000).dataset("angle_00", "test", tmp_path).table.user.bincount(minlength=30)
    steep = small_log(test_rows=6000, zipf=1.0).dataset("angle_00", "test", tmp_path).table.user.bincount(minlength=30)

    assert even.max() < 1.5 * even.min()
    assert float(steep[0] / steep[9]) == pytest.approx(10, rel=0.3)


def test_heavy_tails_are_a_monotone_change_that_vanishes_with_its_strength(tmp_path: Path) -> None:
    plain, faint, heavy = (
        small_log(scale_spread=0.0, heavy_tails=h).dataset("angle_00", "test", tmp_path).table.dense
        for h in (0, 1e-6, 1.5)
    )

    torch.testing.assert_close(faint, plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(heavy[:, 0].argsort(stable=True), plain[:, 0].argsort(stable=True))
    assert heavy.max() > 10 * plain.max()


def test_features_are_taste_item_and_their_product_with_scales(tmp_path: Path) -> None:
    table = small_log(scale_spread=0.0).dataset("rotated", "test", tmp_path).table

    z_u, z_i, product, context = table.dense.split([16, 16, 16, 2], dim=1)
    torch.testing.assert_close(product, z_u * z_i, atol=1e-5, rtol=1e-5)
    # The context shows the users' angle, 70 degrees, with noise 0.1.
    torch.testing.assert_close(context.mean(0), torch.tensor([0.342, 0.940]), atol=0.05, rtol=0)
    same = table.user == table.user[0]
    assert (z_u[same] == z_u[0]).all()
    assert table.ids.min() >= 1
    assert table.ids.max() <= 16


def test_same_seed_same_log_other_seed_other_log_and_splits_differ(tmp_path: Path) -> None:
    def table(cache: str, split: Any = "train", **options: Any) -> torch.Tensor:
        return small_log(**options).dataset("angle_00", split, tmp_path / cache).table.label

    assert torch.equal(table("a"), table("b"))
    assert torch.equal(table("a"), table("a"))
    assert not torch.equal(table("a"), table("a", data_seed=1))
    assert not torch.equal(table("a", "train", train_rows=500), table("a", "test", test_rows=500))


def test_users_and_functions_stay_when_only_the_number_of_rows_changes(tmp_path: Path) -> None:
    few, many = (
        small_log(test_rows=rows, scale_spread=0.0).dataset("angle_00", "test", tmp_path).table for rows in (200, 900)
    )
    by_user = {int(user): row[:16] for user, row in zip(many.user, many.dense, strict=True)}

    assert all(torch.equal(by_user[int(user)], row[:16]) for user, row in zip(few.user, few.dense, strict=True))


def test_default_log_is_built_in_seconds_and_has_seven_domains(tmp_path: Path) -> None:
    data = RecommendationData(source=small_log(), cache_dir=tmp_path, batch_size=64)
    data.prepare_data()

    assert data.roles["seen"] == ["angle_00", "angle_15", "angle_30", "angle_45"]
    assert (data.roles["validation"], data.roles["unseen"]) == (["angle_22"], ["rotated", "other_mix"])
    assert len(list(tmp_path.rglob("*.npz"))) == 4 * 3 + 2 + 2
    for domain in data.domain_names:
        log = data.source
        log.schema.check(data.get_dataset(domain, "test").table, domain)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rho": 1.1}, "rho=1.1 is impossible for 2 categories"),
        ({"rho": -0.9, "rates": {c: {f"t{c}": 0.1} for c in "abc"}}, r"3 categories; allowed is \[-0.5, 1\]"),
        ({"weights": (0.0, 0.0, 0.0)}, "one of them above 0"),
        ({"label_noise": 1.0}, "label_noise=1.0"),
        ({"num_users": 0}, "num_users=0"),
        ({"rates": {"watch": {"click": 1.0}, "interaction": {"like": 0.1}}}, "'click' has rate 1"),
        ({"populations": {"p": Population(rate_factors={"wach": 2.0})}}, "unknown category 'wach'"),
        ({"populations": {"p": Population(rate_factors={"watch": 4.0})}}, "'click' has rate 1.2 in domain 'p'"),
        ({"zipf": -1.0}, "zipf=-1.0"),
    ],
)
def test_wrong_settings_are_told(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        small_log(**options)


def test_unknown_domain_is_told() -> None:
    with pytest.raises(ValueError, match=r"MultitaskLog has no domain 'angle_99'; allowed: angle_00"):
        RecommendationData(seen=["angle_99"])
