from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.def_models import build_model
from utils.attacks.attack import Attack
from utils.attacks.library import LIBRARY
from utils.attacks.suites import Threat
from utils.commands import robustness
from utils.commands.robustness import main
from utils.core.radii import GRIDS, parse_radius
from utils.data.sets import DataSplits, manifest, save_splits
from utils.evaluation.robustness import evaluate_robustness, record_path
from utils.evaluation.worst_case import robustness_curve
from utils.training.checkpoints import save_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory, phantoms, splits: DataSplits) -> Path:
    """A workspace with prepared images and one untrained model."""
    import numpy as np

    from utils.data.preparation import group_by_subject

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


RUN = [
    "--suite",
    "quick",
    "--epsilons",
    "1/255",
    "4/255",
    "--max-images",
    "12",
    "--panel-images",
    "2",
    "--batch-size",
    "8",
]


def test_the_command_writes_numbers_with_intervals_and_panel(root: Path, capsys) -> None:
    assert main(["--model", "ResNet34", "--root", str(root), *RUN]) == 0
    path = root / "checkpoints" / "ResNet34" / "robustness_quick_n12.json"
    assert str(path) in capsys.readouterr().out
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["curve"]["epsilons"] == pytest.approx([0, 1 / 255, 4 / 255])
    assert len(record["metrics"]) == len(record["interval"]) == 3
    for accuracy, metrics in zip(record["curve"]["robust_accuracy"], record["metrics"]):
        assert metrics["4 classes"]["image"]["accuracy"] == pytest.approx(accuracy)
    assert record["panel"]["verdict"].startswith("gradient checks ") and len(record["panel"]["checks"]) == 9
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
        (["--model", "ResNet34", "--epsilons", "8"], "k/255"),
        (["--model", "ResNet34", "--epsilons", "nan"], "'nan' is no radius"),
        (["--model", "ResNet34", "--panel-eps", "nan"], "'nan' is no radius"),
        (["--model", "ResNet34", "--check-eps", "2"], "k/255"),
        (["--model", "ResNet34", "--max-images", "-3"], "--max-images must be a whole number of at least 1, not -3"),
        (["--model", "ResNet34", "--max-images", "0"], "--max-images must be a whole number of at least 1, not 0"),
        (["--model", "ResNet34", "--panel-images", "-1"], "--panel-images must be a whole number of at least 0"),
        (["--model", "ResNet34", "--batch-size", "0"], "--batch-size must be a whole number of at least 1"),
        (["--model", "ResNet34", "--seed", "-1"], "--seed must be a whole number from 0 to"),
        (["--model", "ResNet34", "--out", "/"], "is a folder"),
        (["--model", "ResNet34", "--out", "/proc/nowhere/x.json"], "cannot be written"),
    ],
)
def test_bad_arguments_are_named_before_any_work(root: Path, arguments, message: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(robustness, "load_splits", lambda _: pytest.fail("work has begun"))
    assert main([*arguments, "--root", str(root)]) == 1
    assert message in capsys.readouterr().err


def test_each_norm_has_its_own_grid_and_radius_of_the_checks(root: Path, monkeypatch) -> None:
    asked = []

    def stop(*_, **given):
        asked.append((given["epsilons"], given["panel_eps"], given["threat"].norm))
        raise ValueError("seen enough")

    monkeypatch.setattr(robustness, "evaluate_robustness", stop)
    for norm in ("linf", "l2"):
        assert main(["--model", "ResNet34", "--root", str(root), "--norm", norm]) == 1
    assert main(["--model", "ResNet34", "--root", str(root), "--epsilons", "8/255", "0.0314"]) == 1
    assert asked[0] == (list(GRIDS["linf"]), 2 / 255, "linf") and asked[1] == (list(GRIDS["l2"]), 1.0, "l2")
    assert asked[2][0] == [8 / 255, 0.0314]


def test_a_measurement_is_not_replaced_by_one_at_other_radii_or_of_another_seed(root: Path, tmp_path, capsys) -> None:
    run = ["--model", "ResNet34", "--root", str(root), "--suite", "smoke", "--max-images", "8", "--panel-images", "0"]
    run += ["--out", str(tmp_path / "mine.json"), "--batch-size", "8"]
    assert main([*run, "--epsilons", "1/255", "2/255"]) == 0
    first = (tmp_path / "mine.json").read_bytes()
    for other, said in ((["8/255"], "radii 1/255, 2/255"), (["1/255", "2/255", "--seed", "5"], "seed 0")):
        assert main([*run, "--epsilons", *other]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert f"holds a measurement with {said}" in told and "--out" in told
        assert (tmp_path / "mine.json").read_bytes() == first
    others = [*run[: run.index("smoke")], "quick", *run[run.index("smoke") + 1 :], "--epsilons", "1/255", "2/255"]
    assert main(others) == 1 and "holds a measurement with smoke;" in " ".join(capsys.readouterr().err.split())
    assert main([*run, "--epsilons", "2/255", "1/255"]) == 0  # the same again is no other
    (tmp_path / "mine.json").write_text("{}")
    assert main([*run, "--epsilons", "1/255"]) == 1
    assert "mine.json" in capsys.readouterr().err


def test_a_file_of_weights_and_a_negative_radius_are_called_so(root: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "plain.pt").write_bytes(b"PK")
    assert main(["--model", str(tmp_path / "plain.pt"), "--root", str(root)]) == 1
    assert "python -m utils train --weights" in capsys.readouterr().err
    assert main(["--model", "ResNet34", "--root", str(root), "--epsilons", "-1/255"]) == 2
    assert "-1/255 is negative, which this option does not take" in capsys.readouterr().err
    mask = ["--attack", "region", "--option", "mask=/nowhere.png"]
    assert main(["--model", "ResNet34", "--root", str(root), *mask]) == 1
    assert "the mask /nowhere.png does not exist" in capsys.readouterr().err


def test_a_share_of_255_is_no_length(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"8/255 is what one pixel may change; in L2 a radius is the length"):
        assert parse_radius("8/255", "l2") == pytest.approx(8 / 255)


def test_a_radius_in_the_wrong_unit_warns(toy_nets, toy_test) -> None:
    with pytest.warns(UserWarning, match="too small to change an answer"):
        robustness_curve(toy_nets["plain"], toy_test, attack=Attack("fgsm"), epsilons=[0.0314 / 255])


def test_an_l2_evaluation_in_python_takes_lengths(toy_nets, toy_test) -> None:
    few = toy_test.balanced_subset(8)
    found = evaluate_robustness(toy_nets["plain"], few, suite="smoke", threat=Threat("l2"), panel_images=4, queries=5)
    assert found.curve.epsilons == list(GRIDS["l2"]) and found.panel.eps == 1.0


ONE = ["--max-images", "8", "--batch-size", "8", "--steps", "3"]


@pytest.mark.parametrize(
    ("name", "more", "title"),
    [
        ("ifgsm_t", ["2/255", "--option", "target=healthy"], "I-FGSM-3 to class 0"),
        ("ifgsm_t", ["2/255", "--option", "target=ill"], "I-FGSM-3 to classes 1, 2, 3"),
        ("region", ["2/255", "--option", "part=ventricles"], "PGD-3 in the ventricles"),
        ("universal", ["2/255", "--option", "images=32"], "One change for all, 3 epochs"),
        ("MIFGSM", ["2/255", "--option", "decay=0.5"], "MIFGSM-3 of torchattacks"),
        ("OnePixel", ["2", "--norm", "l0", "--option", "popsize=4"], "OnePixel-3 of torchattacks"),
    ],
)
def test_one_attack_by_name(root: Path, name: str, more: list[str], title: str) -> None:
    assert main(["--model", "ResNet34", "--root", str(root), *ONE, "--attack", name, "--epsilons", *more]) == 0
    # told apart by all that was typed, also where a disk does not tell PGD from pgd
    torchattacks = "-torchattacks" if name in LIBRARY else ""
    typed = more[-1].replace("=", "-")
    norm = "_l0" if "l0" in more else ""
    file = f"robustness_{name}{torchattacks}-3-{typed}{norm}_n8.json"
    record = json.loads((root / "checkpoints" / "ResNet34" / file).read_text("utf-8"))
    assert record["suite"] == name and record["curve"]["title"] == title and record["panel"] is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--attack", "ifgsm_t"], "takes the option target"),
        (["--attack", "universal", "--untied", "224"], "fitted on grey images at their own size"),
        (["--attack", "ifgsm_t", "--option", "target=worst"], "a target must be one of likeliest"),
        (["--attack", "region", "--option", "part=skull"], "one of brain, background, ventricles, rim"),
        (["--attack", "OnePixel"], "an attack in L0, not in L-inf"),
        (["--attack", "Nothing"], "attack must be one of"),
        (["--attack", "CW", "--norm", "l2", "--option", "c"], "must be NAME=VALUE"),
        (["--option", "target=healthy"], "name it with --attack"),
        (["--norm", "l0"], "is an attack in L-inf or L2, not in L0"),
        (["--attack", "reweighed"], "needs the members of a vote"),
        (["--attack", "ifgsm", "--steps", "0"], "steps must be a whole number of at least 1"),
        (["--steps", "5"], "are of one attack: name it with --attack"),
        (["--attack", "pgd", "--steps", "1.5"], "--steps takes a whole number, not 1.5"),
        (["--epsilons", "1/255", "--max-images=3.2"], "--max-images takes a whole number, not 3.2"),
    ],
)
def test_a_bad_attack_is_refused_before_any_work(root: Path, more: list[str], said: str, capsys) -> None:
    assert main(["--model", "ResNet34", "--root", str(root), "--max-images", "4", *more]) == 1
    assert said in capsys.readouterr().err
