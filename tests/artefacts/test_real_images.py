"""The two public data sets as published; runs where MRI_DATA_ROOT points at their archives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, extra
from sklearn.metrics import roc_auc_score

from benchmarks.whole_processes import WATCH
from utils.core.paths import file_digest, read_json
from utils.data.archives import DATA_SOURCES
from utils.data.preparation import group_by_subject, split_and_save, splits_in_memory
from utils.data.raw_images import RawImages
from utils.data.scans.standard import Stripping, correlation, standardise
from utils.data.scans.volume import read_volume
from utils.data.sets import load_splits
from utils.data.sources import load_source
from utils.data.subjects import Subjects
from utils.data.workspace import Workspace
from utils.evaluation.gate import ACCEPTED, GATE, REFUSED, TURNS, Gate
from utils.evaluation.leak_audit import audit_splits
from utils.evaluation.metrics import predict
from utils.experiments.atlas.bench import open_bench
from utils.experiments.atlas.chapters import CHAPTERS, read_chapter
from utils.experiments.spot_check import IMAGES, check
from utils.reporting.atlas import atlas_models, atlas_splits
from utils.training.checkpoints import read_record

COLIN = Path("/usr/share/mricron/templates")
#: Folders whose weights are part of the repository; what somebody trained for himself is his own affair.
PUBLISHED = sorted(
    Path(name).parent
    for name in subprocess.run(
        ["git", "ls-files", "*/weights.safetensors"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
)


@pytest.fixture(scope="module", params=sorted(DATA_SOURCES))
def real(request, mri_root: Path):
    return _loaded(mri_root / f"{request.param}.tar.xz")


@cache
def _loaded(archive: Path) -> tuple[RawImages, Subjects]:
    """Unpacking and grouping take half a minute; no test changes what they give."""
    raw = load_source(archive)
    return raw, group_by_subject(raw)


def test_patients_synthetic_images_and_copies(real) -> None:
    raw, subjects = real
    known = DATA_SOURCES[raw.name]
    usable = ~subjects.synthetic & ~subjects.duplicate
    assert len(raw) == known.n_images and subjects.synthetic.sum() == known.n_synthetic
    assert subjects.duplicate.sum() == known.n_duplicates and not subjects.notes
    assert (np.bincount(subjects.subject[usable]) == 32).all() and subjects.count == 200
    per_class = [len(np.unique(subjects.subject[usable & (raw.labels == label)])) for label in range(4)]
    assert per_class == [100, 70, 28, 2]


def test_patient_split_of_the_real_images(real) -> None:
    splits = splits_in_memory(*real, "patient")
    assert [len(part.subjects.unique()) for _, part in splits] == [120, 40, 40]
    assert [len(part) for _, part in splits] == [3840, 1280, 1280]


def test_leak_of_the_published_split(mri_root: Path) -> None:
    raw, subjects = _loaded(mri_root / "best_alzheimer_mri.tar.xz")
    published, patient = (splits_in_memory(raw, subjects, name) for name in ("published", "patient"))
    assert [len(part) for _, part in published] == [8192, 2048, 1279]
    leaky, clean = audit_splits(published, patient)
    recorded = read_json(ROOT / "assets" / "Dataset" / "leak_audit.json")["splits"]
    for found, record in zip((leaky, clean), recorded, strict=True):
        for name, value in found.as_dict().items():
            assert record[name] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-6)), name
    assert leaky.accuracy > 0.995 and 0.44 < clean.accuracy < 0.56
    assert leaky.same_patient > 0.97 and clean.same_patient == 0 and clean.max_correlation < 0.975


def test_command_line_and_its_memory(mri_root: Path, tmp_path: Path) -> None:
    source, peak = str(mri_root / "best_alzheimer_mri.tar.xz"), tmp_path / "peak"
    command = [
        sys.executable,
        "-m",
        "utils",
        "prepare",
        "--source",
        source,
        "--split",
        "patient",
        "--out",
        str(tmp_path),
    ]
    # a process between, for the peak of all children of this one would be that of some other test's
    watched = [sys.executable, "-c", WATCH, str(peak), *command]
    output = subprocess.run(watched, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "200 patients, 4937 synthetic images, 182 byte-identical copies" in output
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(peak.read_text()) * unit < 2 * 2**30
    assert len(load_splits(tmp_path).test) == 1280


@pytest.fixture(scope="module")
def prepared(mri_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    raw, subjects = _loaded(mri_root / "best_alzheimer_mri.tar.xz")

    @cache
    def prepare(protocol: str) -> Path:
        folder = tmp_path_factory.mktemp(protocol)
        split_and_save(raw, subjects, split=protocol, out=folder)
        return folder

    return prepare


@pytest.mark.parametrize("folder", PUBLISHED, ids=str)
def test_published_weights_stand_and_fall_as_recorded(folder: Path, prepared: Callable[[str], Path]) -> None:
    record = read_record(ROOT / folder)
    assert len(record.spot_check.paths) == IMAGES
    assert f"of {IMAGES} images as recorded" in check(ROOT / folder, prepared(record.data.protocol))


def test_the_atlas_is_of_the_committed_models_and_they_err_as_recorded(prepared: Callable[[str], Path]) -> None:
    workspace = Workspace.open(str(ROOT), data_dir=str(prepared("patient")))
    splits, folder = atlas_splits(workspace), ROOT / "assets" / "Atlas"
    bench = open_bench(atlas_models(workspace, "EfficientNetB0", "EfficientNetB0_atk", splits), splits)
    paths = sorted(folder.glob("*.json"))
    assert len(paths) == len(CHAPTERS)
    for path in paths:
        told, own = read_json(path)["facts"], bench.facts(path.stem)
        assert told == json.loads(json.dumps(own)), path
    found, ill = read_chapter(folder, "targets")[1], bench.questions().labels == 1
    for name, direction in found.directions.items():
        said = predict(bench.verdict(name), bench.questions()).argmax(1)
        right = said == bench.questions().labels
        # another processor may decide one patient on the edge otherwise
        assert abs(int((right & ill).sum()) - direction.hidden[0].of) <= 1
        assert abs(int((right & ~ill).sum()) - direction.invented[0].of) <= 1


def test_the_committed_gate_knows_other_patients_and_nothing_foreign(prepared: Callable[[str], Path]) -> None:
    folders = [*(folder for folder in PUBLISHED if folder.parts[0] == "checkpoints"), Path("checkpoints/Ensemble")]
    gates = [Gate.load(ROOT / folder) for folder in folders]
    # one file for all: it is the data's, and a clone holds its content once
    assert len({file_digest(ROOT / folder / GATE) for folder in folders}) == 1
    splits, gate = load_splits(prepared("patient")), gates[0]
    test = splits.test
    assert {own.fingerprint for own in gates} == {splits.fingerprint} and gate.shape == test.images.shape[-2:]
    own = gate.distances(test.pixels(slice(0, len(test))))
    medians = [float(own[test.subjects == who].median()) for who in test.subjects.unique()]
    assert np.mean([gate.verdict(value) == REFUSED for value in medians]) <= 0.05
    few = test.pixels(slice(0, len(test), 8))
    foreign = {name: turn(few) for name, turn in TURNS.items()} | {"noise": torch.rand(100, 1, 128, 128)}
    for name, images in foreign.items():
        distances = gate.distances(images)
        area = roc_auc_score(np.r_[np.zeros(len(own)), np.ones(len(distances))], np.r_[own, distances])
        assert area >= 0.97, name


@pytest.mark.skipif(not COLIN.is_dir(), reason="needs Debian's mricron-data, a whole head")
def test_slices_of_a_head_look_like_the_public_ones(prepared: Callable[[str], Path]) -> None:
    """The stripped head by .92 and more at every level, the whole one by .88, and turned upside down by less."""
    for module in ("nibabel", "SimpleITK", "deepbet"):
        extra(module)
    train = load_splits(prepared("patient")).train
    means = [train.images[train.slices == level, 0].float().mean(0).numpy() for level in range(32)]
    stripped = standardise(read_volume(COLIN / "ch2bet.nii.gz"), stripping=Stripping(stripped=True)).slices
    whole = standardise(read_volume(COLIN / "ch2.nii.gz")).slices
    assert min(correlation(one, mean) for one, mean in zip(stripped, means)) >= 0.92
    assert min(correlation(one, mean) for one, mean in zip(whole, means)) >= 0.88
    assert max(correlation(one[::-1], mean) for one, mean in zip(stripped, means)) < 0.93
    gate = Gate.load(ROOT / "checkpoints" / "ResNet34")
    assert gate.verdict(float(gate.distances(torch.from_numpy(whole)[:, None] / 255).max())) == ACCEPTED


def test_slices_missing_between_cost_the_patient_split(real, tmp_path: Path) -> None:
    raw, subjects = real
    kept = np.flatnonzero((subjects.slice % 2 == 0) & ~subjects.synthetic & ~subjects.duplicate)
    thinned = replace(
        raw,
        pixels=raw.pixels[kept],
        labels=raw.labels[kept],
        paths=[raw.paths[i] for i in kept],
        folders=[raw.folders[i] for i in kept],
        name="thinned",
    )
    found = group_by_subject(thinned)
    assert found.count > 2000 and found.evidence.nearest > 0.9 > found.evidence.expected + 0.3
    with pytest.raises(ValueError, match="no patient split.*recognises people on both sides"):
        split_and_save(thinned, found, out=tmp_path)


def test_ids_in_the_names_are_the_patients_of_the_pixels(real) -> None:
    raw, subjects = real
    kept = np.flatnonzero(~subjects.synthetic & ~subjects.duplicate)[::2]
    names = [f"set/OAS1_{subjects.subject[i]:04d}_MR1_mpr-1_{subjects.slice[i]}.jpg" for i in kept]
    named = replace(
        raw,
        pixels=raw.pixels[kept],
        labels=raw.labels[kept],
        paths=names,
        folders=[""] * len(kept),
        name="named",
    )
    found = group_by_subject(named)
    assert found.count == 200 and not found.doubts and not found.notes and "OASIS" in found.origin
    assert len(set(zip(found.subject.tolist(), subjects.subject[kept].tolist()))) == 200


def test_the_same_people_scanned_twice_are_refused(mri_root: Path, tmp_path: Path) -> None:
    raw, subjects = _loaded(mri_root / "alzheimer_mri.tar.xz")
    some = np.flatnonzero(subjects.subject % 4 == 0)
    again = np.roll(raw.pixels[some], (2, -3), (1, 2))
    twice = replace(
        raw,
        pixels=np.concatenate([raw.pixels[some], again]),
        labels=np.tile(raw.labels[some], 2),
        paths=[*(f"a{i}.jpg" for i in some), *(f"b{i}.jpg" for i in some)],
        folders=[""] * 2 * len(some),
        name="twice",
    )
    found = group_by_subject(twice)
    assert found.count == 100 and any("scanned or cut twice" in doubt for doubt in found.doubts)
    with pytest.raises(ValueError, match="no patient split"):
        split_and_save(twice, found, out=tmp_path)
