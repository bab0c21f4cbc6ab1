"""Ids of patients as people write them: several spellings, visits, entries that name nobody, tables of any program."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.commands.prepare import main
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject, split_and_save
from utils.data.raw_images import RawImages
from utils.data.sets import load_splits, patients_verified, protocol_name
from utils.data.sources import load_source
from utils.data.subject_ids import find_ids, read_subjects_csv, same_person, subjects_of_table
from utils.data.text_tables import read_text_table


@pytest.mark.parametrize(
    "written",
    [
        ("7", "007", "7.0", " 07 "),
        ("PTa", "Pta", "PTA"),
        ("sub-07", "sub-7", "SUB-007"),
        ("002_S_0295", "2_S_295"),
        ("-1", "-1.0"),
        ("Jos\u00e9_1", "Jose\u0301_1"),  # a letter and its accent as one sign, and as two
    ],
)
def test_spellings_of_one_id_are_one_person(written: tuple[str, ...]) -> None:
    assert len({same_person(text) for text in written}) == 1


@pytest.mark.parametrize("apart", [("7", "70"), ("p1", "p10"), ("0", "1"), ("a0b1", "a0b10"), ("1.05", "1.5")])
def test_other_ids_stay_others(apart: tuple[str, ...]) -> None:
    assert len({same_person(text) for text in apart}) == len(apart)


def _table(folder: Path, people: list[str]) -> tuple[Path, list[str]]:
    images = [f"Non/{number}.png" for number in range(len(people))]
    rows = "".join(f"{image},{who}\n" for image, who in zip(images, people))
    (folder / "who.csv").write_text(f"path,subject\n{rows}")
    return folder / "who.csv", images


def test_a_table_that_writes_an_id_in_two_ways_names_one_person_and_it_is_said(tmp_path: Path) -> None:
    named = subjects_of_table(*_table(tmp_path, ["007", "7", "7.0", "8", "Anna", "anna", "-1"]))
    assert named.subject.tolist()[:3] == [named.subject[0]] * 3 and named.subject[4] == named.subject[5]
    assert len(set(named.subject.tolist())) == 4 and named.subject[6] == -1
    assert "2 patients are written in several ways, such as 007 and 7 and 7.0" in " ".join(named.notes)
    assert not subjects_of_table(*_table(tmp_path, ["a", "a", "b"])).notes


def test_ids_without_spellings_keep_their_numbers(tmp_path: Path) -> None:
    """The order decides which patients a seed draws; it is that of the names as they are written."""
    assert read_subjects_csv(*_table(tmp_path, ["02", "10", "3"])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("entry", ["NA", "nan", "unknown", "None", "?", " "])
def test_an_entry_that_names_nobody_is_no_person(tmp_path: Path, entry: str) -> None:
    with pytest.raises(ValueError, match="names no patient for 2 images.*write -1"):
        read_subjects_csv(*_table(tmp_path, ["a", entry, entry]))


@pytest.mark.parametrize(
    "paths",
    [
        ["sub-07_ses-1_1", "sub-7_ses-2_1", "sub-08_1", "sub-8_2"],
        ["patient_007/1", "Patient7/1", "patient-8/1", "PATIENT_08/2"],
    ],
)
def test_names_that_write_an_id_in_two_ways_name_one_person(paths: list[str]) -> None:
    named = find_ids([f"Non/{path}.png" for path in paths], [0] * 4)
    assert named and named.subject.tolist() == [0, 0, 1, 1]
    assert "written in several ways" in " ".join(named.notes)


@pytest.mark.parametrize("visit", ["v{}", "visit{}", "ses-{}", "timepoint_{}", "2019050{}"])
def test_folders_of_visits_are_one_patient(visit: str) -> None:
    paths = [f"{'AD' if who > 2 else 'CN'}/P{who:03d}_{visit.format(k)}/1.png" for who in range(6) for k in (1, 2)]
    named = find_ids(paths, [int(path.startswith("AD")) for path in paths], {"AD", "CN"})
    assert named and named.subject.tolist() == np.repeat(np.arange(6), 2).tolist()
    assert "12 folders are visits of 6 patients, by names such as P000_" in " ".join(named.notes)


@pytest.mark.parametrize("folder", ["slice_{}", "visit{}", "level-{}", "batch{}", "v{}"])
def test_folders_of_slices_and_visits_are_nobody(folder: str) -> None:
    paths = [f"{name}/{folder.format(60 + k)}/x{k}{name}.png" for name in ("AD", "CN") for k in range(9)]
    assert find_ids(paths, [int(path.startswith("CN")) for path in paths], {"AD", "CN"}) is None


# --- a table is asked what its pixels say


def _labelled(folder: Path, raw: RawImages, subject: list[str]) -> Path:
    folder.mkdir()
    for number, image in enumerate(raw.pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    rows = "".join(f"{n}.png,{raw.classes[y]},{who}\n" for n, (y, who) in enumerate(zip(raw.labels, subject)))
    (folder / "labels.csv").write_text(f"path,label,subject_id\n{rows}")
    return folder


@pytest.fixture(scope="module")
def heads() -> RawImages:
    return make_phantoms(PhantomConfig(n_subjects=12, n_levels=16, seed=5))


@pytest.mark.slow
def test_a_column_that_numbers_the_images_is_noticed_and_the_doubt_goes_into_the_record(
    heads: RawImages, tmp_path: Path
) -> None:
    raw = load_source(_labelled(tmp_path / "set", heads, [f"im{n:03d}" for n in range(len(heads))]))
    found = group_by_subject(raw)
    said = " ".join(found.notes)
    assert "192 of 192 patients have a single image each" in said
    assert "Pixels disagree with the table labels.csv" in said
    split_and_save(raw, found, out=tmp_path / "out")
    splits = load_splits(tmp_path / "out")
    assert not patients_verified(splits.info) and "patients unverified" in protocol_name(splits.info)
    with pytest.raises(ValueError, match="--subject-pattern is for ids in names; here the table labels.csv"):
        group_by_subject(raw, subject_pattern=r"im(\d)")


@pytest.mark.slow
def test_the_right_column_is_believed(heads: RawImages, tmp_path: Path) -> None:
    raw = load_source(_labelled(tmp_path / "set", heads, [f"p{n // 16}" for n in range(len(heads))]))
    found = group_by_subject(raw)
    assert found.count == 12 and found.facts()["verified"] and found.origin == "the table labels.csv"
    assert not [note for note in found.notes if "disagree" in note]


# --- tables of any program


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_encodings_of_spreadsheets(tmp_path: Path, separator: str, encoding: str) -> None:
    rows = [["path ", "label", "subject"], ["a.png", "Ä", "1"], ["b.png", "", "2"]]
    (tmp_path / "t.csv").write_text("\n".join(separator.join(row) for row in rows), encoding=encoding)
    table = read_text_table(tmp_path / "t.csv")
    assert list(table.columns) == ["path", "label", "subject"] and table.values.tolist() == rows[1:]


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\x00\xff\x00")
    for place, said in (("none.csv", "is not there"), (".", "is a folder"), ("binary.csv", "is not a readable CSV")):
        with pytest.raises(ValueError, match=said):
            read_text_table(tmp_path / place)
    (tmp_path / "no.csv").write_text("name;kind\na;b\n")
    with pytest.raises(ValueError, match="no table of images and classes.*has name, kind"):
        load_source(tmp_path / "no.csv")


def test_images_without_a_row_are_counted(heads: RawImages, tmp_path: Path) -> None:
    chosen = slice(0, None, 8)
    few = replace(heads, pixels=heads.pixels[chosen], labels=heads.labels[chosen])
    folder = _labelled(tmp_path / "set", few, [f"p{n}" for n in range(24)])
    lines = (folder / "labels.csv").read_text().splitlines()
    (folder / "labels.csv").write_text("\n".join(lines[:-5]))
    raw = load_source(folder)
    assert len(raw) == 19 and any("5 images in" in note and "stand in no row" in note for note in raw.notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--subjects", "nowhere.csv"], "nowhere.csv is not there"),
        (["--subject-pattern", "("], "no regular expression"),
        (["--subject-pattern", ""], "--subject-pattern is empty"),
        (["--seed", "99999999999"], "--seed must be a whole number from 0 to 4294967295"),
        (["--label-column", "dx"], "--label-column: for whole heads"),
        (["--seed", "1.5"], "--seed takes a whole number, not 1.5"),
        (["--size=64.5"], "--size takes a whole number, not 64.5"),
        (["--config", "CONFIG"], "options.yaml: seed takes a whole number, not 1.5"),
        (["--out", "SET"], "is the source itself; name another folder"),
    ],
)
def test_options_that_cannot_be_are_refused_before_images_are_decoded(
    words: list[str], said: str, heads: RawImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("AD", "CN")):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(heads.pixels[number]).save(tmp_path / "set" / name / "a.png")
    (tmp_path / "options.yaml").write_text("seed: 1.5\nsize: 64")
    real = {"CONFIG": str(tmp_path / "options.yaml"), "SET": str(tmp_path / "set")}
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    assert main(["--source", str(tmp_path / "set"), *out, *(real.get(word, word) for word in words)]) == 1
    assert said in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


def test_a_file_where_the_sets_should_go_is_said_before_any_image_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert main(["--source", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 1
    assert "choose another folder" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"
