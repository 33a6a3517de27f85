# SPDX-License-Identifier: Apache-2.0
"""The report by domain counts what it says; a stage without the one before is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeapps.cli import main
from tasks.adaptation.module import MetaTask, StudentTask
from tasks.adaptation.nets.adapt import InnerStep
from tasks.adaptation.report.domains import DomainReport
from tests.tasks.adaptation.meta_dmoe_common import facts, net
from tests.tasks.adaptation.test_meta_dmoe_module import data, make, trainer


def test_the_report_counts_answers_passes_and_attention(tmp_path: Path) -> None:
    module = data(tmp_path, eval_batch_size=100)
    task = make(MetaTask, module.facts, step=InnerStep(rate=3.0))
    report = DomainReport(figures=False)

    trainer(tmp_path, callbacks=[report]).test(task, datamodule=module, verbose=False)
    table = report.table(task)

    assert table["experts"] == ["plain", "inverted", "pen"]
    assert set(table["domains"]) == {"plain", "inverted", "pen", "stripes", "faded"}
    episodes, whole = module.episodes("faded", "test"), module.images("faded", "test")
    mended = spoilt = 0
    attention = torch.zeros(3)
    task.eval()
    for draw in range(2):
        support, query = episodes.rows(draw)
        with torch.no_grad():
            after = task.net(whole.image[query], task.net.adapt(whole.image[support])).argmax(1)
            before = task.net(whole.image[query]).argmax(1)
            attention += task.net.aggregator.attention(*task.net.tokens(whole.image[support])).mean(0) / 2
        label = whole.label[query]
        mended += int(((after == label) & (before != label)).sum())
        spoilt += int(((after != label) & (before == label)).sum())
    row = table["domains"]["faded"]
    assert mended + spoilt > 0
    assert (row["mended"], row["spoilt"]) == pytest.approx((mended / 32, spoilt / 32))  # 2 draws of 20 - 4 images
    assert row["gain"] == pytest.approx((mended - spoilt) / 32)
    assert row["attention"] == pytest.approx(attention.tolist(), abs=1e-5)
    # Three experts and the student on 4 images; then one network per image.
    passes = {"adapting_forward": 16, "adapting_backward": 4, "per_image_forward": 1, "per_image_backward": 0}
    assert row["passes_per_target"] == passes
    assert report.describe_results()["worst_unseen"]["accuracy"] == row["accuracy"]


def test_a_stage_without_experts_has_no_attention(tmp_path: Path) -> None:
    module = data(tmp_path)
    task = make(StudentTask, module.facts)
    report = DomainReport(figures=False)

    trainer(tmp_path, callbacks=[report]).test(task, datamodule=module, verbose=False)

    assert all("attention" not in row and row["gain"] == 0 for row in report.table(task)["domains"].values())


def test_a_missing_checkpoint_of_the_stage_before_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOEAPPS_RUNS", str(tmp_path))
    gone = str(tmp_path / "gone")

    code = main(["fit", "--config", "configs/meta_dmoe.yaml", "--model.init_args.start.init_args.path", gone])

    assert code == 2
    told = capsys.readouterr().err
    assert "no checkpoint" in told
    assert "train the earlier stage first" in told
    assert "Traceback" not in told


def test_the_attention_of_the_report_leaves_the_network_as_it_was() -> None:
    made = net(told=facts())
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.no_grad():
        made.aggregator.attention(*made.tokens(torch.randn(2, 3, 8, 8)))
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in before.items())
