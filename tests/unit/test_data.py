from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_class_folders

from utils.commands.prepare import main
from utils.core.paths import atomic_write_all, read_json, write_json
from utils.data.preparation import prepare_dataset
from utils.data.sets import MANIFEST, check_no_leak, load_manifest, load_splits
from utils.data.subject_ids import read_subjects_csv

FILES = ("train_set.pt", "validation_set.pt", "test_set.pt", MANIFEST)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare_dataset("phantom", out=folder)
    return folder


@pytest.mark.slow
def test_second_run_is_identical(prepared: Path, tmp_path: Path, capsys) -> None:
    assert main(["--source", "phantom", "--split", "patient", "--out", str(tmp_path)]) == 0
    assert "saved to" in capsys.readouterr().out
    assert (tmp_path / MANIFEST).read_bytes() == (prepared / MANIFEST).read_bytes()
    for name in FILES[:3]:
        one, two = (torch.load(folder / name, weights_only=True) for folder in (prepared, tmp_path))
        assert one["info"] == two["info"] and torch.equal(one["images"], two["images"])


def test_sets_hold_plain_uint8_tensors_and_no_shared_patient(prepared: Path) -> None:
    splits = load_splits(prepared)
    for name, part in splits:
        content = torch.load(prepared / f"{name}_set.pt", weights_only=True)
        assert content["images"].dtype == torch.uint8 and content["images"].shape[1:] == (1, 128, 128)
        assert part.classes == ["Non", "VeryMild", "Mild", "Moderate"]
    patients = [set(part.subjects.tolist()) for _, part in splits]
    assert not patients[0] & patients[1] and not patients[0] & patients[2] and not patients[1] & patients[2]
    table = load_manifest(prepared / MANIFEST)
    assert list(table.columns) == ["path", "label", "subject", "slice", "synthetic", "split"] and len(table) == 512


@pytest.mark.slow
def test_seed_and_ratios_change_the_split(prepared: Path, tmp_path: Path) -> None:
    other = prepare_dataset("phantom", out=tmp_path, ratios=(0.5, 0.25, 0.25), seed=7)
    assert other.fingerprint != load_splits(prepared).fingerprint and len(other.test) == 128


def test_a_leak_is_refused_on_load(prepared: Path, tmp_path: Path) -> None:
    splits = load_splits(prepared)
    splits.test.subjects[0] = splits.train.subjects[0]
    with pytest.raises(ValueError, match="is in train and in test"):
        check_no_leak(splits)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "garbage", "edited", "foreign", "columns"])
def test_damaged_files_are_refused_with_what_to_do(prepared: Path, tmp_path: Path, damage: str) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((prepared / name).read_bytes())
    manifest = tmp_path / MANIFEST
    if damage == "missing":
        (tmp_path / "test_set.pt").unlink()
    elif damage == "garbage":
        manifest.write_bytes(b"\xff\xfe\x00garbage")
    elif damage == "edited":
        manifest.write_text(manifest.read_text().replace(",test", ",train", 1))
    elif damage == "columns":
        manifest.write_text("a,b\n1,2\n")
    else:
        prepare_dataset("phantom", out=tmp_path / "other", seed=5)
        (tmp_path / "other" / "test_set.pt").replace(tmp_path / "test_set.pt")
    with pytest.raises((ValueError, FileNotFoundError), match="python -m utils prepare"):
        load_splits(tmp_path)


