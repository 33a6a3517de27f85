# SPDX-License-Identifier: Apache-2.0
"""Voting: every raw point is answered, one vote is plain inference, and the order of the votes does not matter."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch

from moeapps.commands.run import run
from moeapps.moe import MoERecorder
from moeapps.moe.presets import point_moe
from tasks.point_cloud.data.dataset import ScanDataset, collate_scans
from tasks.point_cloud.data.features import voxelise
from tasks.point_cloud.data.scans import ScanArrays
from tasks.point_cloud.data.voting import Fragment, TileVotes, Voting, fragments
from tasks.point_cloud.datamodule import PointCloudData
from tasks.point_cloud.metrics import confusion
from tasks.point_cloud.model import PointMoE
from tasks.point_cloud.module import PointCloudTask
from tasks.point_cloud.report.tally import tally

CONFIGS = Path(__file__).parents[3] / "configs"
NAMES = ("wall", "floor", "chair")
FACTS = {
    "domains": {"seen": ["room"], "validation": ["office"], "unseen": []},
    "domain_names": ["room", "office"],
    "label_sets": {"room": list(NAMES), "office": ["floor", "wall"]},
    "in_dim": 6,
}
ONE_EACH = Voting(max_fragments=1)
ONCE = Voting(rotations=(0.0,), scales=(1.0,), flip=False, max_fragments=1)


def scan(rows: int = 600, seed: int = 0) -> ScanArrays:
    rng = np.random.default_rng(seed)
    pos = (rng.random((rows, 3)) ** 3 * (4, 3, 2)).astype(np.float32)  # some voxels hold many points
    numbers = rng.random((2, rows)).astype(np.float32)
    label = rng.integers(0, 3, rows).astype(np.uint8)
    return ScanArrays(name=f"scan-{seed}", pos=pos, light=numbers[0], up=numbers[1], label=label, words=NAMES)


def dataset(voting: Voting | None, *scans: ScanArrays, max_voxels: int = 90) -> ScanDataset:
    view: dict[str, Any] = {"domain": "room", "label_set": NAMES, "domain_index": 0, "voxel": 0.25}
    return ScanDataset(list(scans or (scan(),)), **view, max_voxels=max_voxels, voting=voting)


def task() -> PointCloudTask:
    torch.manual_seed(0)
    sizes = {"enc_depths": (1, 1), "enc_dims": (16, 32), "dec_depths": (1,), "dec_dims": (16,), "patch_size": 16}
    net = partial(PointMoE, moe=point_moe(num_experts=4, top_k=2), **sizes)
    return PointCloudTask(net=net, facts=FACTS).eval()


def batch_of(data: ScanDataset) -> Batch:
    return collate_scans([data[i] for i in range(len(data))])


# --- fragments ---


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 400])
def test_every_point_gets_the_votes_the_rule_says_and_at_least_one(limit: int | None, rows: int) -> None:
    pos, size, seed = scan(rows).pos, 0.4, 5
    voxels = voxelise(pos, size, np.random.default_rng(seed))
    count = np.bincount(voxels.inverse)
    parts = list(fragments(pos, size, seed, limit))

    number = min(count.max(), limit or count.max())
    assert len(parts) == number
    votes = np.zeros(rows, int)
    for part in parts:
        assert len(np.unique(part.voted)) == len(part.voted)
        np.testing.assert_array_equal(part.voter, voxels.inverse[part.voted])  # a point is answered by its own voxel
        np.testing.assert_array_equal(voxels.inverse[part.pick], np.arange(len(count)))  # one point of each
        votes[part.voted] += 1
    assert votes.min() >= 1
    for cell, points in enumerate(count):
        turns = [f % min(points, number) for f in range(number)]
        expected = sorted(turns.count(place % number) for place in range(points))
        assert sorted(votes[voxels.inverse == cell]) == expected


def test_with_all_fragments_each_point_is_answered_for_itself() -> None:
    pos = scan().pos
    parts = list(fragments(pos, 0.4, 0))

    assert set(np.concatenate([part.pick for part in parts]).tolist()) == set(range(len(pos)))
    for part in parts:
        np.testing.assert_array_equal(part.pick[part.voter], part.voted)


def test_the_first_fragment_is_what_plain_inference_picks() -> None:
    pos = scan().pos
    voxels = voxelise(pos, 0.4, np.random.default_rng(3))
    (only,) = fragments(pos, 0.4, 3, 1)

    np.testing.assert_array_equal(next(fragments(pos, 0.4, 3)).pick, voxels.pick)
    np.testing.assert_array_equal(only.pick, voxels.pick)
    np.testing.assert_array_equal(only.voter, voxels.inverse)
    np.testing.assert_array_equal(only.voted, np.arange(len(pos)))


# --- views ---


def test_the_paper_looks_thirteen_times() -> None:
    views = Voting().views()

    assert len(views) == 13
    assert len({view.tobytes() for view in views}) == 13
    np.testing.assert_array_equal(views[0], np.eye(3))
    scales = [abs(np.linalg.det(view)) ** (1 / 3) for view in views]
    np.testing.assert_allclose(scales, [1] * 4 + [0.95] * 4 + [1.05] * 4 + [1])
    assert [np.linalg.det(view) < 0 for view in views] == [False] * 12 + [True]
    for view in views:  # lengths change by the scale alone, and up stays up
        np.testing.assert_allclose(view @ view.T, np.eye(3) * abs(np.linalg.det(view)) ** (2 / 3), atol=1e-12)
        assert view[2, 0] == view[2, 1] == view[0, 2] == view[1, 2] == 0 < view[2, 2]


@pytest.mark.parametrize("rows", [1, 60])
def test_every_raw_point_gets_the_expected_number_of_votes(rows: int) -> None:
    tile = dataset(Voting(), scan(rows), max_voxels=10_000)[0].votes

    sums, votes = tally(task(), [tile], 3)

    expected = np.zeros(rows, int)
    for matrix in Voting().views():
        for part in fragments(np.asarray(tile.pos.astype(np.float64) @ matrix.T, np.float32), 0.25, tile.seed):
            expected[part.voted] += 1
    assert votes.min() >= 13
    np.testing.assert_array_equal(votes, expected)
    torch.testing.assert_close(sums.sum(1), votes.double())  # each vote is a probability distribution


# --- limiting cases ---


def test_one_vote_equals_plain_inference_bit_for_bit() -> None:
    network, scans = task(), (scan(600, 0), scan(200, 1), scan(1, 2))
    plain, voted = batch_of(dataset(None, *scans)), batch_of(dataset(ONCE, *scans))
    assert "votes" in voted
    assert "votes" not in plain

    with torch.no_grad():
        one, other = network.shared_step(plain, "test"), network.shared_step(voted, "test")
        answers = network.predict_step(plain), network.predict_step(voted)
        probabilities, votes = tally(network, voted.votes, 3)
        logits = network(plain)["room"][1]

    assert torch.equal(one.loss, other.loss)
    for a, b in zip(one.metric_args, other.metric_args, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.parts["miou"][1], other.parts["miou"][1])
    for a, b in zip(*answers, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("label", "expert", "xyz", "raw_row", "inverse"))
    assert votes.eq(1).all()
    torch.testing.assert_close(probabilities, logits.double().softmax(1)[plain.inverse], rtol=0, atol=1e-12)


def test_points_that_are_alone_in_their_voxel_need_one_fragment() -> None:
    rng = np.random.default_rng(0)
    cells = rng.permutation(216)[:100]
    pos = (np.stack([cells // 36, cells // 6 % 6, cells % 6], 1) + 0.5).astype(np.float32) * 0.25
    data = {"light": np.zeros(100, np.float32), "up": np.ones(100, np.float32), "words": NAMES}
    lone = ScanArrays(name="lone", pos=pos, label=np.zeros(100, np.uint8), **data)
    all_fragments = Voting(rotations=(0.0,), scales=(1.0,), flip=False)

    with torch.no_grad():
        (plain,) = task().predict_step(batch_of(dataset(None, lone, max_voxels=500)))
        (voted,) = task().predict_step(batch_of(dataset(all_fragments, lone, max_voxels=500)))

    assert torch.equal(plain["label"], voted["label"])


class Shuffled(TileVotes):
    """The same votes in another order."""

    def ballots(self) -> Any:
        ballots = list(super().ballots())
        return iter([ballots[i] for i in np.random.default_rng(1).permutation(len(ballots))])


def test_votes_do_not_depend_on_the_order_of_fragments_and_views() -> None:
    tiles = batch_of(dataset(Voting(max_fragments=3))).votes

    sums, votes = tally(task(), tiles, 3)
    other_sums, other_votes = tally(task(), [Shuffled(**vars(tile)) for tile in tiles], 3)

    assert torch.equal(votes, other_votes)
    torch.testing.assert_close(sums, other_sums, rtol=0, atol=1e-5)
    assert torch.equal(sums.argmax(1), other_sums.argmax(1))


def test_votes_do_not_depend_on_the_tiles_beside() -> None:
    tiles = batch_of(dataset(ONE_EACH)).votes
    assert len(tiles) > 2

    together, _ = tally(task(), tiles, 3)
    alone = torch.cat([tally(task(), [tile], 3)[0] for tile in tiles])

    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_the_sum_decides_not_the_last_vote() -> None:
    tile = dataset(Voting(rotations=(0.0,), scales=(1.0,), max_fragments=1), scan(5), max_voxels=500)[0].votes
    says = iter([[0.9, 0.1, 0.0], [0.3, 0.7, 0.0]])

    def answer(batch: Batch) -> dict[str, Any]:
        return {"room": (torch.arange(batch.num_nodes), torch.tensor(next(says)).log().repeat(batch.num_nodes, 1))}

    sums, votes = tally(answer, [tile], 3)

    torch.testing.assert_close(sums, torch.tensor([1.2, 0.8, 0.0], dtype=torch.float64).repeat(5, 1))
    assert votes.eq(2).all()


def test_a_smaller_label_set_never_answers_beyond_its_names() -> None:
    items = [dataset(ONCE, scan(80, 0))[0], dataset(ONCE, scan(80, 1))[0]]
    items[1].domain = items[1].domain + 1
    items[1].votes = TileVotes(**{**vars(items[1].votes), "domain_index": 1})
    items[1].y, items[1].raw_y = items[1].y.clamp(max=1), items[1].raw_y.clamp(max=1)

    with torch.no_grad():
        answers = task().predict_step(collate_scans(items))

    assert answers[1]["label"].max() <= 1


def test_metrics_of_voted_answers_are_additive_over_batches() -> None:
    network, data = task(), dataset(ONE_EACH, scan(300, 0), scan(200, 1))
    with torch.no_grad():
        whole = network.shared_step(batch_of(data), "test").metric_args
        parts = [network.shared_step(collate_scans([data[i]]), "test").metric_args for i in range(len(data))]

    summed = sum(confusion(part[2], part[3], 3) for part in parts)
    assert torch.equal(confusion(whole[2], whole[3], 3), summed)
    metrics, once = network.configure_metrics("room"), network.configure_metrics("room")
    for part in parts:
        metrics.update(*part)
    once.update(*whole)
    assert metrics.compute() == once.compute()


def test_reports_on_experts_count_every_voxel_once() -> None:
    network = task()
    rows = []
    for voting in (None, Voting(max_fragments=2)):
        with torch.no_grad(), MoERecorder(network) as recorder:
            network.shared_step(batch_of(dataset(voting)), "test")
        rows.append([record.routing.num_rows for record in recorder.records])

    assert rows[0] == rows[1]


# --- configuration ---


def test_votes_are_for_tests_and_not_for_training_or_validation(tmp_path: Path) -> None:
    options = {"seen": ["cad_room"], "validation": ["als"], "unseen": [], "cache_dir": tmp_path}
    counts = {"train_scenes": 1, "val_scenes": 1, "test_scenes": 1}
    data = PointCloudData(**options, **counts, voting=Voting())

    assert "votes" in data.get_dataset("cad_room", "test")[0]
    assert "votes" not in data.get_dataset("cad_room", "val")[0]
    assert "votes" not in data.get_dataset("cad_room", "train")[0]
    assert data.sources["als"].endswith("; answered in 13 views, all fragments")
    assert "votes" not in PointCloudData(**options, **counts).get_dataset("cad_room", "test")[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rotations": ()}, "give one view"),
        ({"scales": ()}, "give one view"),
        ({"scales": (1.0, 0.0)}, "above 0"),
        ({"max_fragments": 0}, "1 or more"),
    ],
)
def test_votes_that_cannot_be_cast_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Voting(**options)


def test_a_fragment_is_plain_data() -> None:
    part = Fragment(np.arange(2), np.arange(3), np.array([0, 1, 1]))

    assert part.pick[part.voter].tolist() == [0, 1, 1]


@pytest.mark.medium
def test_the_overlay_votes_in_test_and_the_tables_agree_with_the_results(tmp_path: Path) -> None:
    words = ["fit", *(word for name in ("point_moe", "data/voting") for word in ("--config", f"{CONFIGS}/{name}.yaml"))]
    words += ["--config", f"{CONFIGS}/debug/tiny.yaml", "--config", f"{CONFIGS}/debug/point_moe.yaml"]
    words += ["--data.init_args.seen=[cad_room]", "--data.init_args.validation=[als]", "--data.init_args.unseen=[]"]
    words += ["--data.init_args.cache_dir", str(tmp_path / "cache"), "--data.init_args.voting.max_fragments", "1"]
    words += ["--model.init_args.net.init_args.enc_dims=[16,16,16]", "--trainer.callbacks", "null"]
    words += ["--model.init_args.net.init_args.dec_dims=[16,16]", "--trainer.limit_train_batches", "1"]
    cli = run(words)

    assert cli.datamodule.voting == Voting(max_fragments=1)
    folder = Path(cli.trainer.log_dir) / "metrics"
    results = json.loads((folder / "test.json").read_text())
    scores = {(row["domain"], row["metric"]): row["value"] for row in results["rows"]}
    tables = json.loads((folder / "per_class.json").read_text())["domains"]
    assert set(tables) == {"cad_room", "als"}
    for domain, table in tables.items():
        assert "13 views" in results["header"]["sources"][domain]
        assert [row["class"] for row in table["classes"]] == cli.model.label_sets[domain]
        for name in ("miou", "miou_all", "macc", "allacc"):
            assert table[name] == pytest.approx(scores[domain, name], abs=1e-6)
