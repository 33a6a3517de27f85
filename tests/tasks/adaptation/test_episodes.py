# SPDX-License-Identifier: Apache-2.0
"""Episodes: disjoint parts of one domain, the same for the same seed, without a look at the support's labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeapps.data.images.batch import ImageDataset
from tasks.adaptation.data.batch import EpisodeBatch
from tasks.adaptation.data.episodes import EpisodeConcat, EpisodeSampler, EvaluationEpisodes, episode_sizes
from tests.tasks.adaptation.adaptation_common import small_data


class Numbered(ImageDataset):
    """Images whose every pixel is the number of the row; labels raise when they are read, where that is asked for."""

    def __init__(self, count: int, *, forbidden: tuple[int, ...] | None = None) -> None:
        super().__init__(torch.arange(count) % 3)
        self.watched = None if forbidden is None else set(forbidden)
        self.read: list[int] = []

    def fetch(self, rows: Tensor) -> Tensor:
        return rows.float()[:, None, None, None].expand(-1, 1, 2, 2)

    def batch(self, rows: Tensor) -> Any:
        if self.watched is not None and self.watched & set(rows.tolist()):
            raise AssertionError(f"labels of the support were read: {rows.tolist()}")
        self.read += rows.tolist()
        return super().batch(rows)


def sampler(sizes: list[int], shares: list[tuple[int, int]], episodes: int, **options: Any) -> EpisodeSampler:
    return EpisodeSampler(sizes, shares, episodes, options.pop("num_batches", 5), **options)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    support=st.integers(1, 8),
    query=st.integers(1, 8),
    episodes=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_support_and_query_of_an_episode_are_disjoint_rows_of_one_domain(
    sizes: list[int], support: int, query: int, episodes: int, seed: int
) -> None:
    parts = [Numbered(size) for size in sizes]
    for number, part in enumerate(parts):
        part.domain = number
    shares = [episode_sizes(size, support, query, "x") for size in sizes]
    data = EpisodeConcat(parts, shares)

    for rows in sampler(sizes, shares, episodes, seed=seed):
        batch = data.__getitems__(rows)
        assert len(batch.episodes) == episodes
        for episode in batch:
            chosen = [episode.support.index.tolist(), episode.query.index.tolist()]
            assert tuple(map(len, chosen)) == shares[episode.domain]
            together = chosen[0] + chosen[1]
            assert len(set(together)) == len(together)
            assert max(together) < sizes[episode.domain]
            assert set(episode.support.domain.tolist()) | set(episode.query.domain.tolist()) == {episode.domain}
            assert torch.equal(episode.support.image[:, 0, 0, 0].long(), episode.support.index)
            assert (episode.support.label == -1).all()
            assert torch.equal(episode.query.label, episode.query.index % 3)


def test_domains_of_a_step_differ_and_all_are_drawn_equally_often() -> None:
    shares = [(2, 3)] * 5
    given_out = sampler([10, 20, 30, 40, 50], shares, 3, num_batches=500)
    ends = torch.tensor([10, 20, 30, 40, 50]).cumsum(0)
    domains = torch.stack([torch.searchsorted(ends, torch.tensor(rows[::5]), right=True) for rows in given_out])

    assert all(len(set(step)) == 3 for step in domains.tolist())
    # 1,500 draws of five domains: 300 each; the deviation of one count is sqrt(500 * 0.6 * 0.4) = 11.
    assert (domains.flatten().bincount(minlength=5) - 300).abs().max() < 55


def test_more_episodes_than_domains_use_some_twice_with_images_of_their_own() -> None:
    (rows, *_) = sampler([50, 50], [(4, 4)] * 2, 5)

    domains = [[row // 50 for row in rows[k : k + 8]] for k in range(0, 40, 8)]
    assert sorted(len(set(one)) for one in domains) == [1] * 5
    assert sorted(one[0] for one in domains) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    assert len({tuple(rows[k : k + 8]) for k in range(0, 40, 8)}) == 5


def test_order_is_a_function_of_seed_and_epoch_and_a_resumed_epoch_goes_on() -> None:
    def steps(seed: int, epoch: int, start: int = 0, *, repeat: bool = False) -> list[list[int]]:
        one = sampler([20, 30, 25], [(3, 4)] * 3, 2, seed=seed, num_batches=6, repeat=repeat)
        one.load_state_dict({"epoch": epoch, "start": start})
        return list(one)

    whole = steps(1, 4)
    assert steps(1, 4) == whole
    assert steps(1, 4, start=2) == whole[2:]
    assert steps(1, 5) != whole
    assert steps(2, 4) != whole
    assert steps(1, 5, repeat=True) == steps(1, 0)
    assert len({str(step) for step in whole}) == 6


def test_two_processes_share_the_episodes_that_one_would_see() -> None:
    sizes, shares = [20] * 6, [(2, 3)] * 6
    one = list(sampler(sizes, shares, 4, seed=3))
    two = [list(sampler(sizes, shares, 2, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]

    def cut(rows: list[int]) -> list[list[int]]:
        return [rows[k : k + 5] for k in range(0, len(rows), 5)]

    for step, whole in enumerate(one):
        assert sorted(cut(two[0][step]) + cut(two[1][step])) == sorted(cut(whole))


@pytest.mark.parametrize(
    ("images", "asked", "sizes"),
    [
        (100, (24, 32), (24, 32)),
        (56, (24, 32), (24, 32)),  # exactly enough
        (28, (24, 32), (12, 16)),  # half: half of either
        (7, (24, 32), (3, 4)),
        (2, (24, 32), (1, 1)),
        (2, (1, 99), (1, 1)),  # at least one of either
        (3, (99, 1), (2, 1)),
    ],
)
def test_small_domains_give_smaller_episodes(images: int, asked: tuple[int, int], sizes: tuple[int, int]) -> None:
    assert episode_sizes(images, *asked, "domain 'x'") == sizes


def test_domain_of_one_image_is_told() -> None:
    with pytest.raises(ValueError, match="domain 'x' has 1 image; an episode needs one to adapt to"):
        episode_sizes(1, 24, 32, "domain 'x'")


# Evaluation -----------------------------------------------------------------------------------------------------------


def evaluation(count: int, **options: Any) -> EvaluationEpisodes:
    given: dict[str, Any] = {"support": 4, "draws": 3, "most": 5, "domain": "x", **options}
    return EvaluationEpisodes(Numbered(count), **given)


def test_every_image_but_the_support_is_answered_once_in_each_draw() -> None:
    episodes = evaluation(17)
    items = [episodes[k].episodes[0] for k in range(len(episodes))]

    assert len(items) == 3 * 3  # 13 query images in parts of 5, three times
    for draw in range(3):
        own = [item for item in items if item.draw == draw]
        support = {tuple(item.support.index.tolist()) for item in own}
        answered = [row for item in own for row in item.query.index.tolist()]
        assert len(support) == 1
        assert len(support.copy().pop()) == 4
        assert sorted([*answered, *support.pop()]) == list(range(17))
        assert all(len(item.query) <= 5 for item in own)
    assert len({tuple(item.support.index.tolist()) for item in items}) == 3


def test_draws_depend_on_seed_and_domain_alone() -> None:
    def supports(**options: Any) -> list[list[int]]:
        episodes = evaluation(30, **options)
        return [episodes.rows(draw)[0].tolist() for draw in range(3)]

    assert supports() == supports(most=29)
    assert supports() != supports(seed=1)
    assert supports() != supports(domain="y")


def test_official_protocol_takes_the_first_images_and_answers_all_once() -> None:
    episodes = evaluation(12, protocol="official")
    items = [episodes[k].episodes[0] for k in range(len(episodes))]

    assert {tuple(item.support.index.tolist()) for item in items} == {(0, 1, 2, 3)}
    assert [row for item in items for row in item.query.index.tolist()] == list(range(12))
    assert [item.draw for item in items] == [0, 0, 0]
    assert [len(item.support) for item in (evaluation(2, protocol="official")[0].episodes)] == [2]
    assert len(evaluation(1, protocol="official")[0]) == 1


@pytest.mark.parametrize(("images", "support", "answered"), [(5, 4, 1), (4, 2, 2), (3, 1, 2), (2, 1, 1)])
def test_where_the_support_would_leave_nothing_half_of_the_images_are_support(
    images: int, support: int, answered: int
) -> None:
    first, rest = evaluation(images).rows(0)

    assert (len(first), len(rest)) == (support, answered)


def test_a_single_image_is_both_parts_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="moeapps"):
        episodes = evaluation(1)

    assert len(episodes) == 1
    assert [rows.tolist() for rows in episodes.rows(0)] == [[0], [0]]
    assert "domain x has a single image" in caplog.text


def test_item_out_of_range_is_told() -> None:
    with pytest.raises(IndexError, match="item 9 of 9"):
        evaluation(17)[9]


def test_labels_of_the_support_are_never_read() -> None:
    rows = EvaluationEpisodes(Numbered(17), support=4, draws=1, most=50, domain="x").rows(0)
    watched = Numbered(17, forbidden=tuple(rows[0].tolist()))
    episode = EvaluationEpisodes(watched, support=4, draws=1, most=50, domain="x")[0].episodes[0]

    assert sorted(watched.read) == sorted(rows[1].tolist())
    assert episode.support.label.tolist() == [-1] * 4
    with pytest.raises(AssertionError, match="labels of the support were read"):  # the watch works
        watched.batch(rows[0])
    training = Numbered(9, forbidden=(0, 1, 2, 3))
    batch = EpisodeConcat([training], [(4, 5)]).__getitems__(list(range(9)))
    assert training.read == [4, 5, 6, 7, 8]
    assert batch.episodes[0].support.index.tolist() == [0, 1, 2, 3]


def test_unknown_labels_of_measured_values_are_nan(tmp_path: Path) -> None:
    data = Numbered(9)
    data.label = torch.linspace(0, 1, 9)
    episode = EpisodeConcat([data], [(4, 5)], measured=True).__getitems__(list(range(9))).episodes[0]

    assert episode.support.label.isnan().all()
    assert torch.equal(episode.query.label, torch.linspace(0, 1, 9)[4:])


def test_batches_move_join_and_count_their_queries(tmp_path: Path) -> None:
    data = small_data(tmp_path, mode="episodes")
    first, second = list(data.train_dataloader())[:2]

    both = EpisodeBatch.cat([first, second])

    assert len(first) == 2 * 5
    assert len(both.query) == len(both) == 20
    assert [episode.domain for episode in both] == [*(e.domain for e in first), *(e.domain for e in second)]
    moved = first.to("meta")
    assert {e.query.image.device.type for e in moved} == {e.support.label.device.type for e in moved} == {"meta"}
