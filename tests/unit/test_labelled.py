"""Images whose classes stand in a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data.preparation import group_by_subject
from utils.data.sources import load_source


def _write(folder: Path, table: str, *names: str, name: str = "labels.csv") -> Path:
    for seed, image in enumerate(names):
        target = folder / image
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20), dtype=np.uint8)).save(target)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(table)
    return folder


def test_names_alone_and_windows_paths_find_their_images(tmp_path: Path) -> None:
    table = "image,label\na.png,CN\nimages\\b.png,AD\n./images/c.png,AD\nd,CN\n"
    source = _write(tmp_path / "d", table, "images/a.png", "images/b.png", "images/c.png", "images/d.png")
    for given in (source, source / "labels.csv"):
        raw = load_source(given)
        assert raw.classes == ("CN", "AD")
        told = {path.split("/")[-1]: raw.classes[label] for path, label in zip(raw.paths, raw.labels)}
        assert told == {"a.png": "CN", "b.png": "AD", "c.png": "AD", "d.png": "CN"}
        assert np.array_equal(
            raw.pixels[raw.paths.index("AD/images/b.png")], np.asarray(Image.open(source / "images/b.png"))
        )
        assert "The classes stand in the table labels.csv." in raw.notes and raw.subjects is None


def test_patients_of_the_table_are_kept(tmp_path: Path) -> None:
    rows = [f"images/{k}.png,{('CN', 'AD')[k // 2 % 2]},p{k // 2}" for k in range(8)]
    images = [f"images/{k}.png" for k in range(8)]
    source = _write(tmp_path / "d", "path,diagnosis,patient\n" + "\n".join(rows), *images)
    raw = load_source(source)
    patients = group_by_subject(raw)
    numbers = {path.split("/")[-1]: int(who) for path, who in zip(raw.paths, patients.subject)}
    assert (
        all(numbers[f"{k}.png"] == numbers[f"{k + 1}.png"] for k in range(0, 8, 2)) and len(set(numbers.values())) == 4
    )


@pytest.mark.parametrize("root", ["/home/somebody/set", "C:\\\\data\\\\set", "//server/share/set"])
def test_whole_paths_of_another_machine_count_from_the_root_on(root: str, tmp_path: Path) -> None:
    turn = "\\" if "\\" in root else "/"
    rows = [
        f"{root}{turn}images{turn}{name}.png,{label}" for name, label in (("a", "CN"), ("b", "AD"), ("twice", "AD"))
    ]
    source = _write(
        tmp_path / "d",
        "\n".join(["path,label", *rows]),
        "images/a.png",
        "images/b.png",
        "images/twice.png",
        "images/old/twice.png",
    )
    raw = load_source(source)
    assert sorted(raw.paths) == ["AD/images/b.png", "AD/images/twice.png", "CN/images/a.png"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,label\na.png,CN\nz.png,AD\n", "labels.csv, line 3: the image z.png is not there"),
        ("image,label\na.png,CN\na.png,AD\n", "line 3: a.png is of CN"),
        ("image,label\na.png,CN\nb.png,\n", "line 3: has the label ''"),
        ("image,label\na.png,CN\nb.png,../x\n", "line 3: has the label '../x'"),
        ("image,label\na.png,CN\n../out.png,AD\n", "line 3: the image ../out.png lies outside"),
        ("image,label\na.png,CN\n/etc/x.png,AD\n", "line 3: the image /etc/x.png lies outside"),
        ("image,label,subject\na.png,CN,p1\nb.png,AD,\n", "line 3: b.png has no patient"),
        ("image,label\na.png,CN\ntwice.png,AD\n", "line 3: the image twice.png could be"),
        ("image,label\na.png,CN\nb.png,CN\n", "names one class only"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_line(table: str, message: str, tmp_path: Path) -> None:
    source = _write(tmp_path / "d", table, "images/a.png", "images/b.png", "x/twice.png", "y/twice.png")
    # two folders of images are no classes where images lie beside them, too
    _write(source, table, "loose.png")
    with pytest.raises(ValueError, match=message) as raised:
        load_source(source)
    assert str(tmp_path) in str(raised.value)


def test_patients_are_kept_whatever_the_columns_and_the_separator_are(tmp_path: Path) -> None:
    table = "image_id\tdx\tptid\n" + "".join(f"{k}\t{('CN', 'AD')[k % 2]}\t{k // 2 or -1}\n" for k in range(6))
    raw = load_source(_write(tmp_path / "d", table, *(f"images/{k}.png" for k in range(6)), name="all.tsv"))
    told = {path.split("/")[-1]: int(who) for path, who in zip(raw.paths, raw.subjects)}
    assert told["0.png"] == told["1.png"] == -1 and told["2.png"] == told["3.png"] != told["4.png"] == told["5.png"]


def test_two_tables_are_one_too_many_and_class_folders_need_none(tmp_path: Path) -> None:
    source = _write(tmp_path / "d", "image,label\na.png,CN\n", "images/a.png")
    _write(source, "image,label\na.png,CN\n", name="more.csv")
    with pytest.raises(ValueError, match="two tables of paths and labels, labels.csv and more.csv"):
        load_source(source)
    folders = _write(tmp_path / "c", "path,label\nx.png,AD\n", "CN/a.png", "AD/b.png")
    assert load_source(folders).paths == ["AD/b.png", "CN/a.png"]
