from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import small_model

from utils.checkpoints import load_checkpoint, read_record, save_checkpoint
from utils.data import load_splits
from utils.prepare import group_by_subject, split_and_save
from utils.results import update_record
from utils.spot_check import main
from utils.suites import Attack
from utils.worst_case import combine, robustness_curve

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
    stored = read_record(folder)["spot_check"]
    assert len(stored["first_broken"]) == len(stored["paths"]) == 16 and len(set(stored["first_broken"])) > 1
    assert main(["--root", str(root), "--model", "ResNet34"]) == 0
    assert "16 of 16 images as recorded" in capsys.readouterr().out


def test_a_record_without_weights_is_left_out(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = root / "checkpoints" / "ResNet34"
    shutil.copytree(folder, root / "checkpoints" / "ResNet34_atk")
    (folder / "weights.safetensors").unlink()
    assert main(["--root", str(root)]) == 0
    assert "ResNet34_atk: recorded" in capsys.readouterr().out and "spot_check" not in read_record(folder)
    (root / "checkpoints" / "ResNet34_atk" / "weights.safetensors").unlink()
    assert main(["--root", str(root)]) == 1
    assert f"no weights in {root / 'checkpoints'}" in capsys.readouterr().err


def test_other_weights_and_other_images_are_noticed(root: Path, capsys: pytest.CaptureFixture) -> None:
    folder = root / "checkpoints" / "ResNet34"
    assert main(["--root", str(root)]) == 0
    stored = read_record(folder)["spot_check"]
    update_record(folder, spot_check=stored | {"paths": stored["paths"][::-1]})
    assert main(["--root", str(root)]) == 1 and "other images" in capsys.readouterr().err
    record = read_record(folder) | {"spot_check": stored}
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
    update_record(folder, worst_case={"curve": curve.as_dict(), "seed": 3})
    assert main(arguments) == 0
    n = len(splits.test)
    assert f"{n} of {n} images as recorded" in capsys.readouterr().out
    update_record(folder, worst_case={"curve": curve.as_dict() | {"robust_accuracy": [0.9, 0.9, 0.9]}, "seed": 3})
    assert main(arguments) == 1 and "in the record 90.0, 90.0, 90.0 %" in capsys.readouterr().err
