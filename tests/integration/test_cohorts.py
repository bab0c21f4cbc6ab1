"""Cohorts of whole heads: class folders, BIDS, OASIS-1's discs, DICOM; whose they are, and in which class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import extra

nibabel = extra("nibabel")

from utils.commands.prepare import main as prepare  # noqa: E402 - an extra
from utils.core.paths import read_json  # noqa: E402
from utils.data.scans import cutting  # noqa: E402
from utils.data.scans.cohort import ScanOptions, find_cohort  # noqa: E402
from utils.data.scans.standard import PoorScan, Standard  # noqa: E402
from utils.data.scans.volume import Volume  # noqa: E402
from utils.data.sets import load_splits  # noqa: E402

COLIN = Path("/usr/share/mricron/templates/ch2bet.nii.gz")


def _head(path: Path, seed: int, *, analyze: bool = False) -> Path:
    voxels = np.random.default_rng(seed).random((40, 44, 36), dtype=np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = nibabel.AnalyzeImage if analyze else nibabel.Nifti1Image
    nibabel.save(kind(voxels, np.diag([4.0, 4, 4, 1])), path)
    return path


@pytest.fixture
def cut_quickly(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Slices of 16 pixels at once, instead of a registration of half a minute a head; which heads were cut."""
    done: list[str] = []

    def quick(head: Volume, *, cut: Any, **_: Any) -> Standard:
        done.append(head.name)
        if "bad" in head.name:
            raise PoorScan(f"{head.name} does not lie well on the template", {"brain": np.zeros((20, 20))})
        values = np.stack([head.voxels[:16, :16, level] for level in range(cut.count)])
        return Standard(np.uint8(255 * values), cut.levels, {"brain_ml": 1500.0}, [], {"brain": values[0]})

    monkeypatch.setattr(cutting, "standardise", quick)
    return done


def _bids(root: Path, rows: dict[str, str], *, visits: int = 1, column: str = "diagnosis") -> Path:
    for number, name in enumerate(rows):
        for visit in range(visits):
            session = f"ses-{visit + 1}/" if visits > 1 else ""
            label = f"_ses-{visit + 1}" if visits > 1 else ""
            _head(root / name / f"{session}anat/{name}{label}_T1w.nii.gz", 10 * number + visit)
    table = pd.DataFrame({"participant_id": list(rows), column: list(rows.values())})
    table.to_csv(root / "participants.tsv", sep="\t", index=False)
    return root


def test_a_bids_tree_with_two_visits_of_each_person(tmp_path: Path, cut_quickly: list[str], capsys) -> None:
    rows = {f"sub-{k:02d}": ("CN", "AD")[k % 2] for k in range(12)} | {"sub-98": "n/a"}
    source, out = _bids(tmp_path / "bids", rows, visits=2), tmp_path / "data"
    assert prepare(["--source", str(source), "--out", str(out), "--slices", "3"]) == 0
    said = capsys.readouterr().out
    assert "24 scans of BIDS were cut" in said and "2" in said and "sub-98" in said and "without a class" in said
    splits = load_splits(out)
    everyone = splits.everyone
    assert splits.classes == ["CN", "AD"] and len(everyone) == 24 * 3 and len(everyone.subjects.unique()) == 12
    # both visits of a person lie on one side
    sides = [set(part.subjects.tolist()) for _, part in splits]
    assert not sides[0] & sides[2] and not sides[0] & sides[1]
    assert splits.info["scans"] == {"modality": "T1", "plane": "axial", "slices": 3}
    facts = read_json(out / "scans" / "facts" / "sub-00_ses-1_T1w.json")
    assert facts["subject"] == "sub-00" and facts["label"] == "CN" and facts["brain_ml"] == 1500
    assert (out / "scans" / "steps" / "sub-00_ses-1_T1w.png").is_file()


def test_what_is_cut_is_not_cut_again_unless_asked_otherwise(tmp_path: Path, cut_quickly: list[str]) -> None:
    source = _bids(tmp_path / "bids", {f"sub-{k:02d}": ("CN", "AD")[k % 2] for k in range(8)})
    words = ["--source", str(source), "--out", str(tmp_path / "data"), "--slices"]
    assert prepare([*words, "3"]) == 0 and len(cut_quickly) == 8
    assert prepare([*words, "3"]) == 0 and len(cut_quickly) == 8
    _head(source / "sub-03" / "anat" / "sub-03_T1w.nii.gz", 77)
    assert prepare([*words, "3"]) == 0 and len(cut_quickly) == 9
    assert prepare([*words, "2"]) == 0 and len(cut_quickly) == 17
    assert len(load_splits(tmp_path / "data").everyone) == 16


