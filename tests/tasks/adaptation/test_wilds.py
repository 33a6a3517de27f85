# SPDX-License-Identifier: Apache-2.0
"""The overlays of WILDS' five sets, DomainBed and own folders read tiny sets laid out as the real ones are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moeapps.data.images.batch import to_uint8
from moeapps.files import write_arrays
from tasks.adaptation.data.readers.files import ImageForm
from tasks.adaptation.data.readers.folders import DomainFolders
from tasks.adaptation.data.readers.table import Derived, Rule, TableDomains
from tasks.adaptation.datamodule import AdaptationData
from tests.tasks.adaptation.adaptation_common import write_folders, write_picture, write_table

Rows = list[dict[str, object]]


def overlay(name: str, root: Path, *, size: int = 4) -> AdaptationData:
    """Build the data of an overlay below another root, with images of another size."""
    given = yaml.safe_load(Path(f"configs/data/{name}.yaml").read_text())["data"]["init_args"]
    source = given.pop("source")
    options: dict[str, Any] = {**source["init_args"], "root": root}
    options["form"] = ImageForm(**{**options["form"], "size": size})
    if "rules" in options:
        options["rules"] = [Rule(**rule) for rule in options["rules"]]
        options["derived"] = {key: Derived(**made) for key, made in options.get("derived", {}).items()}
    kind = {"TableDomains": TableDomains, "DomainFolders": DomainFolders}[source["class_path"].rpartition(".")[2]]
    return AdaptationData(source=kind(**options), cache_dir=root / "cache", **given)


def write_camelyon(root: Path) -> Rows:
    """Two slides of each of five centres, four patches each; centre 1 for choices, 2 for tests."""
    rows: Rows = []
    for number in range(40):
        center = number // 8
        patient, node, x, y = f"{center:03d}", number % 2, 10 * number, 5
        name = f"patient_{patient}_node_{node}"
        write_picture(root / "patches" / name / f"patch_{name}_x_{x}_y_{y}.png", number)
        row = {"patient": patient, "node": node, "x_coord": x, "y_coord": y, "tumor": number % 2, "slide": number // 4}
        rows.append({**row, "center": center, "split": int(number % 4 >= 2)})
    write_table(root / "metadata.csv", rows, index=True)
    return rows


def test_camelyon17_has_slides_as_domains_and_centres_as_roles(tmp_path: Path) -> None:
    rows = write_camelyon(tmp_path)
    # Five experts want five slides: those of centres 0, 3 and 4 are six.
    data = overlay("wilds_camelyon17", tmp_path)

    assert data.roles["seen"] == [f"slide_{n}" for n in (0, 1, 6, 7, 8, 9)]
    assert data.roles["validation"] == ["slide_2", "slide_3"]
    assert data.roles["unseen"] == ["slide_4", "slide_5"]
    assert data.facts["num_experts"] == 5
    train = data.images("slide_6", "train")
    assert to_uint8(train.image[:, 0, 0, 0]).tolist() == [24, 25]
    assert train.label.tolist() == [rows[24]["tumor"], rows[25]["tumor"]]
    held = [to_uint8(data.images("slide_6", split).image[:, 0, 0, 0]).tolist() for split in ("val", "test")]  # type: ignore[arg-type]
    assert sorted(map(len, held)) == [1, 1]
    assert sorted(held[0] + held[1]) == [26, 27]
    assert to_uint8(data.images("slide_4", "test").image[:, 0, 0, 0]).tolist() == [16, 17, 18, 19]


def write_iwildcam(root: Path, places: int = 14) -> Rows:
    """Eight photographs of each place; the last two places are of the splits val and test, place 0 has three."""
    rows: Rows = []
    for number in range(8 * places):
        place = number // 8
        split = "val" if place == places - 2 else "test" if place == places - 1 else ""
        split = split or ("train", "train", "train", "train", "id_val", "id_val", "id_test", "id_test")[number % 8]
        if place == 0 and number % 8 > 2:
            continue
        name = f"{number:04d}.jpg"
        write_picture(root / "train" / name, number)
        row: dict[str, object] = {"split": split, "location_remapped": place, "sequence_remapped": 0, "y": number % 5}
        rows.append({**row, "filename": name, "datetime": "2013-06-05 05:44:19.000"})
    write_table(root / "metadata.csv", rows)
    return rows


def test_iwildcam_has_places_as_domains(tmp_path: Path) -> None:
    write_iwildcam(tmp_path)
    data = overlay("wilds_iwildcam", tmp_path)

    assert data.roles["seen"] == [f"place_{n}" for n in range(1, 12)]  # place 0 has too few images
    assert (data.roles["validation"], data.roles["unseen"]) == (["place_12"], ["place_13"])
    assert data.facts["num_experts"] == 10
    assert data.facts["num_classes"] == 5
    train = data.images("place_3", "train")
    assert (to_uint8(train.image[:, 0, 0, 0]) - torch.arange(24, 28)).abs().max() <= 1  # JPEG
    assert train.label.tolist() == [4, 0, 1, 2]


def write_rxrx1(root: Path) -> Rows:
    """Five experiments of three wells with two sites each."""
    rows: Rows = []
    experiments = [("HEPG2-01", "train"), ("HUVEC-01", "train"), ("RPE-01", "train"), ("U2OS-01", "val")]
    for experiment, part in [*experiments, ("U2OS-02", "test")]:
        for well in ("B02", "B03", "C02"):
            for site in (1, 2):
                path = root / "images" / experiment / "Plate1" / f"{well}_s{site}.png"
                write_picture(path, len(rows))
                row: dict[str, object] = {"site_id": f"{experiment}_1_{well}_{site}", "cell_type": experiment[:-3]}
                row |= {"dataset": part, "experiment": experiment, "plate": 1, "well": well, "site": site}
                rows.append({**row, "sirna_id": len(rows) // 2 % 3})
    write_table(root / "metadata.csv", rows)
    return rows


def test_rxrx1_trains_on_site_one_and_holds_site_two_out(tmp_path: Path) -> None:
    write_rxrx1(tmp_path)
    data = overlay("wilds_rxrx1", tmp_path)
    data.source.form = ImageForm(size=4)  # type: ignore[attr-defined]  # pictures of one level have no deviation

    assert data.roles["seen"] == ["HEPG2-01", "HUVEC-01", "RPE-01"]
    assert (data.roles["validation"], data.roles["unseen"]) == (["U2OS-01"], ["U2OS-02"])
    assert to_uint8(data.images("HUVEC-01", "train").image[:, 0, 0, 0]).tolist() == [6, 8, 10]
    assert data.images("HUVEC-01", "train").label.tolist() == [0, 1, 2]
    held = [to_uint8(data.images("HUVEC-01", split).image[:, 0, 0, 0]).tolist() for split in ("val", "test")]  # type: ignore[arg-type]
    assert sorted(held[0] + held[1]) == [7, 9, 11]
    assert min(map(len, held)) == 1
    assert len(data.images("U2OS-02", "test")) == 6


def write_fmow(root: Path) -> Rows:
    """Twelve images of each of five years; every third is of a sequence and not used."""
    rows: Rows = []
    for number in range(60):
        year = 2010 + 2 * (number // 12)  # 2010, 2012, 2014, 2016, 2018
        known = {2014: "val", 2016: "test", 2018: "test"}.get(year)
        split = "seq" if number % 12 == 11 else known or ("train", "train", "val", "test")[number % 4]
        write_picture(root / "images" / f"rgb_img_{number}.png", number)
        row: dict[str, object] = {"split": split, "img_filename": "x.jpg", "timestamp": f"{year}-03-02T10:00:00Z"}
        rows.append(
            {**row, "country_code": ("FRA", "XXX")[number // 12 % 2], "category": ("zoo", "airport")[number % 2]}
        )
    write_table(root / "rgb_metadata.csv", rows)
    write_table(root / "country_code_mapping.csv", [{"alpha-3": "FRA", "region": "Europe"}])
    return rows


def test_fmow_has_years_and_regions_and_keeps_the_numbers_of_rows(tmp_path: Path) -> None:
    write_fmow(tmp_path)
    path = Path("configs/data/wilds_fmow.yaml")
    given = yaml.safe_load(path.read_text())["data"]["init_args"]
    assert given["num_experts"] == 4
    with pytest.raises(ValueError, match="num_experts=4 is not allowed; use 1 to 2"):
        overlay("wilds_fmow", tmp_path)
    source = given["source"]["init_args"]
    rules = [Rule(**rule) for rule in source["rules"]]
    derived = {key: Derived(**made) for key, made in source["derived"].items()}
    words = {key: source[key] for key in ("table", "image", "label", "domain", "least")}
    reader = TableDomains(root=tmp_path, rules=rules, derived=derived, form=ImageForm(size=4), **words)
    data = AdaptationData(source=reader, cache_dir=tmp_path / "cache")

    assert data.roles["seen"] == ["2010_Europe", "2012_Other"]
    assert (data.roles["validation"], data.roles["unseen"]) == (["2014_Europe"], ["2016_Other", "2018_Europe"])
    test = data.images("2016_Other", "test")
    assert to_uint8(test.image[:, 0, 0, 0]).tolist() == list(range(36, 47))  # without the row of a sequence, 47
    assert [data.source.class_names[k] for k in test.label[:2].tolist()] == ["zoo", "airport"]
    assert to_uint8(data.images("2012_Other", "train").image[:, 0, 0, 0]).tolist() == [12, 13, 16, 17, 20, 21]


FOLD_A = {
    "unseen": ["angola", "cote_d_ivoire", "ethiopia", "mali", "rwanda"],
    "validation": ["benin", "burkina_faso", "guinea", "sierra_leone", "tanzania"],
    "seen": [
        *("cameroon", "democratic_republic_of_congo", "ghana", "kenya", "lesotho", "malawi", "mozambique", "nigeria"),
        *("senegal", "togo", "uganda", "zambia", "zimbabwe"),
    ],
}


def write_poverty(root: Path, each: int = 5) -> Rows:
    """Five images of eight channels for each of the 23 countries; the wealth is a tenth of the row."""
    rows: Rows = []
    for country in sorted(name for names in FOLD_A.values() for name in names):
        for _ in range(each):
            number = len(rows)
            image = np.full((8, 6, 6), number, np.float32) + np.arange(8, dtype=np.float32)[:, None, None] / 10
            write_arrays(root / "images" / f"landsat_poverty_img_{number}.npz", x=image)
            rows.append({"country": country, "wealthpooled": number / 10, "urban": number % 2})
    write_table(root / "dhs_metadata.csv", rows, index=True)
    return rows


def test_poverty_measures_a_number_on_eight_channels_of_countries(tmp_path: Path) -> None:
    rows = write_poverty(tmp_path)
    data = overlay("wilds_poverty", tmp_path, size=6)

    assert {role: sorted(names) for role, names in data.roles.items()} == FOLD_A
    assert (data.facts["target"], data.facts["channels"], data.facts["num_classes"]) == ("regression", 8, 1)
    data.prepare_data()
    test = data.images("mali", "test")
    numbers = [number for number, row in enumerate(rows) if row["country"] == "mali"]
    assert torch.allclose(test.label, torch.tensor([number / 10 for number in numbers]))
    assert torch.allclose(test.image[:, 3], torch.tensor(numbers).float()[:, None, None].expand(-1, 6, 6) + 0.3)
    smaller = overlay("wilds_poverty", tmp_path, size=3).images("mali", "test").image
    assert torch.allclose(smaller[:, 3], test.image[:, 3, :3, :3])


def test_pacs_in_domainbed_folders(tmp_path: Path) -> None:
    names = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    write_folders(tmp_path, {d: dict.fromkeys(names, 4) for d in ("art_painting", "cartoon", "photo", "sketch")})
    data = overlay("pacs", tmp_path)

    assert data.source.class_names == sorted(names)
    assert len(data.images("art_painting", "test")) == 28
    assert sum(len(data.images("photo", split)) for split in ("train", "val", "test")) == 28  # type: ignore[arg-type]


def test_own_folders(tmp_path: Path) -> None:
    write_folders(tmp_path, {f"camera_{n}": {"fox": 5, **({"owl": 4} if n != 5 else {})} for n in range(1, 6)})
    data = overlay("own_domains", tmp_path)

    assert data.source.class_names == ["fox", "owl"]
    assert data.images("camera_5", "test").label.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("wilds_camelyon17", write_camelyon),
        ("wilds_iwildcam", write_iwildcam),
        ("wilds_rxrx1", write_rxrx1),
        ("wilds_poverty", write_poverty),
    ],
)
def test_episodes_of_every_set_run_through_the_loaders(
    name: str, write: Callable[[Path], Rows], tmp_path: Path
) -> None:
    write(tmp_path)
    data = overlay(name, tmp_path, size=6)
    data.mode = data.evaluation = "episodes"
    batch = next(iter(data.train_dataloader()))

    assert all(len(e.support) >= 1 and len(e.query) >= 1 for e in batch)
    assert [next(iter(loader)).episodes[0].domain for loader in data.test_dataloader()] == list(
        range(len(data.domain_names))
    )
