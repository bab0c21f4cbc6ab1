"""Parquet tables of images, as the Hugging Face hub keeps them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import extra
from PIL import Image

from utils.commands.prepare import main as prepare
from utils.data import extras, tables
from utils.data.sources import load_source

pyarrow = extra("pyarrow")
parquet = extra("pyarrow.parquet")
NAMES = ["Mild_Demented", "Moderate_Demented", "Non_Demented", "Very_Mild_Demented"]


def _png(seed: int) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24), dtype=np.uint8)).save(target, "PNG")
    return target.getvalue()


def _table(path: Path, rows: list[tuple[Any, Any]], *, names: list[str] | None = NAMES) -> Path:
    """Rows of image and label, as the hub writes them."""
    data = pyarrow.table({"image": [row[0] for row in rows], "label": [row[1] for row in rows]})
    if names:
        told = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
        data = data.replace_schema_metadata({"huggingface": json.dumps(told)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(data, path)
    return path


def _rows(n: int, start: int = 0) -> list[tuple[dict, int]]:
    return [({"bytes": _png(number), "path": None}, number % 4) for number in range(start, start + n)]


def test_a_table_reads_as_its_images_with_the_names_of_its_classes(tmp_path: Path) -> None:
    raw = load_source(_table(tmp_path / "train-00000-of-00001.parquet", _rows(12)))
    assert list(raw.classes) == ["Non", "VeryMild", "Mild", "Moderate"] and len(raw) == 12
    expected = np.asarray(Image.open(io.BytesIO(_png(2))))
    place = next(index for index, path in enumerate(raw.paths) if "000002" in path)
    assert np.array_equal(raw.pixels[place], expected) and raw.classes[raw.labels[place]] == "Non"


def test_a_folder_of_tables_keeps_its_train_and_test(tmp_path: Path) -> None:
    _table(tmp_path / "data" / "train-00000-of-00002.parquet", _rows(8))
    _table(tmp_path / "data" / "train-00001-of-00002.parquet", _rows(8, start=8))
    _table(tmp_path / "data" / "test-00000-of-00001.parquet", _rows(4, start=16))
    (tmp_path / "README.md").write_text("a card")
    raw = load_source(tmp_path)
    assert sorted(raw.folders) == ["test"] * 4 + ["train"] * 16 and len(raw) == 20


def test_names_of_images_are_kept_for_they_may_name_the_patient(tmp_path: Path, capsys) -> None:
    rows = []
    for person in range(24):
        for level in (100, 101):
            name = f"OAS1_{person:04d}_MR1_mpr-1_{level}.png"
            rows.append(({"bytes": _png(100 * person + level), "path": f"some/where/{name}"}, person % 4))
    path = _table(tmp_path / "oasis.parquet", rows)
    assert prepare(["--source", str(path), "--out", str(tmp_path / "data")]) == 0
    manifest = (tmp_path / "data" / "manifest.csv").read_text()
    assert "OAS1_0003_MR1_mpr-1_101.png" in manifest and "24 patients" in capsys.readouterr().out
    doubled = [({"bytes": _png(number), "path": "slice.png"}, number % 4) for number in range(8)]
    assert len(load_source(_table(tmp_path / "doubled.parquet", doubled))) == 8


def test_plain_bytes_and_words_as_labels_do_as_well(tmp_path: Path) -> None:
    rows = [(_png(number), "CN" if number % 2 else "AD") for number in range(6)]
    raw = load_source(_table(tmp_path / "plain.parquet", rows, names=None))
    assert list(raw.classes) == ["CN", "AD"] and len(raw) == 6


@pytest.mark.parametrize(
    ("rows", "names", "said"),
    [
        ([({"bytes": None, "path": "x.png"}, 0)], NAMES, "row 0 has no image"),
        ([({"bytes": _png(0), "path": None}, None), *_rows(1)], NAMES, "row 0 has no label"),
        ([({"bytes": _png(0), "path": None}, 7)], NAMES, "label 7, and tells the names of 0 to 3 only"),
        ([(_png(0), "../up")], None, "can be no folder's name"),
        ([(_png(0), ".hidden")], None, "can be no folder's name"),
        ([(1.5, 0)], None, "one column of image bytes"),
    ],
)
def test_what_a_table_lacks_is_named(tmp_path: Path, rows: list, names: list[str] | None, said: str) -> None:
    path = _table(tmp_path / "odd.parquet", rows, names=names)
    with pytest.raises(ValueError, match=said) as refused:
        load_source(path)
    assert str(path) in str(refused.value) and not list(tmp_path.glob("up*"))


def test_a_damaged_table_and_too_many_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cut.parquet").write_bytes(_table(tmp_path / "whole.parquet", _rows(4)).read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut.parquet is not a readable Parquet table"):
        load_source(tmp_path / "cut.parquet")
    monkeypatch.setattr(tables, "LARGEST_BYTES", 500)
    with pytest.raises(ValueError, match="more than 500 bytes of images"):
        load_source(tmp_path / "whole.parquet")


def test_without_pyarrow_the_command_says_what_to_install(tmp_path: Path, monkeypatch, capsys) -> None:
    def without(name: str) -> Any:
        raise ModuleNotFoundError(name)

    path = _table(tmp_path / "a.parquet", _rows(4))
    monkeypatch.setattr(extras, "import_module", without)
    assert prepare(["--source", str(path), "--out", str(tmp_path / "data")]) == 1
    assert "pip install -r env/requirements-scans.txt" in capsys.readouterr().err