def test_a_scan_that_cannot_be_used_is_left_out_by_name(tmp_path: Path, cut_quickly: list[str], capsys) -> None:
    rows = {f"sub-{k:02d}": ("CN", "AD")[k % 2] for k in range(10)} | {"sub-bad": "AD"}
    source, out = _bids(tmp_path / "bids", rows), tmp_path / "data"
    assert prepare(["--source", str(source), "--out", str(out), "--slices", "2"]) == 0
    assert "Left out: sub-bad_T1w.nii.gz does not lie well" in capsys.readouterr().out
    assert (out / "scans" / "steps" / "sub-bad_T1w.png").is_file()
    worse = _bids(tmp_path / "worse", {f"sub-bad{k}": ("CN", "AD")[k % 2] for k in range(4)})
    assert prepare(["--source", str(worse), "--out", str(tmp_path / "other")]) == 1
    assert "4 of 4 scans cannot be used; the first: sub-bad0_T1w.nii.gz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "words", "message"),
    [
        ("stage", [], "has no column diagnosis or dx or group"),
        ("stage", ["--label-column", "stages"], "has no column stages; name one of participant_id, stage"),
        (
            "stage",
            ["--label-column", "stage", "--label-map", "CN=Non"],
            "'AD' for 2 people, which --label-map",
        ),
        ("stage", ["--label-column", "stage", "--label-map", "CN"], "--label-map needs value=class"),
        ("diagnosis", ["--label-map", "CN=../out", "AD=AD"], "has the label '../out', which can be no folder's name"),
        ("diagnosis", ["--modality", "T2"], "_T2w.nii.gz of a person whose class"),
        ("diagnosis", ["--plane", "oblique"], "plane must be one of axial"),
        ("diagnosis", ["--slices", "0"], "at least one slice"),
    ],
)
def test_what_does_not_fit_is_refused(column: str, words: list[str], message: str, tmp_path: Path, capsys) -> None:
    source = _bids(tmp_path / "bids", {f"sub-{k:02d}": ("CN", "AD")[k % 2] for k in range(4)}, column=column)
    assert prepare(["--source", str(source), "--out", str(tmp_path / "data"), *words]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "data" / "manifest.csv").exists()


def test_a_person_with_two_rows_and_a_class_that_leaves_people_out(tmp_path: Path) -> None:
    source = _bids(tmp_path / "bids", {"sub-01": "0", "sub-02": "0.5", "sub-03": "9"}, column="cdr")
    own = find_cohort(source, ScanOptions(label_map=("0.0=Non", "0.5=VeryMild", "9=-")))
    assert own is not None
    assert {scan.subject: scan.label for scan in own.scans} == {"sub-01": "Non", "sub-02": "VeryMild"}
    assert "1 scans of people without a class were left out: sub-03" in own.notes[0]
    table = pd.read_csv(source / "participants.tsv", sep="\t", dtype=str)
    pd.concat([table, pd.DataFrame({"participant_id": ["sub-01"], "cdr": ["1"]})]).to_csv(
        source / "participants.tsv", sep="\t", index=False
    )
    with pytest.raises(ValueError, match="gives sub-01 two values of cdr"):
        find_cohort(source, ScanOptions())


def _oasis(root: Path, cdr: dict[str, str]) -> Path:
    for number, session in enumerate(cdr):
        _head(root / "disc1" / session / f"PROCESSED/MPRAGE/T88_111/{session}_t88_masked_gfc.img", number, analyze=True)
        _head(root / "disc1" / session / f"RAW/{session}_mpr-1_anon.img", number + 100, analyze=True)
    pd.DataFrame({"ID": list(cdr), "M/F": "F", "CDR": list(cdr.values())}).to_csv(
        root / "oasis_cross-sectional-5708aa0a98d82080.csv", index=False
    )
    return root


