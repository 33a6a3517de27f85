# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.point_cloud.data.labels import LABEL_SETS
from tasks.point_cloud.nets.head import LanguageHead
from tasks.point_cloud.nets.text import (
    ClipFileText,
    RandomText,
    TaxonomyText,
    TextVectors,
    normalise_name,
    taxonomy,
    write_text_file,
)

S3DIS = [
    "ceiling",
    "floor",
    "wall",
    "beam",
    "column",
    "window",
    "door",
    "table",
    "chair",
    "bookcase",
    "board",
    "clutter",
]
MATTERPORT_END = ["bathtub", "other", "ceiling"]


def test_identical_names_have_identical_logits_in_every_label_set() -> None:
    head = LanguageHead(8, {"room": ["wall", "chair"], "office": ["Chair", "floor", "wall"]}, TaxonomyText())
    features = torch.randn(5, 8)

    room, office = head(features, "room"), head(features, "office")

    torch.testing.assert_close(room[:, 0], office[:, 2], rtol=0, atol=0)
    torch.testing.assert_close(room[:, 1], office[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("text", [TaxonomyText(), RandomText(16)])
def test_enlarging_the_vocabulary_leaves_answers_unchanged(text) -> None:
    small = LanguageHead(8, {"room": ["wall", "chair"]}, text)
    large = LanguageHead(8, {"street": ["road", "car"], "room": ["wall", "chair"]}, text)
    large.load_state_dict(small.state_dict())
    features = torch.randn(5, 8)

    torch.testing.assert_close(small(features, "room"), large(features, "room"), rtol=0, atol=0)


@pytest.mark.parametrize(("domain", "names"), [("s3dis", S3DIS), ("matterport3d", MATTERPORT_END)])
def test_column_c_is_the_name_of_class_c_even_when_the_vocabulary_is_ordered_otherwise(domain, names) -> None:
    text = TaxonomyText()
    head = LanguageHead(text.dim, {"first": ["wall", "floor", "chair", "sofa", "ceiling"], domain: names}, text)
    torch.nn.init.eye_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)

    logits = head(text.encode(names), domain)

    assert logits.argmax(dim=1).tolist() == list(range(len(names)))


def test_logits_are_scaled_cosines() -> None:
    head = LanguageHead(4, {"room": ["wall", "chair"]}, RandomText(6), scale=30.0).double()
    features = torch.randn(3, 4, dtype=torch.float64)
    z = head.linear(features)

    logits = head(features, "room")

    vectors = RandomText(6).encode(["wall", "chair"]).double()
    torch.testing.assert_close(
        logits, 30 * torch.cosine_similarity(z[:, None], vectors[None], dim=2), rtol=1e-5, atol=1e-5
    )


def test_scale_is_frozen_unless_asked_and_text_is_never_trained_nor_saved() -> None:
    frozen = LanguageHead(4, {"room": ["wall"]}, TaxonomyText())
    learned = LanguageHead(4, {"room": ["wall"]}, TaxonomyText(), learn_scale=True)

    assert not frozen.log_scale.requires_grad
    assert learned.log_scale.requires_grad
    assert set(frozen.state_dict()) == {"linear.weight", "linear.bias", "log_scale"}


def test_clip_sized_head_adds_the_published_parameters() -> None:
    head = LanguageHead(64, {"room": ["wall"]}, RandomText(512))

    assert sum(p.numel() for p in head.linear.parameters()) == 33_280


@pytest.mark.parametrize("text", [TaxonomyText(), RandomText(32)])
def test_providers_give_unit_rows_that_depend_on_the_name_alone(text) -> None:
    names = list(taxonomy())

    together = text.encode(names)

    assert isinstance(text, TextVectors)
    assert together.shape == (len(names), text.dim)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(names)))
    torch.testing.assert_close(text.encode(["Shower-Curtain"]), text.encode(["shower curtain"]), rtol=0, atol=0)
    torch.testing.assert_close(text.encode(names[::-1]), together.flip(0), rtol=0, atol=0)


def test_taxonomy_covers_every_label_set() -> None:
    missing = {name for names in LABEL_SETS.values() for name in names if normalise_name(name) not in taxonomy()}

    assert not missing


def test_names_of_one_label_set_can_be_told_apart() -> None:
    for domain, names in LABEL_SETS.items():
        vectors = TaxonomyText().encode(names)
        gram = vectors @ vectors.T - torch.eye(len(names))
        assert gram.max() < 0.9, domain


