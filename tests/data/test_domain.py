# SPDX-License-Identifier: Apache-2.0
"""Laws of the domain data module."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.toy import ToyData


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        ({"seen": ["a"], "validation": ["a"]}, "given as seen and as validation"),
        ({"seen": ["a", "a"]}, "exactly one role"),
        ({"seen": []}, "nothing to train on"),
        ({"seen": ["unseen"]}, "not allowed"),
        ({"seen": ["a/b"]}, "letters, digits"),
        ({"batch_size": 0}, "1 or more"),
    ],
)
def test_wrong_roles_are_told(roles: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ToyData(**roles)


def test_unknown_domain_is_told_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown domain 'z'.*a, b, c, v, u"):
        ToyData().get_dataset("z", "train")


def test_empty_domain_is_told() -> None:
    with pytest.raises(ValueError, match="domain 'a' has no train item"):
        ToyData(num_items=0).train_dataloader()


def test_stages_touch_their_roles_only() -> None:
    data = ToyData()

    assert data.eval_domains("val") == ["a", "b", "c", "v"]
    assert data.eval_domains("test") == data.eval_domains("predict") == ["a", "b", "c", "v", "u"]
    assert len(data.val_dataloader()) == 4
    assert len(data.test_dataloader()) == len(data.predict_dataloader()) == 5


def test_predict_answers_the_domains_it_names_and_test_all() -> None:
    data = ToyData(predict=["u", "a"])

    assert data.eval_domains("predict") == ["u", "a"]
    assert data.eval_domains("test") == ["a", "b", "c", "v", "u"]
    loaders = data.predict_dataloader()
    assert [loader.dataset for loader in loaders] == [data.get_dataset(name, "test") for name in ("u", "a")]


@pytest.mark.parametrize("predict", [[], ["z"], ["a", "a"]])
def test_domains_to_predict_are_configured_ones_each_once(predict: list[str]) -> None:
    with pytest.raises(ValueError, match=r"predict=.*a, b, c, v, u"):
        ToyData(predict=predict)


def test_nothing_to_predict_is_told() -> None:
    with pytest.raises(ValueError, match="nothing to predict"):
        ToyData(predict=["u"], optional=["u"]).predict_dataloader()


def test_training_rows_come_from_seen_domains_only() -> None:
    domains = torch.cat([batch[2] for batch in ToyData().train_dataloader()])

    assert set(domains.tolist()) == {0, 1, 2}


def test_missing_optional_domain_is_dropped_with_one_line_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    data = ToyData(optional=["u", "b"])
    with caplog.at_level(logging.INFO, logger="moeapps"):
        assert data.eval_domains("test") == ["a", "c", "v"]
        assert data.eval_domains("val") == ["a", "c", "v"]

    assert data.missing == {"b": "not on this machine", "u": "not on this machine"}
    assert [r.getMessage() for r in caplog.records] == [
        "domain b (seen) is left out: not on this machine",
        "domain u (unseen) is left out: not on this machine",
    ]
    assert data.facts["domains"]["seen"] == ["a", "b", "c"]


def test_no_seen_domain_left_is_an_error() -> None:
    with pytest.raises(ValueError, match="no seen domain is left"):
        ToyData(optional=["a", "b", "c"]).eval_domains("val")


def test_example_batch_is_the_same_every_time_and_leaves_random_states_alone() -> None:
    data = ToyData()
    before = torch.get_rng_state()

    first, second = data.example_batch(2), data.example_batch(2)

    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_loaders_leave_the_global_random_state_alone() -> None:
    data = ToyData()
    before = torch.get_rng_state()

    for loader in (data.train_dataloader(), *data.val_dataloader()):
        list(loader)

    assert torch.equal(before, torch.get_rng_state())
