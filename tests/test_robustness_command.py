from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.def_models import build_model
from utils.checkpoints import save_checkpoint
from utils.data import DataSplits, manifest, save_splits
from utils.robustness import main, record_path
from utils.suites import Threat


@pytest.fixture(scope="module")
def root(tmp_path_factory, phantoms, splits: DataSplits) -> Path:
    """A workspace with prepared images and one untrained model."""
    import numpy as np

    from utils.prepare import group_by_subject

    folder = tmp_path_factory.mktemp("workspace")
    names = np.full(len(phantoms.paths), "", dtype=object)
    for name, part in splits:
        names[np.isin(phantoms.paths, part.paths)] = name
    save_splits(splits, manifest(phantoms, group_by_subject(phantoms), names), folder / "data")
    torch.manual_seed(0)
    model = build_model("resnet34", image_size=32)
    own = {"classes": splits.classes, "data": splits.info, "note": "untrained"}
    save_checkpoint(model, own, folder / "checkpoints" / "ResNet34")
    return folder


RUN = ["--suite", "quick", "--epsilons", "1", "4", "--max-images", "12", "--panel-images", "2", "--batch-size", "8"]


def test_the_command_writes_numbers_with_intervals_and_panel(root: Path, capsys) -> None:
    assert main(["--model", "ResNet34", "--root", str(root), *RUN]) == 0
    path = root / "checkpoints" / "ResNet34" / "robustness_quick_n12.json"
    assert str(path) in capsys.readouterr().out
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["curve"]["epsilons"] == pytest.approx([0, 1 / 255, 4 / 255])
    assert len(record["metrics"]) == len(record["interval"]) == 3
    for accuracy, metrics in zip(record["curve"]["robust_accuracy"], record["metrics"]):
        assert metrics["4 classes"]["image"]["accuracy"] == pytest.approx(accuracy)
    assert record["panel"]["verdict"] in ("trustworthy", "not trustworthy") and len(record["panel"]["checks"]) == 8
    assert record["note"] == "untrained" and record["data"]["fingerprint"] and record["environment"]["commit"]
    assert list((root / "attack_cache").glob("*/*.safetensors"))
    before = path.read_text(encoding="utf-8")
    assert main(["--model", "ResNet34", "--root", str(root), *RUN]) == 0
    again = json.loads(path.read_text(encoding="utf-8"))
    assert again["curve"]["first_broken"] == json.loads(before)["curve"]["first_broken"]


def test_threats_have_files_of_their_own(root: Path) -> None:
    folder = Path("x")
    assert record_path(folder, "full", Threat()).name == "robustness_full.json"
    assert record_path(folder, "full", Threat("l2", 224), 64).name == "robustness_full_l2_untied224_n64.json"
    extra = ["--untied", "48", "--panel-images", "0", "--out", str(root / "untied.json")]
    assert main(["--model", "ResNet34", "--root", str(root), *RUN, *extra]) == 0
    record = json.loads((root / "untied.json").read_text(encoding="utf-8"))
    assert record["panel"] is None and record["curve"]["threat"]["size"] == 48


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "Nothing"], "Nothing"),
        (["--model", "ResNet34", "--epsilons", "-1"], "k/255"),
        (["--model", "ResNet34", "--epsilons", "2000"], "k/255"),
        (["--model", "ResNet34", "--untied", "-3"], "number of pixels"),
    ],
)
def test_bad_arguments_are_named_before_any_work(root: Path, arguments, message: str, capsys) -> None:
    assert main([*arguments, "--root", str(root)]) == 1
    assert message in capsys.readouterr().err
