"""What somebody may ask about: pictures, folders, archives."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data import cases
from utils.data.cases import Case, Reading, read_cases

READING = Reading(shape=(32, 32))


def _picture(path: Path, seed: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)).save(path)
    return path


def _read(source: Path | str, reading: Reading = READING) -> list[Case]:
    return list(read_cases(source, reading))


def test_one_picture_is_one_slice_with_its_own_pixels(tmp_path: Path) -> None:
    path = _picture(tmp_path / "mine.png")
    (case,) = _read(path)
    assert (case.name, case.files, case.whole, case.notes) == ("mine", ["mine.png"], False, [])
    assert np.array_equal(case.images[0, 0].numpy(), np.asarray(Image.open(path)))


@pytest.mark.parametrize(
    ("here", "missing", "shown"),
    [(True, "", True), (True, "deepbet", False), (True, "nibabel", False), (False, "", False)],
)
def test_who_names_no_scan_sees_a_head_where_it_can_be_read(
    here: bool, missing: str, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = tmp_path / "head.nii.gz"
    if here:
        head.touch()
    monkeypatch.setattr(cases, "HEAD", head)
    monkeypatch.setattr(cases, "find_spec", lambda name: name != missing or None)
    assert cases.example_scan() == (str(head) if shown else "phantom")


def test_each_picture_of_a_folder_is_a_case_and_junk_is_none(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "deep/c.bmp", ".hidden.png"):
        _picture(tmp_path / name)
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    said: list[str] = []
    assert [case.name for case in read_cases(tmp_path, READING, say=said.append)] == ["a", "b", "deep/c"]
    assert said == ["passed over: 1 without a scan, such as notes.txt"]


def test_names_of_patients_put_their_slices_together_in_order(tmp_path: Path) -> None:
    for subject in ("OAS1_0001_MR1", "OAS1_0002_MR1"):
        for level in (2, 10, 1):
            _picture(tmp_path / f"{subject}_mpr-1_{level}.png", seed=level)
    cases = _read(tmp_path)
    assert [case.whole for case in cases] == [True, True]
    assert cases[0].files == [f"OAS1_0001_MR1_mpr-1_{level}.png" for level in (1, 2, 10)]


def test_together_makes_one_patient_of_a_folder(tmp_path: Path) -> None:
    for level in (10, 9, 1):
        _picture(tmp_path / "mine" / f"s{level}.png", seed=level)
    (case,) = _read(tmp_path / "mine", Reading(shape=(32, 32), together=True))
    assert case.whole and case.name == "mine" and case.files == ["s1.png", "s9.png", "s10.png"]


def test_a_broken_picture_stops_itself_and_not_the_folder(tmp_path: Path) -> None:
    _picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    bad, good = _read(tmp_path)
    assert "bad.png is not a readable picture" in bad.problem and len(bad.images) == 0 and not good.problem
    with pytest.raises(ValueError, match=r"bad\.png is not a readable picture"):
        _read(tmp_path / "bad.png")


def test_colour_and_another_shape_are_said(tmp_path: Path) -> None:
    pixels = np.zeros((40, 20, 3), dtype=np.uint8)
    pixels[..., 0] = 200
    Image.fromarray(pixels).save(tmp_path / "red.png")
    (padded,) = _read(tmp_path / "red.png")
    assert any("colours" in note for note in padded.notes) and any("black beside it" in note for note in padded.notes)
    assert padded.images.shape == (1, 1, 32, 32) and padded.images[..., 0].max() == 0
    (stretched,) = _read(tmp_path / "red.png", Reading(shape=(32, 32), fit="stretch"))
    assert stretched.images.min() > 0


def test_an_archive_is_read_like_its_folder(tmp_path: Path) -> None:
    _picture(tmp_path / "x" / "one.png")
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as archive:
        archive.write(tmp_path / "x" / "one.png", "inside/one.png")
    assert [case.name for case in _read(tmp_path / "scans.zip")] == ["inside/one"]


def test_the_phantom_is_called_so() -> None:
    (case,) = _read("phantom")
    assert case.whole and len(case.images) == 8 and "not a brain" in case.notes[0]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "letter.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"letter\.pdf is no picture"):
        _read(tmp_path / "letter.pdf")
    with pytest.raises(ValueError, match="holds no slice, no volume and no DICOM file"):
        _read(tmp_path)
    with pytest.raises(FileNotFoundError, match="or the word phantom"):
        _read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="fit must be one of pad, stretch"):
        Reading(shape=(32, 32), fit="crop")


@pytest.mark.parametrize(("side", "doubt"), [(16, True), (32, False), (64, False)])
def test_too_few_pixels_are_said(side: int, doubt: bool, tmp_path: Path) -> None:
    (case,) = _read(_picture(tmp_path / "small.png", size=(side, side)), Reading(shape=(40, 40)))
    assert any("less than half of the detail" in note for note in case.notes) == doubt
