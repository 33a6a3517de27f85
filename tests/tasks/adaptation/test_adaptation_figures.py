# SPDX-License-Identifier: Apache-2.0
"""Pictures of a test of adaptation name what they show, also for many domains and long names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.adaptation.report.figures import attention_figure, changed_figure, gain_figure
from tests.pictured import check_readable

DOMAINS = [f"a_domain_of_a_long_name_{k}" for k in range(19)]


@pytest.mark.parametrize("experts", [2, 10])
def test_attention_names_experts_domains_and_amounts(experts: int) -> None:
    figure = attention_figure(np.full((19, experts), 1 / experts).tolist(), DOMAINS, DOMAINS[:experts])
    panel, bar = figure.axes

    check_readable(figure)
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("expert", "domain")
    assert bar.get_ylabel() == "share of the attention"


def test_gains_of_many_domains_can_be_read() -> None:
    check_readable(gain_figure(dict.fromkeys(DOMAINS, (0.4, 0.2)), "accuracy"))


@pytest.mark.parametrize("columns", [1, 4, 12])
def test_changed_images_say_what_is_true_and_what_was_answered(columns: int) -> None:
    names = ["digit_0", "digit_1", "a class of a name that is much too long for a title"]
    item = (DOMAINS[0], torch.zeros(1, 8, 8), 2, 0, 2)
    figure = changed_figure({"mended": [item] * columns, "spoilt": [item] * (columns // 2)}, names)

    check_readable(figure)
    lines = figure.axes[0].get_title(loc="left").split("\n")
    assert [line.split(":")[0] for line in lines[1:]] == ["true", "before", "after"]
    assert lines[2] == "before: digit_0"