def test_taxonomy_cosine_is_the_normalised_depth_of_the_shared_category() -> None:
    text, paths = TaxonomyText(), taxonomy()
    names = ["road", "driveable surface", "sidewalk", "floor", "chair", "car", "truck"]

    gram = text.encode(names).double() @ text.encode(names).double().T

    for i, a in enumerate(names):
        for j, b in enumerate(names):
            shared = sum(1 for k in range(min(len(paths[a]), len(paths[b]))) if paths[a][: k + 1] == paths[b][: k + 1])
            assert gram[i, j].item() == pytest.approx(shared / (len(paths[a]) * len(paths[b])) ** 0.5, abs=1e-5)


def test_synonyms_are_closer_than_siblings_and_siblings_than_strangers() -> None:
    road, drive, walk, floor, chair = TaxonomyText().encode(["road", "driveable surface", "sidewalk", "floor", "chair"])

    assert road @ drive > road @ walk > road @ floor > road @ chair


def test_random_directions_carry_no_meaning() -> None:
    gram = RandomText(256).encode(list(taxonomy())) @ RandomText(256).encode(list(taxonomy())).T
    off = gram[~torch.eye(len(gram), dtype=torch.bool)]

    assert off.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert not torch.equal(RandomText(8, seed=1).encode(["car"]), RandomText(8).encode(["car"]))


def test_text_file_round_trip(tmp_path) -> None:
    vectors = torch.randn(2, 5)
    write_text_file(tmp_path / "clip.npz", ["Wall", "traffic-sign"], vectors)

    text = ClipFileText(tmp_path / "clip.npz", names=["wall"])

    torch.testing.assert_close(text.encode(["traffic sign", "wall"]), torch.nn.functional.normalize(vectors.flip(0)))


def test_missing_file_name_or_layout_is_an_error_at_construction(tmp_path) -> None:
    with pytest.raises(ValueError, match="no text vectors at"):
        ClipFileText(tmp_path / "none.npz")
    write_text_file(tmp_path / "clip.npz", ["wall"], torch.randn(1, 5))
    with pytest.raises(ValueError, match=r"no vectors for \['chair'\]"):
        ClipFileText(tmp_path / "clip.npz", names=["wall", "chair"])
    np.savez(tmp_path / "odd.npz", table=np.zeros(3))
    with pytest.raises(ValueError, match="expected arrays"):
        ClipFileText(tmp_path / "odd.npz")
    with pytest.raises(ValueError, match="one row per name"):
        write_text_file(tmp_path / "clip.npz", ["wall"], torch.randn(2, 5))


def test_wrong_label_sets_are_errors_that_name_them() -> None:
    with pytest.raises(ValueError, match="does not know"):
        LanguageHead(4, {"room": ["wall", "flux capacitor"]}, TaxonomyText())
    with pytest.raises(ValueError, match="repeats a name"):
        LanguageHead(4, {"room": ["wall", "Wall"]}, TaxonomyText())
    with pytest.raises(ValueError, match="scale"):
        LanguageHead(4, {"room": ["wall"]}, TaxonomyText(), scale=0)
    with pytest.raises(ValueError, match="the head knows room"):
        LanguageHead(4, {"room": ["wall"]}, TaxonomyText())(torch.randn(1, 4), "street")


def test_parts_of_a_batch_get_the_logits_and_gradients_of_each_alone() -> None:
    head = LanguageHead(4, {"room": ["wall", "chair"], "street": ["road"]}, RandomText(6), learn_scale=True).double()
    features = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    vectors = {name: RandomText(6).encode([name]).double()[0] for name in ("wall", "chair", "road")}

    def cosines(rows: torch.Tensor, names: list[str]) -> torch.Tensor:
        z = torch.nn.functional.normalize(head.linear(rows), dim=1)
        return head.log_scale.exp() * z @ torch.stack([vectors[name] for name in names]).T

    found = head.split(features, [("street", 2), ("room", 4), ("street", 1)])
    expected = [
        cosines(features[:2], ["road"]),
        cosines(features[2:6], ["wall", "chair"]),
        cosines(features[6:], ["road"]),
    ]

    inputs = [features, *head.parameters()]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(sum(part.sin().sum() for part in parts), inputs) for parts in (found, expected)]
    torch.testing.assert_close(*grads)


def test_a_row_of_zeros_has_logits_of_zero_and_a_finite_gradient() -> None:
    head = LanguageHead(4, {"room": ["wall", "chair"]}, RandomText(6))
    torch.nn.init.zeros_(head.linear.bias)
    features = torch.zeros(1, 4, requires_grad=True)

    logits = head(features, "room")
    logits.sum().backward()

    assert logits.eq(0).all()
    assert features.grad is not None
    assert features.grad.isfinite().all()
