from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import small_model

from utils.attacks.attack import Attack
from utils.commands.spot_check import main
from utils.core.paths import read_json, write_json
from utils.data.preparation import group_by_subject, split_and_save
from utils.data.sets import load_splits
from utils.evaluation.curve import combine
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.records import update_record
from utils.training.checkpoints import load_checkpoint, read_record, save_checkpoint

pytestmark = pytest.mark.usefixtures("small_backbone")


@pytest.fixture
def root(phantoms, tmp_path: Path) -> Path:
    splits = split_and_save(phantoms, group_by_subject(phantoms), out=tmp_path / "data")
    record = {"classes": splits.classes, "data": splits.info}
    save_checkpoint(small_model(), record, tmp_path / "checkpoints" / "ResNet34")
    return tmp_path


def test_a_model_is_recorded_once_and_then_compared(root: Path, capsys: pytest.CaptureFixture) -> None:
    folder = root / "checkpoints" / "ResNet34"
    assert main(["--root", str(root)]) == 0 and "recorded 16 images" in capsys.readouterr().out
    stored = read_record(folder).spot_check
    assert len(stored.first_broken) == len(stored.paths) == 16 and len(set(stored.first_broken)) > 1
    assert main(["--root", str(root), "--model", "ResNet34"]) == 0
    assert "16 of 16 images as recorded" in capsys.readouterr().out


def test_a_record_without_weights_is_left_out(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = root / "checkpoints" / "ResNet34"
    shutil.copytree(folder, root / "checkpoints" / "ResNet34_atk")
    (folder / "weights.safetensors").unlink()
    assert main(["--root", str(root)]) == 0
    assert "ResNet34_atk: recorded" in capsys.readouterr().out and read_record(folder).spot_check is None
    (root / "checkpoints" / "ResNet34_atk" / "weights.safetensors").unlink()
    assert main(["--root", str(root)]) == 1
    assert f"no weights in {root / 'checkpoints'}" in capsys.readouterr().err


def test_other_weights_and_other_images_are_noticed(root: Path, capsys: pytest.CaptureFixture) -> None:
    folder = root / "checkpoints" / "ResNet34"
    assert main(["--root", str(root)]) == 0
    stored = read_record(folder).spot_check
    update_record(folder, spot_check=stored.model_copy(update={"paths": stored.paths[::-1]}))
    assert main(["--root", str(root)]) == 1 and "other images" in capsys.readouterr().err
    record = read_record(folder).plain() | {"spot_check": stored.plain()}
    torch.manual_seed(1)
    other = small_model()
    torch.nn.init.normal_(other.backbone.out.weight)
    save_checkpoint(other, {key: value for key, value in record.items() if key != "model"}, folder)
    assert main(["--root", str(root)]) == 1
    assert "differs from its record on" in capsys.readouterr().err


def test_the_worst_case_is_measured_again(root: Path, capsys: pytest.CaptureFixture) -> None:
    folder, arguments = root / "checkpoints" / "ResNet34", ["--root", str(root), "--worst-case"]
    assert main(arguments) == 1 and "holds no attack" in capsys.readouterr().err
    splits = load_splits(root / "data")
    model, _ = load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)
    # as the notebooks do: one attack after the other, the last on what the others left
    options = {"epsilons": [0, 8 / 255, 64 / 255], "seed": 3}
    steps = Attack("pgd", steps=5, stop_when_fooled=True)
    before = [robustness_curve(model, splits.test, attack=attack, **options) for attack in (Attack("fgsm"), steps)]
    margin = Attack("pgd", steps=5, loss="margin", stop_when_fooled=True)
    curve = robustness_curve(model, splits.test, attack=margin, known=combine(before), **options)
    assert curve.robust_accuracy[0] > curve.robust_accuracy[-1]
    found = {"curve": curve, "seed": 3, "interval": [], "metrics": [], "answers": {"probability": [], "right": []}}
    update_record(folder, worst_case=found | {"panel": None})
    assert main(arguments) == 0
    n = len(splits.test)
    assert f"{n} of {n} images as recorded" in capsys.readouterr().out
    higher = curve.model_copy(update={"robust_accuracy": [0.9, 0.9, 0.9]})
    update_record(folder, worst_case=found | {"panel": None, "curve": higher})
    assert main(arguments) == 1 and "in the record 90.0, 90.0, 90.0 %" in capsys.readouterr().err


def _put(folder: Path, **entries: object) -> None:
    """Write entries into a record that are none."""
    path = folder / "record.json"
    write_json(path, read_json(path) | entries)


def test_an_entry_that_is_none_is_refused_and_the_file_stays(root: Path) -> None:
    path = root / "checkpoints" / "ResNet34" / "record.json"
    before = path.read_text()
    with pytest.raises(ValueError, match="lacks spot_check.suite"):
        update_record(path.parent, spot_check={})
    assert path.read_text() == before


WHOLE = {"suite": "quick", "epsilons": [0, 1 / 255, 2 / 255], "paths": ["a"], "first_broken": [0]}


@pytest.mark.parametrize(
    "entry, named",
    [
        ({}, "lacks spot_check.suite"),
        ([], "spot_check is []"),
        ("recorded", "spot_check is 'recorded'"),
        ({name: value for name, value in WHOLE.items() if name != "first_broken"}, "spot_check.first_broken"),
        (WHOLE | {"first_broken": [0, 1]}, "paths and first_broken"),
        (WHOLE | {"paths": 3}, "spot_check.paths is 3"),
    ],
)
def test_a_malformed_entry_is_named_before_any_attack(root: Path, monkeypatch, capsys, entry, named: str) -> None:
    folder = root / "checkpoints" / "ResNet34"
    _put(folder, spot_check=entry)
    monkeypatch.setattr("utils.experiments.spot_check.fates", None)
    assert main(["--root", str(root)]) == 1
    error = capsys.readouterr().err
    assert named in error and str(folder / "record.json") in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "entry, named",
    [
        ({}, "lacks worst_case.curve"),
        ({"seed": 0, "curve": {}}, "lacks worst_case.curve.title"),
        ({"curve": {"attacks": [{"speed": 1}]}}, "lacks worst_case.curve.title"),
    ],
)
def test_a_malformed_worst_case_is_named(root: Path, capsys, entry: dict, named: str) -> None:
    _put(root / "checkpoints" / "ResNet34", worst_case=entry)
    assert main(["--root", str(root), "--worst-case"]) == 1 and named in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model": {"backbone": "small", "image_size": 32}}, "lacks model.num_classes"),
        ({"model": 3}, "model is 3"),
        ({"model": {"backbone": "small", "image_size": "32", "num_classes": 4}}, "model.image_size is '32'"),
        ({"data": []}, "data is []"),
        ({"schema_version": 99}, "later version of this project"),
        ({"vote": {}}, "lacks vote.rule"),
    ],
)
def test_a_record_with_missing_parts_is_named(root: Path, capsys, change: dict, named: str) -> None:
    path = root / "checkpoints" / "ResNet34" / "record.json"
    write_json(path, read_json(path) | change)
    assert main(["--root", str(root)]) == 1
    error = capsys.readouterr().err
    assert named in error and str(path) in error and error.count("\n") == 1
