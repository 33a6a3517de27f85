# SPDX-License-Identifier: Apache-2.0
r"""A generated log of lists with known truth: users are of K types, each type ranks by a rule of its own.

A user of type k and group g has a history: each past item is, with probability ``reveal``, of one of the three styles
that type k likes, else of any style. A request names a category; N items of it, none of them in the history, are the
candidates, and the user takes one:

    P(item i is taken) = softmax_i(strength (sqrt(1 - affinity) f_k(g, i) + sqrt(affinity) a_k(i))),
    f_k(g, i) = sum_m W_km R_m[g, trait_m(i)],    W_k = sqrt(1 - conflict) u + sqrt(conflict) S_k,    m = 1 .. K

with tables R_m of unit variance that give each value of a trait an effect (``crossing``: which part of it depends on
the user's group), u = (1, ..., 1) / sqrt(K) what all types share, and S_k the corners of a regular simplex around the
origin, orthogonal to u. So f_k and f_l correlate by 1 - conflict K / (K - 1): at conflict 0 all types are alike; at
(K - 1) / K type k looks at trait k alone; beyond, what one type likes another dislikes; at 1 the mean rule is zero, and
who does not know the type of a user knows nothing. a_k is 1 for items of the type's own styles, else 0, centred and of
unit variance: what resembles the past is taken a little more often, which attention to the history finds at once, while
the rule needs the type AND the traits. Traits say nothing of the type.

The styles of the history give the posterior of the type by Bayes' rule, exactly, and with it P(i is taken | history),
which comes with every list: no ranking has a higher expected AUC.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from moeapps.data.domain import SPLITS, Role, Split
from moeapps.data.gather import TableDataset
from moeapps.moe.counts import none_negative
from tasks.recommendation.data.factors import Floats, stream
from tasks.recommendation.data.lists import Lists, ListSchema
from tasks.recommendation.data.source import GeneratedLog

Ints = NDArray[np.int64]
GENERATOR_VERSION = 1
STYLES, CATEGORIES, GROUPS, VALUES = 3, 6, 4, 4  # styles per type; values of category, of group, of a trait
SHORTEST = 6  # past items of a user who is not of the long tail


def default_mixes(tastes: int) -> dict[str, list[float]]:
    """Return shares of the types: one seen mix per type but the last, whose mixes at the end are never trained on."""
    mixes = {f"mostly_{k}": _mostly(tastes, k, 0.55) for k in range(tastes - 1)}
    halves = np.full(tastes, 0.1 / max(tastes - 2, 1))
    halves[[0, -1]] = 0.45 if tastes > 2 else 0.5
    return mixes | {
        "halves": halves.tolist(),
        "even": np.full(tastes, 1 / tastes).tolist(),
        f"mostly_{tastes - 1}": _mostly(tastes, tastes - 1, 0.7),
    }


def _mostly(tastes: int, k: int, share: float) -> list[float]:
    mix = np.full(tastes, (1 - share) / (tastes - 1))
    mix[k] = share
    return [float(value) for value in mix]


class TasteTypes(GeneratedLog):
    """Lists of users whose type, shown by their history, decides by which rule they choose.

    Args:
        data_seed: seed of everything; another one gives other items, rules, users and lists.
        tastes: K, types of users; at least 2.
        conflict: how much the rules of the types disagree, in [0, 1].
        crossing: share of a trait's effect that depends on the user's group, in [0, 1].
        affinity: share of the utility that is the type's love of its own styles, in [0, 1].
        reveal: probability that a past item is of the type's own styles (else of any style), in [0, 1].
        strength: how sure users are: scale of the utilities.
        tail_share: share of users with one or two past items.
        cold_share: share of users with none.
        num_items: items, shared by all domains.
        history: H, the longest history.
        candidates: N, items of a list, one of which is taken.
        lists_per_user: lists of each user, with one history.
        train_lists: training lists per seen domain.
        val_lists: validation lists per seen and validation domain.
        test_lists: test lists per domain.
        mixes: domain -> shares of the K types, in any scale; None means `default_mixes`.

    Raises:
        ValueError: a share outside its range, a count that is too small, or a mix that is no share of K types.
    """

    stem = "tastes"
    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": ["mostly_0", "mostly_1", "mostly_2"],
        "validation": ["halves"],
        "unseen": ["even", "mostly_3"],
    }

    def __init__(
        self,
        *,
        data_seed: int = 0,
        tastes: int = 4,
        conflict: float = 0.75,
        crossing: float = 0.1,
        affinity: float = 0.3,
        reveal: float = 0.8,
        strength: float = 3.0,
        tail_share: float = 0.2,
        cold_share: float = 0.03,
        num_items: int = 600,
        history: int = 20,
        candidates: int = 5,
        lists_per_user: int = 4,
        train_lists: int = 8000,
        val_lists: int = 2000,
        test_lists: int = 6000,
        mixes: dict[str, list[float]] | None = None,
    ) -> None:
        none_negative(strength=strength)
        self.data_seed, self.tastes, self.reveal = data_seed, tastes, reveal
        self.conflict, self.crossing, self.affinity = conflict, crossing, affinity
        self.strength, self.tail_share, self.cold_share = strength, tail_share, cold_share
        self.num_items, self.history, self.candidates = num_items, history, candidates
        self.lists_per_user = lists_per_user
        self.lists: dict[Split, int] = {"train": train_lists, "val": val_lists, "test": test_lists}
        if tastes < 2:
            raise ValueError(f"tastes={tastes}: give at least 2 types")
        self.domains = self.mixes = default_mixes(tastes) if mixes is None else mixes
        self._check()

    def _check(self) -> None:
        shares = {name: float(getattr(self, name)) for name in ("conflict", "crossing", "affinity", "reveal")}
        shares |= {"tail_share": self.tail_share, "cold_share": self.cold_share}
        shares |= {"tail_share + cold_share": self.tail_share + self.cold_share}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must lie in [0, 1]")
        counts = {"candidates": self.candidates, "lists_per_user": self.lists_per_user}
        for name, value in {**counts, **{f"{split}_lists": number for split, number in self.lists.items()}}.items():
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed; use 1 or more")
        if self.history < SHORTEST:
            raise ValueError(f"history={self.history} is too short; users outside the tail have {SHORTEST} past items")
        least = CATEGORIES * (self.candidates + self.history + 1)
        if self.num_items < max(least, STYLES * self.tastes):
            raise ValueError(
                f"num_items={self.num_items} leaves a category without {self.candidates} candidates outside a history; "
                f"give at least {max(least, STYLES * self.tastes)}"
            )
        for domain, mix in self.mixes.items():
            if len(mix) != self.tastes or min(mix) < 0 or sum(mix) <= 0:
                raise ValueError(f"domain {domain!r} has mix {mix}; give {self.tastes} shares, none below 0, one above")

    # What a source provides ---------------------------------------------------------------------------------------

    @cached_property
    def schema(self) -> ListSchema:
        """Item, category, style and K traits; the request's category; the user's group."""
        traits = {f"trait_{m}": VALUES + 1 for m in range(self.tastes)}
        return ListSchema(
            item_fields={
                "item": self.num_items + 1,
                "category": CATEGORIES + 1,
                "style": STYLES * self.tastes + 1,
                **traits,
            },
            query_fields={"category": CATEGORIES + 1},
            profile_fields={"group": GROUPS + 1},
            history=self.history,
            candidates=self.candidates,
            factors=tuple(f"taste {k}" for k in range(self.tastes)),
        )

    def item_name(self, item: int) -> str:
        """Name an item by its style and the type that likes it."""
        style = int(self.item_ids[item, 2]) - 1
        return f"{item}: style {style} of taste {style // STYLES}"

    def dataset(self, domain: str, split: Split, cache: Path | None) -> TableDataset:
        """Return the lists of one domain and split."""
        return TableDataset(self._table(self.drawn(domain, split, cache)))

    def made_of(self, domain: str, split: Split) -> list[Any]:
        """Return what lists depend on."""
        drawn = [self.data_seed, self.tastes, self.conflict, self.crossing, self.affinity, self.reveal, self.strength]
        sizes = [self.tail_share, self.cold_share, self.num_items, self.history, self.candidates, self.lists_per_user]
        fixed = [GENERATOR_VERSION, STYLES, CATEGORIES, GROUPS, VALUES]
        return [*fixed, drawn, sizes, self.lists[split], self.mixes[domain], domain, split]

    # The truth ----------------------------------------------------------------------------------------------------

    @cached_property
    def item_ids(self) -> Ints:
        """Fields of every item, [M, F], in the order of the schema; categories and styles are equally large."""
        rng, number = stream(self.data_seed, "items"), np.arange(self.num_items)
        category = rng.permutation(number % CATEGORIES)
        style = rng.permutation(number % (STYLES * self.tastes))
        values = rng.integers(VALUES, size=(self.num_items, self.tastes))
        return 1 + np.column_stack([number, category, style, values])

    @cached_property
    def rules(self) -> Floats:
        """f_k(g, i) for every type, group and item, [K, G, M]."""
        rng, size = stream(self.data_seed, "rules"), (self.tastes, GROUPS, VALUES)
        plain = _standard(rng.standard_normal((self.tastes, 1, VALUES)))
        joint = rng.standard_normal(size)
        joint = _standard(
            joint - joint.mean(1, keepdims=True) - joint.mean(2, keepdims=True) + joint.mean((1, 2), keepdims=True)
        )
        tables = np.sqrt(1 - self.crossing) * plain + np.sqrt(self.crossing) * joint
        value = self.item_ids[:, 3:] - 1
        effects = np.stack([tables[m][:, value[:, m]] for m in range(self.tastes)])  # [K, G, M]
        return np.tensordot(type_weights(self.tastes, self.conflict), effects, axes=1)

    @cached_property
    def style_love(self) -> Floats:
        """a_k(i), [K, M]."""
        own = (self.item_ids[:, 2] - 1) // STYLES == np.arange(self.tastes)[:, None]
        share = 1 / self.tastes
        return np.asarray((own - share) / np.sqrt(share * (1 - share)))

    @cached_property
    def likelihood(self) -> Floats:
        """Probability that a past item of a user of type k is of style s, [K, S]."""
        total = STYLES * self.tastes
        own = np.arange(total) // STYLES == np.arange(self.tastes)[:, None]
        return np.asarray(self.reveal * own / STYLES + (1 - self.reveal) / total)

    def posterior(self, history: Ints, domain: str) -> Floats:
        """P(type | history) under the domain's mix, [B, K].

        Args:
            history: [B, H] items, -1 for none.
            domain: whose shares are the prior.
        """
        style = self.item_ids[history, 2] - 1
        with np.errstate(divide="ignore"):  # reveal 1 and a share 0 exclude types: log 0
            evidence = np.where(history[..., None] >= 0, np.log(self.likelihood).T[style], 0).sum(1)
            evidence = evidence + np.log(np.array(self.mixes[domain]) / np.sum(self.mixes[domain]))
        return _softmax(evidence)

    def choice(self, group: Ints, candidates: Ints) -> Floats:
        """P(candidate is taken | type), [K, B, N], for users of groups [B] and candidates [B, N]."""
        rule, love = self.rules[:, group[:, None], candidates], self.style_love[:, candidates]
        return _softmax(self.strength * (np.sqrt(1 - self.affinity) * rule + np.sqrt(self.affinity) * love))

    # Drawing ------------------------------------------------------------------------------------------------------

    def draw(self, domain: str, split: Split) -> dict[str, NDArray[Any]]:
        """Draw lists."""
        rng, num = stream(self.data_seed, domain, split), self.lists[split]
        users = -(-num // self.lists_per_user)
        mix = np.array(self.mixes[domain])
        taste = rng.choice(self.tastes, users, p=mix / mix.sum())
        group = rng.integers(GROUPS, size=users)
        past = self._histories(rng, taste)
        who = np.arange(num) // self.lists_per_user
        candidates, category = self._candidates(rng, past[who])
        probability = self.choice(group[who], candidates)
        place = np.arange(num)
        taken = probability[taste[who], place].cumsum(1) > rng.random((num, 1))
        oracle = np.einsum("bk,kbn->bn", self.posterior(past[who], domain), probability)
        first = 1_000_000 * (3 * list(self.mixes).index(domain) + SPLITS.index(split))
        return {
            "user": first + who,
            "taste": taste[who],
            "group": group[who],
            "history": past[who].astype(np.int32),
            "candidates": candidates.astype(np.int32),
            "category": category,
            "taken": np.where(taken.any(1), taken.argmax(1), self.candidates - 1),  # rounding may leave the sum below 1
            "oracle": oracle.astype(np.float32),
        }

    def _histories(self, rng: np.random.Generator, taste: Ints) -> Ints:
        """Past items, [U, H], latest first, -1 after the last."""
        users, draw = len(taste), rng.random(len(taste))
        length = rng.integers(SHORTEST, self.history + 1, users)
        length = np.where(draw < self.tail_share, rng.integers(1, 3, users), length)
        length = np.where(draw >= 1 - self.cold_share, 0, length)
        size = (users, self.history)
        own = taste[:, None] * STYLES + rng.integers(STYLES, size=size)
        style = np.where(rng.random(size) < self.reveal, own, rng.integers(STYLES * self.tastes, size=size))
        order = np.argsort(self.item_ids[:, 2], kind="stable")  # items by style
        ends = np.searchsorted(self.item_ids[order, 2] - 1, np.arange(STYLES * self.tastes), side="right")
        starts = np.concatenate([[0], ends[:-1]])
        item = order[starts[style] + (rng.random(size) * (ends - starts)[style]).astype(np.int64)]
        return np.where(np.arange(self.history) < length[:, None], item, -1)

    def _candidates(self, rng: np.random.Generator, past: Ints) -> tuple[Ints, Ints]:
        """Items [B, N] of one category each, none of them in the past of its list, and the categories [B]."""
        category = rng.integers(CATEGORIES, size=len(past))
        members = [np.flatnonzero(self.item_ids[:, 1] - 1 == c) for c in range(CATEGORIES)]
        chosen = np.zeros((len(past), self.candidates), np.int64)
        for c, items in enumerate(members):
            rows = np.flatnonzero(category == c)
            order = rng.random((len(rows), len(items)))
            seen = np.zeros((len(rows), self.num_items + 1), np.bool_)
            seen[np.arange(len(rows))[:, None], past[rows]] = True  # -1 marks the column that no item has
            order[seen[:, items]] = np.inf
            chosen[rows] = items[np.argsort(order, axis=1)[:, : self.candidates]]
        return chosen, category

    def _table(self, drawn: dict[str, NDArray[Any]]) -> Lists:
        history, candidates = drawn["history"].astype(np.int64), drawn["candidates"].astype(np.int64)
        label = np.arange(self.candidates) == drawn["taken"][:, None]
        columns = {
            "history": np.where(history[..., None] >= 0, self.item_ids[history], 0),
            "history_mask": history >= 0,
            "history_item": history,
            "candidates": self.item_ids[candidates],
            "candidate_mask": np.ones_like(label),
            "candidate_item": candidates,
            "label": label.astype(np.float32),
            "query": 1 + drawn["category"][:, None],
            "profile": 1 + drawn["group"][:, None],
            "user": drawn["user"],
            "row": np.arange(len(label)),
            "factor": drawn["taste"],
            "oracle": drawn["oracle"],
        }
        return Lists(**{name: torch.from_numpy(values) for name, values in columns.items()})


def type_weights(tastes: int, conflict: float) -> Floats:
    """W_km, how much type k looks at trait m: [K, K], rows of unit length; see the head of this file."""
    corners = (np.eye(tastes) - 1 / tastes) * np.sqrt(tastes / (tastes - 1))
    return np.asarray(np.sqrt((1 - conflict) / tastes) + np.sqrt(conflict) * corners)


def _standard(tables: Floats) -> Floats:
    """Tables [K, G, V] of mean 0 and unit variance each."""
    centred = tables - tables.mean((1, 2), keepdims=True)
    return np.asarray(centred / centred.std((1, 2), keepdims=True))


def _softmax(logits: Floats) -> Floats:
    power = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(power / power.sum(-1, keepdims=True))
