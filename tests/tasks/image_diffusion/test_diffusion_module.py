# SPDX-License-Identifier: Apache-2.0
"""Laws of the task: the paired loss is paired, its parts add up, training learns, bad facts are refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from moeapps.moe import MoERecorder
from moeapps.moe.presets import promoe, random_router
from moeapps.moe.record import Place
from moeapps.training.callbacks import ExpertReport
from tasks.image_diffusion.losses import RoutingContrast, SuperclassLoss
from tasks.image_diffusion.metrics import PairedLoss
from tasks.image_diffusion.model import DiT
from tasks.image_diffusion.module import ImageDiffusionTask, Sampling
from tasks.image_diffusion.nets.ddpm import GaussianDiffusion
from tasks.image_diffusion.rivals import routers
from tests.tasks.image_diffusion.model_common import SIZES, K, awake, batch, facts, net, task


def test_the_paired_loss_of_an_image_does_not_depend_on_its_batch_or_the_call() -> None:
    model = task()
    awake(model.net)
    model.eval()
    whole = batch(12)
    with torch.no_grad():
        losses = model.paired_losses(whole)
        torch.testing.assert_close(model.paired_losses(whole), losses, atol=0, rtol=0)
        rows = torch.tensor([7, 2, 11])
        torch.testing.assert_close(model.paired_losses(whole.take(rows)), losses[rows], atol=1e-5, rtol=1e-5)


def test_noise_and_time_are_the_images_own_and_cover_all_slices() -> None:
    model = task()
    eps, t = model.fixed_noise(batch(200))
    again, same = model.fixed_noise(batch(100, first=100))
    assert torch.equal(eps[100:], again)
    assert torch.equal(t[100:], same)
    other, _ = model.fixed_noise(batch(200, domain=1))
    assert not torch.isclose(eps, other).any(dim=(1, 2, 3)).all()
    slices = (t * 10).long()
    assert torch.bincount(slices, minlength=10).tolist() == [20] * 10
    classes = torch.arange(200) % 10  # an order of classes that repeats is not tied to a slice
    assert all(len(set(slices[classes == c].tolist())) == 10 for c in range(10))
    assert (t * 10 - slices).std().item() == pytest.approx(12**-0.5, rel=0.15)


def test_evaluation_weighs_the_two_passes_as_training_does() -> None:
    model = task(sizes={"label_dropout": 0.25})
    awake(model.net)
    model.eval()
    with torch.no_grad():
        out = model.shared_step(batch(20), "val")
        with_label, without = model.paired_losses(batch(20)), model.paired_losses(batch(20), null=True)
    torch.testing.assert_close(out.loss, (0.75 * with_label + 0.25 * without).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.units["conditional"], with_label, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.units["null"], without, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(with_label, without)
    metric = PairedLoss()
    metric.update(*out.metric_args)
    told = metric.compute()
    torch.testing.assert_close(told["conditional"].float(), with_label.mean(), atol=1e-5, rtol=1e-5)
    parts = torch.stack([told[f"t{i}"] for i in range(10)])
    torch.testing.assert_close(parts.mean().float(), with_label.mean(), atol=1e-5, rtol=1e-5)  # two images per slice


def test_parts_of_two_batches_are_those_of_one() -> None:
    one, two = PairedLoss(), PairedLoss()
    given, null, t = torch.rand(30), torch.rand(30), torch.rand(30)
    one.update(given, null, t)
    for rows in (slice(0, 11), slice(11, 30)):
        two.update(given[rows], null[rows], t[rows])
    for name, value in one.compute().items():
        torch.testing.assert_close(two.compute()[name], value, equal_nan=True)


def test_eight_images_are_learned_by_heart() -> None:
    torch.manual_seed(0)
    model = task(sizes={"dim": 32, "label_dropout": 0.0}, aux_losses=[RoutingContrast()]).train()
    images, optimizer = batch(8), torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    for _ in range(300):
        out = model.recorded_step(images, "train")
        loss = out.loss + model.aux_losses[0](model.last_records)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert sum(losses[-20:]) / 20 < 0.3 * losses[0]


def test_training_draws_times_and_noise_anew_and_accepts_null_labels() -> None:
    model = task().train()
    values = {float(model.shared_step(batch(4), "train").loss.detach()) for _ in range(3)}
    assert len(values) == 3
    null = replace(batch(4), label=torch.full((4,), K))
    with MoERecorder(model) as recorder:
        model.shared_step(null, "train")
    assert (recorder.records[0].group < 0).all()
    assert recorder.records[0].routing.counts()[:3].sum() == 0


def test_the_table_of_super_classes_reaches_routers_and_losses() -> None:
    moe = promoe(num_experts=2, router=routers.class_supervised(num_experts=2))
    model = task(moe, aux_losses=[SuperclassLoss()])
    assert model.aux_losses[0].table.tolist() == facts()["superclass"]
    model = task(promoe(num_experts=2, router=routers.class_domain(num_experts=2)))
    tables = [m.table.tolist() for m in model.modules() if isinstance(m, routers.ClassTable)]
    assert tables == [facts()["superclass"]]
    assert not [key for key in model.state_dict() if "table" in key and "label" not in key]


def test_predictions_are_images_of_the_asked_labels() -> None:
    model = task(sampling=Sampling(cfg=2.0, steps=2))
    awake(model.net)
    told = model.predict_step(batch(5))
    assert told["image"].shape == (5, 1, 8, 8)
    assert told["label"].tolist() == batch(5).label.tolist()
    alone = model.predict_step(batch(5).take(torch.tensor([3])))
    torch.testing.assert_close(alone["image"][0], told["image"][3], atol=1e-4, rtol=1e-4)


def test_a_diffusion_needs_a_network_that_gives_a_variance() -> None:
    with pytest.raises(ValueError, match="learn_sigma=true"):
        task(process=GaussianDiffusion())
    model = task(sizes={"learn_sigma": True}, process=GaussianDiffusion()).train()
    # All zero: noise misses by 1, and the variance lies half-way between its bounds.
    assert 0.9 < float(model.shared_step(batch(32), "train").loss.detach()) < 1.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 7}, "one entry for each class"),
        ({"image_size": 30}, "image_size=30 is not a multiple of patch_size=4"),
        ({"superclass": [0, 1]}, "one entry for each class"),
    ],
)
def test_data_that_does_not_fit_the_network_is_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDiffusionTask(net=partial(DiT, **SIZES), facts=facts(**change))


def test_the_network_has_the_sizes_of_the_data() -> None:
    model = ImageDiffusionTask(net=partial(DiT, **SIZES), facts=facts(channels=4, image_size=32, num_classes=6))
    assert (model.net.channels, model.net.image_size, model.net.num_classes) == (4, 32, 6)


def test_missing_facts_are_named() -> None:
    given = facts()
    del given["channels"], given["superclass"]
    with pytest.raises(ValueError, match=r"facts lacks \['channels', 'superclass'\]"):
        ImageDiffusionTask(net=lambda facts: net(), facts=given)


def test_one_seen_domain_is_enough() -> None:
    one = facts(domains={"seen": ["a"], "validation": [], "unseen": []}, superclass=[0] * K)
    model = ImageDiffusionTask(net=lambda facts: net(promoe(num_experts=2)), facts=one)
    assert model.shared_step(batch(2), "train").loss.isfinite()


def test_layers_without_a_conditional_token_are_defined() -> None:
    model = task(aux_losses=[RoutingContrast()], sizes={"label_dropout": 1.0}).train()
    loss = model.recorded_step(batch(4), "train").loss + model.aux_losses[0](model.last_records)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class Data:
    """What the report asks of a data module."""

    domain_names = ("a", "b", "c", "d")

    def present(self, role: str) -> list[str]:
        return ["a", "b"]


def test_the_report_tells_domain_routing_from_blind_routing(monkeypatch) -> None:
    told = {}
    for name, make in (("domain", routers.class_domain), ("chance", None)):
        router = make(num_experts=2) if make else random_router(num_experts=2, top_k=1)
        model = task(promoe(num_experts=2, router=router)).eval()
        monkeypatch.setattr(ImageDiffusionTask, "data", Data())
        report = ExpertReport()
        report.on_test_epoch_start(None, model)
        for domain in (0, 1):
            images = batch(60, domain=domain)
            # Classes 0-2 are of the first domain, 3-5 of the second.
            images = replace(images, label=images.label % 3 + 3 * domain)
            model.recorded_step(images, "test")
            model.last_domain = "ab"[domain]
            report.on_test_batch_end(None, model, None, images, 0)
        told[name] = report.numbers(report.layers[Place("blocks", (1,))])
    assert told["domain"]["mi_domain"] == pytest.approx(1.0)
    assert told["domain"]["mi_place"] == pytest.approx(0.0, abs=1e-9)
    assert told["domain"]["per_token"] == told["domain"]["gate"] == 1.0
    assert told["chance"]["mi_domain"] < 0.05
    assert told["chance"]["least"] > 0.5