def test_pickled_objects_are_never_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for name in FILES[:3]:
        torch.save(Evil(), tmp_path / name)
    with pytest.raises(ValueError, match="not a readable image set"):
        load_splits(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_every_side_is_checked_for_its_own_images_and_facts(prepared: Path, tmp_path: Path) -> None:
    splits = load_splits(prepared)
    splits.test.images[0] = splits.train.images[0]
    with pytest.raises(ValueError, match="another side holds too"):
        check_no_leak(splits)
    for key, value in (("info", {}), ("slices", None), ("labels", [0]), ("protocol", "random")):
        for name in FILES:
            (tmp_path / name).write_bytes((prepared / name).read_bytes())
        content = torch.load(tmp_path / "train_set.pt", weights_only=True)
        if key == "protocol":
            content["info"]["protocol"] = value
        else:
            content[key] = content["slices"] + 1 if value is None else value
        torch.save(content, tmp_path / "train_set.pt")
        with pytest.raises(ValueError, match="utils prepare"):
            load_splits(tmp_path)


def test_classes_that_are_numbers(tmp_path: Path) -> None:
    for patient in range(4):
        write_class_folders(tmp_path / "d", ("0", "1"), prefix=f"p{patient}_", seed=patient)
    prepare_dataset(tmp_path / "d", split="random", out=tmp_path / "out", ratios=(0.6, 0.2, 0.2))
    assert load_splits(tmp_path / "out").classes == ["0", "1"]


@pytest.mark.parametrize("rows", ["Non/a.png,1\nNon/a.png,2", "Non/a.png, ", "", "\x00\xff"])
def test_untidy_patient_tables_are_refused(tmp_path: Path, rows: str) -> None:
    (tmp_path / "who.csv").write_text(f"path,subject\n{rows}" if rows else "")
    with pytest.raises(ValueError, match=r"who\.csv"):
        read_subjects_csv(tmp_path / "who.csv", ["Non/a.png"])


def test_patient_ids_are_stripped_and_nobody_stays_nobody(tmp_path: Path) -> None:
    (tmp_path / "who.csv").write_text("path,subject\na,x\nb,x \nc,-1\n")
    found = read_subjects_csv(tmp_path / "who.csv", ["a", "b", "c"])
    assert found[0] == found[1] >= 0 and found[2] == -1


@pytest.mark.slow
def test_a_folder_in_the_way_leaves_everything_alone(prepared: Path, tmp_path: Path, capsys) -> None:
    for name in FILES[:3]:
        (tmp_path / name).write_bytes((prepared / name).read_bytes())
    (tmp_path / MANIFEST).mkdir()
    assert main(["--source", "phantom", "--seed", "5", "--out", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err
    assert all((tmp_path / name).read_bytes() == (prepared / name).read_bytes() for name in FILES[:3])


def test_all_files_are_written_or_none(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="unchanged"):
        atomic_write_all({first: lambda path: path.write_text("new"), second: fail})
    assert first.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.slow
def test_full_disk_leaves_saved_files_alone(prepared: Path, tmp_path: Path) -> None:
    """A file-size limit makes the kernel refuse the write, as a full disk does."""
    for name in FILES:
        (tmp_path / name).write_bytes((prepared / name).read_bytes())
    limit = 2**20
    result = subprocess.run(
        [sys.executable, "-m", "utils", "prepare", "--source", "phantom", "--seed", "9", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1 and "could not write" in result.stderr and "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)
    assert load_splits(tmp_path).fingerprint == load_splits(prepared).fingerprint


def test_bad_input_leaves_saved_files_alone(prepared: Path, class_folders: Path, capsys) -> None:
    before = {name: (prepared / name).read_bytes() for name in FILES}
    (class_folders / "Non_Demented" / "cut.png").write_bytes(b"\x89PNG")
    assert main(["--source", str(class_folders), "--out", str(prepared)]) == 1
    assert "cut.png" in capsys.readouterr().err
    assert {name: (prepared / name).read_bytes() for name in FILES} == before


def test_patients_from_a_csv(tmp_path: Path) -> None:
    for patient in range(5):
        write_class_folders(tmp_path / "d", ("Non", "Mild"), prefix=f"p{patient}_", seed=patient)
    names = sorted(path.relative_to(tmp_path / "d").as_posix() for path in (tmp_path / "d").rglob("*.png"))
    rows = [f"{name},{name[:-6]}" for name in names]
    (tmp_path / "short.csv").write_text("path,subject\n" + "\n".join(rows[:-1]))
    with pytest.raises(ValueError, match="names no patient for 1 images"):
        prepare_dataset(tmp_path / "d", out=tmp_path / "out", subjects_csv=tmp_path / "short.csv")
    (tmp_path / "who.csv").write_text("path,subject\n" + "\n".join(rows))
    found = prepare_dataset(tmp_path / "d", out=tmp_path / "out", subjects_csv=tmp_path / "who.csv")
    for _, part in found:
        owners = {path[:-6] for path in part.paths}
        assert len(owners) == len(part.subjects.unique()) and len(part) == 3 * len(owners)


def test_balanced_subset_spreads_over_patients(splits) -> None:
    part = splits.train.balanced_subset(len(splits.train.subjects.unique()))
    assert len(part.subjects.unique()) == len(part) and part.paths == splits.train.balanced_subset(len(part)).paths


def test_records_hold_a_list_of_numbers_on_one_line_and_every_other_value_as_it_was(tmp_path: Path) -> None:
    content = {"a": ["[\n 1,\n 2\n]", 1, [1, 2.5, -3e-9], [], [[1.5, 2], [3, 4]], [True, None, 1]], "b": {}}
    write_json(tmp_path / "record.json", content)
    assert read_json(tmp_path / "record.json") == content
    lines = (tmp_path / "record.json").read_text().splitlines()
    assert "    [1, 2.5, -3e-09]," in lines and "      [1.5, 2]," in lines
    with pytest.raises(ValueError):
        write_json(tmp_path / "record.json", [float("nan")])
    assert read_json(tmp_path / "record.json") == content
    (tmp_path / "record.json").write_text('{"loss": NaN}')
    with pytest.raises(ValueError, match=r"record.json is not readable JSON \(NaN is no number\)"):
        read_json(tmp_path / "record.json")
