from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import small_model

from utils.checkpoints import read_record, save_checkpoint
from utils.prepare import group_by_subject, split_and_save
from utils.results import update_record
from utils.spot_check import main

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
