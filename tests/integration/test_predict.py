"""From a scan to an answer: calibrate a trained model, ask it, and be refused where it knows nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import extra, small_model
from PIL import Image, ImageFilter

from utils.commands.calibrate import main as calibrate
from utils.commands.predict import main as predict
from utils.core.paths import read_json, write_json
from utils.data.cases import Case, Reading, read_cases
from utils.data.preparation import group_by_subject, split_and_save
from utils.data.sets import DataSplits, load_splits
from utils.data.workspace import Workspace
from utils.evaluation.by_patient import MeanOfSlices
from utils.evaluation.calibration import CALIBRATION, Decision
from utils.experiments.answer_records import Answer
from utils.experiments.prediction import Predictor, answer_case, attacked_at
from utils.reporting.answers import answers_found
from utils.training.checkpoints import WEIGHTS, save_checkpoint
from utils.training.config import TrainConfig
from utils.training.loop import train

pytestmark = pytest.mark.usefixtures("small_backbone")


@pytest.fixture
def root(phantoms, tmp_path: Path) -> Path:
    """A trained and calibrated model, and a vote of two."""
    splits = split_and_save(phantoms, group_by_subject(phantoms), out=tmp_path / "data")
    for seed, title in ((0, "ResNet34"), (1, "EfficientNetB0")):
        model = small_model(seed)
        train(model, splits, config=TrainConfig(num_epochs=3, batch_size=16, learning_rate=3e-3, seed=seed))
        record = {"classes": splits.classes, "data": splits.info}
        save_checkpoint(model, record, tmp_path / "checkpoints" / title)
    vote = {"rule": "soft", "members": ["ResNet34", "EfficientNetB0"], "weights": {"weighted": [0.5, 0.5]}}
    told = {"vote": vote, "classes": splits.classes, "data": splits.info}
    write_json(tmp_path / "checkpoints" / "Ensemble" / "record.json", told)
    assert calibrate(["--root", str(tmp_path)]) == 0
    assert calibrate(["--root", str(tmp_path), "--model", "Ensemble"]) == 0
    return tmp_path


def _slice(splits: DataSplits, place: int, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(splits.test.images[place, 0].numpy()).save(path)
    return path


def _ask(root: Path, source: Path | str, *words: str, model: str = "ResNet34") -> int:
    return predict([str(source), "--root", str(root), "--out", str(root / "out"), "--model", model, *words])


def test_a_slice_of_an_unknown_patient_is_answered(root: Path, capsys) -> None:
    splits = load_splits(root / "data")
    path = _slice(splits, 3, root / "mine.png")
    assert _ask(root, path) == 0
    said = capsys.readouterr().out
    assert "Gate: accepted" in said and "not for clinical use" in said and "phantom demo" in said
    told = read_json(root / "out" / "mine_answer.json")
    assert told["verdict"] == "accepted" and told["answer"] in ("dementia", "no dementia")
    assert sum(told["classes"].values()) == pytest.approx(1, abs=1e-3)
    assert told["probability"] == pytest.approx(1 - told["classes"]["Non"], abs=1e-3)
    assert (told["probability"] >= told["threshold"]) == (told["answer"] == "dementia")
    assert told["of_such"][1] <= told["of_such"][0] and told["environment"]["created"]
    assert told["fragility"]["attack"] == "PGD-10" and 0 <= told["heat_outside"] <= 1
    assert Image.open(root / "out" / "mine_answer.png").width > 2000
    # asked again, it says the same
    again = root / "again"
    assert predict([str(path), "--root", str(root), "--out", str(again), "--model", "ResNet34"]) == 0
    assert {**read_json(again / "mine_answer.json"), "environment": {}} == {**told, "environment": {}}


def test_a_slice_in_other_greys_is_answered_with_a_doubt(root: Path, capsys) -> None:
    path = _slice(load_splits(root / "data"), 3, root / "mine.png")
    Image.open(path).point(lambda grey: grey * 7 // 255).save(root / "dark.png")
    assert _ask(root, root / "dark.png", "--attack", "none") == 0
    told = read_json(root / "out" / "dark_answer.json")
    assert told["verdict"] == "doubtful" and told["answer"] and told["distance"] <= told["limit"]
    assert "brightness or contrast is another" in told["reason"] and told["reason"][1:] in capsys.readouterr().out


def test_a_blurred_or_noisy_slice_is_answered_with_a_doubt(root: Path, capsys) -> None:
    path = _slice(load_splits(root / "data"), 3, root / "mine.png")
    grain = np.random.default_rng(0).normal(0, 12, np.asarray(Image.open(path)).shape)
    made = {
        "blurred": Image.open(path).filter(ImageFilter.GaussianBlur(1.5)),
        "noisy": Image.fromarray((np.asarray(Image.open(path)) + grain).clip(0, 255).astype(np.uint8)),
    }
    for name, cause in (("blurred", "blur, thick slices"), ("noisy", "noise or motion")):
        made[name].save(root / f"{name}.png")
        assert _ask(root, root / f"{name}.png", "--attack", "none") == 0
        told = read_json(root / "out" / f"{name}_answer.json")
        assert told["verdict"] == "doubtful" and told["answer"] and told["distance"] <= told["limit"]
        assert "its fine detail is another" in told["reason"] and cause in told["reason"]
    capsys.readouterr()
    assert _ask(root, root / "noisy.png", "--attack", "none", model="EfficientNetB0") == 0
    assert "replaces an answer of ResNet34" in capsys.readouterr().out
    assert _ask(root, root / "noisy.png", "--attack", "none", model="EfficientNetB0") == 0
    assert "replaces" not in capsys.readouterr().out


def test_what_was_measured_on_others_is_not_said_of_a_training_slice(root: Path, capsys) -> None:
    train = load_splits(root / "data").train
    picture = root / "seen.png"
    Image.fromarray(train.images[4, 0].numpy()).save(picture)
    assert _ask(root, picture, "--attack", "none") == 0
    said = capsys.readouterr().out
    assert "trained on this very slice" in said and "were right" not in said
    told = read_json(root / "out" / "seen_answer.json")
    assert told["trained_on"] == 1 and told["answer"] and told.get("of_such") is told.get("in_tenth") is None
    own = torch.nonzero(train.subjects == train.subjects[4])[:, 0]
    for place in own.tolist():
        path = root / "stack" / f"s{int(train.slices[place])}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(train.images[place, 0].numpy()).save(path)
    assert _ask(root, root / "stack", "--together", "--attack", "none") == 0
    assert f"trained on {len(own)} of these slices" in capsys.readouterr().out
    # of others it is said, with an interval over patients
    assert _ask(root, _slice(load_splits(root / "data"), 3, root / "new.png"), "--attack", "none") == 0
    assert "95 % interval over patients" in capsys.readouterr().out


def test_what_the_model_does_not_know_gets_no_answer(root: Path, capsys) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (128, 128), dtype=np.uint8)
    Image.fromarray(noise).save(root / "noise.png")
    assert _ask(root, root / "noise.png") == 1
    assert "Gate: refused" in capsys.readouterr().out
    told = read_json(root / "out" / "noise_answer.json")
    assert told["verdict"] == "refused" and "no training slice looks like it" in told["reason"]
    assert "answer" not in told and "fragility" not in told and told["distance"] > told["limit"]
    assert _ask(root, root / "noise.png", "--force", "--attack", "none") == 0
    told = read_json(root / "out" / "noise_answer.json")
    assert told["verdict"] == "refused" and told["answer"] and "fragility" not in told


def test_a_folder_leaves_a_table_and_a_sheet(root: Path) -> None:
    splits, folder = load_splits(root / "data"), root / "scans"
    for place in (0, 5):
        _slice(splits, place, folder / f"case{place}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.fromarray(np.full((64, 64), 7, dtype=np.uint8)).save(folder / "nothing.png")
    assert _ask(root, folder, "--attack", "none") == 0
    table = pd.read_csv(root / "out" / "answers.csv").set_index("case")
    assert table["verdict"].to_dict() == {
        "broken": "unreadable", "case0": "accepted", "case5": "accepted", "nothing": "refused"
    }  # fmt: skip
    assert (
        table.loc["nothing", "reason"] == "it shows nothing" and "not for clinical use" in table.loc["case0", "warning"]
    )
    assert (root / "out" / "answers.png").is_file() and (root / "out" / "broken_answer.png").is_file()
    answers = [Answer.model_validate(read_json(path)) for path in sorted((root / "out").glob("*_answer.json"))]
    said = answers_found(answers)
    assert said.startswith("2 of 4 cases got an answer") and "dementia: " in said and " test slices of " in said
    known = [answer.model_copy(update={"of_such": None, "trained_on": 1}) for answer in answers if answer.answer]
    assert answers_found(known).startswith("All cases got an answer: 2.") and "test slices" not in answers_found(known)


def test_a_patient_is_asked_as_one(root: Path) -> None:
    splits = load_splits(root / "data")
    own = torch.nonzero(splits.test.subjects == splits.test.subjects[0])[:, 0]
    for place in own.tolist():
        _slice(splits, place, root / "patient" / f"s{int(splits.test.slices[place])}.png")
    assert _ask(root, root / "patient", "--together", model="Ensemble") == 0
    told = read_json(root / "out" / "patient_answer.json")
    assert told["kind"] == "patient" and len(told["slices"]) == len(own)
    assert list(told["members"]) == ["ResNet34", "EfficientNetB0"] and told["heat_of"] == "ResNet34"
    assert told["of_such"][0] <= len(splits.test.subjects.unique())


def test_the_attacked_slices_do_turn_the_answer_around(root: Path) -> None:
    predictor = Predictor(Workspace.open(str(root)), root / "checkpoints" / "ResNet34")
    splits = load_splits(root / "data")
    turned = 0
    for place in range(0, len(splits.test), 5):
        case = Case("x", splits.test.images[place : place + 1], ["x"], False)
        answer, seen = answer_case(predictor, case, heat=False, force=True)
        if answer.fragility is None or answer.fragility.radius is None:
            continue
        turned += 1
        assert seen.attacked is not None and seen.image is not None
        assert np.abs(seen.attacked - seen.image).max() <= answer.fragility.radius + 1e-6
        known = predictor.outcomes(case)
        decide = Decision(MeanOfSlices(predictor.model), 0, known.cut)
        said = [int(decide(torch.from_numpy(image)[None, None]).argmax()) for image in (seen.image, seen.attacked)]
        assert said[0] != said[1] and answer.fragility.answer == ("no dementia", "dementia")[said[1]]
    assert turned


def test_an_attack_within_a_radius_of_ones_choice_replaces_the_smallest(root: Path) -> None:
    predictor = Predictor(Workspace.open(str(root)), root / "checkpoints" / "ResNet34")
    splits = load_splits(root / "data")
    turned = 0
    for place in range(0, len(splits.test), 5):
        case = Case("x", splits.test.images[place : place + 1], ["x"], False)
        answer, seen = answer_case(predictor, case, attack=False, heat=False, force=True)
        none, bare = attacked_at(predictor, case, answer, seen, 0.0)
        assert none.fragility.radius is None and none.fragility.shown == "above 0/255" and bare.stack is None
        own, shown = attacked_at(predictor, case, answer, seen, 16 / 255)
        assert seen.attacked is None and seen.stack is None and answer.fragility is None
        if own.fragility.radius is None:
            continue
        turned += 1
        assert np.array_equal(shown.stack[0], shown.attacked) and shown.eps == 16 / 255
        assert 0 < np.abs(shown.attacked - shown.image).max() <= 16 / 255 + 1e-6
        assert own.fragility.answer != answer.answer and sum(shown.after) == pytest.approx(1, abs=1e-4)
    assert turned


def test_a_phantom_needs_no_file(root: Path) -> None:
    assert _ask(root, "phantom", "--attack", "none") == 0
    told = read_json(root / "out" / "phantom_answer.json")
    assert told["kind"] == "patient" and "A drawn phantom, not a brain." in told["notes"]


def test_what_is_missing_or_of_another_model_is_said(root: Path, capsys) -> None:
    path, folder = _slice(load_splits(root / "data"), 0, root / "a.png"), root / "checkpoints" / "ResNet34"
    shutil.copy(root / "checkpoints" / "EfficientNetB0" / CALIBRATION, folder / CALIBRATION)
    assert _ask(root, path) == 1 and "is of other weights than those beside it" in capsys.readouterr().err
    (folder / CALIBRATION).unlink()
    assert _ask(root, path) == 1 and f"python -m utils calibrate --root {root} --model" in capsys.readouterr().err
    (folder / "gate.safetensors").unlink()
    assert _ask(root, path) == 1 and "which images the model knows" in capsys.readouterr().err
    (folder / WEIGHTS).unlink()
    assert calibrate(["--root", str(root), "--model", "ResNet34"]) == 1
    assert "weights.safetensors" in capsys.readouterr().err
    assert _ask(root, root / "nowhere.png", model="EfficientNetB0") == 1
    assert "does not exist; give a slice" in capsys.readouterr().err
    assert _ask(root, path, "--fit", "crop", model="EfficientNetB0") == 2


def test_calibration_fits_validation_and_counts_test_patients(root: Path) -> None:
    splits = load_splits(root / "data")
    told = json.loads((root / "checkpoints" / "ResNet34" / CALIBRATION).read_text())
    assert told["patient"]["n_fitted"] == len(splits.validation.subjects.unique())
    assert told["slice"]["n_fitted"] == len(splits.validation)
    for kind, count in (("patient", len(splits.test.subjects.unique())), ("slice", len(splits.test))):
        assert sum(n for n, _ in told[kind]["right"].values()) == count
        assert sum(n for n, _ in told[kind]["tested"]) == count
    reading = Reading(Predictor(Workspace.open(str(root)), root / "checkpoints" / "ResNet34").gate.shape)
    (phantom,) = read_cases("phantom", reading)
    assert reading.shape == (128, 128) and phantom.images.shape[-2:] == (128, 128)


def test_attacked_slices_are_exported_and_judged_again(root: Path, capsys) -> None:
    extra("nibabel")
    extra("pydicom")
    splits = load_splits(root / "data")
    for place in range(0, len(splits.test), 4):
        _slice(splits, place, root / "scans" / f"case{place}.png")
    assert _ask(root, root / "scans", "--export", "png8", "png16", "nifti", "dicom") == 0
    told = [read_json(path) for path in sorted((root / "out").glob("case*_answer.json"))]
    turned = [own for own in told if own.get("fragility", {}).get("radius")]
    assert turned and "Written to a file and read again: png8" in capsys.readouterr().out
    predictor = Predictor(Workspace.open(str(root)), root / "checkpoints" / "ResNet34")
    for own in turned:
        found = own["fragility"]["files"]
        assert list(found) == ["png8", "png16", "nifti", "dicom"]
        # a file of single precision holds the attack itself
        assert found["nifti"]["survives"] and found["nifti"]["answer"] == own["fragility"]["answer"]
        for entry in found.values():
            assert entry["survives"] == (entry["answer"] != own["answer"])
        name = found["png8"]["files"][0]
        pixels = np.asarray(Image.open(root / "out" / f"{own['case']}_attacked" / name), dtype=np.float32) / 255
        case = Case("x", torch.zeros(1, 1, 1, 1, dtype=torch.uint8), ["x"], False)
        decide = Decision(MeanOfSlices(predictor.model), 0, predictor.outcomes(case).cut)
        said = ("no dementia", "dementia")[int(decide(torch.from_numpy(pixels)[None, None]).argmax())]
        assert said == found["png8"]["answer"]
    assert _ask(root, root / "scans", "--export", "gif") == 2