def test_oasis_discs_with_their_table(tmp_path: Path) -> None:
    cdr = {f"OAS1_{k:04d}_MR1": ("0", "0.5", "1", "2")[k % 4] for k in range(1, 9)} | {"OAS1_0009_MR1": ""}
    cdr["OAS1_0001_MR2"] = ""
    own = find_cohort(_oasis(tmp_path, cdr), ScanOptions())
    assert own is not None and own.kind == "OASIS-1" and len(own.scans) == 8
    assert {scan.label for scan in own.scans} == {"Non", "VeryMild", "Mild", "Moderate"}
    assert all(scan.stripping.stripped and scan.files[0].name.endswith("t88_masked_gfc.hdr") for scan in own.scans)
    assert own.scans[0].subject == "OAS1_0001" and "2 sessions without CDR were left out" in own.notes[0]
    (tmp_path / "oasis_cross-sectional-5708aa0a98d82080.csv").unlink()
    with pytest.raises(ValueError, match=r"but not its table \(oasis_cross-sectional….csv\) with CDR"):
        find_cohort(tmp_path, ScanOptions())


def test_class_folders_of_volumes_take_the_ids_in_their_names(tmp_path: Path, cut_quickly: list[str], capsys) -> None:
    for k in range(12):
        for visit in ("", "_m12"):
            _head(tmp_path / "in" / ("CN", "AD")[k % 2] / f"{k:03d}_S_{4000 + k}{visit}.nii.gz", k)
    out = tmp_path / "data"
    assert prepare(["--source", str(tmp_path / "in"), "--out", str(out), "--slices", "2"]) == 0
    assert "Patients by ADNI ids in the names" in capsys.readouterr().out
    assert len(load_splits(out).everyone.subjects.unique()) == 12


def test_volumes_without_ids_are_people_of_their_own_and_loose_ones_need_classes(tmp_path: Path) -> None:
    for k, name in enumerate(("alpha", "beta", "gamma", "delta")):
        _head(tmp_path / "in" / ("CN", "AD")[k % 2] / f"{name}.nii", k)
    own = find_cohort(tmp_path / "in", ScanOptions())
    assert own is not None and len({scan.subject for scan in own.scans}) == 4
    assert own.notes == ["No names tell the patients: each scan was taken for a person of its own."]
    _head(tmp_path / "loose" / "a.nii", 0)
    with pytest.raises(ValueError, match="holds volumes, but no class folders.*python -m utils predict"):
        find_cohort(tmp_path / "loose", ScanOptions())
    (tmp_path / "nothing").mkdir()
    assert find_cohort(tmp_path / "nothing", ScanOptions()) is None


@pytest.mark.skipif(not COLIN.is_file(), reason="needs Debian's mricron-data, a whole head")
def test_a_real_brain_in_an_oasis_tree(tmp_path: Path, capsys) -> None:
    """Two people made of one brain, stored as the discs store them, end to end; the second is a little larger."""
    extra("SimpleITK")
    image = nibabel.load(COLIN)
    voxels = np.asarray(image.dataobj)[::2, ::2, ::2, None].astype(np.int16)
    for number, size in ((1, 2.0), (2, 1.95)):
        session = f"OAS1_{number:04d}_MR1"
        target = tmp_path / "in" / session / f"PROCESSED/MPRAGE/T88_111/{session}_t88_masked_gfc.img"
        target.parent.mkdir(parents=True)
        nibabel.save(nibabel.AnalyzeImage(voxels, np.diag([size, size, size, 1])), target)
    table = pd.DataFrame({"ID": ["OAS1_0001_MR1", "OAS1_0002_MR1"], "CDR": ["0", "1"]})
    table.to_csv(tmp_path / "in" / "oasis_cross-sectional.csv", index=False)
    words = ["--source", str(tmp_path / "in"), "--out", str(tmp_path / "data"), "--split", "random", "--slices", "6"]
    assert prepare(words) == 0
    splits = load_splits(tmp_path / "data")
    assert splits.classes == ["Non", "Mild"] and len(splits.everyone) == 12
    for name in ("OAS1_0001_MR1", "OAS1_0002_MR1"):
        facts = read_json(tmp_path / "data" / "scans" / "facts" / f"{name}.json")
        assert facts["correlation"] > 0.93 and "left and right may be exchanged" in facts["notes"][0]
    stored = dict(zip(splits.everyone.paths, splits.everyone.images[:, 0].float().numpy()))
    both = [[stored[path] for path in sorted(stored) if path.startswith(name)] for name in ("Non", "Mild")]
    pairs = zip(*both)
    assert min(np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in pairs) > 0.97
