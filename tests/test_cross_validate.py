from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from utils import cross_validate
from utils.cross_validate import fold_of, main, summarise, summary_figure
from utils.data import load_splits
from utils.intervals import report
from utils.paths import read_json, write_json
from utils.prepare import group_by_subject, split_and_save
from utils.readme import folds_table
from utils.splits import fold_sides

SIZES = {"trainable": "head", "clean-epochs": 1, "epochs": 1, "train-steps": 1, "validation-images": 8, "max-images": 8}


@pytest.fixture
def command(phantoms, tmp_path: Path, small_backbone) -> list[str]:
    split_and_save(phantoms, group_by_subject(phantoms), split="patient", out=tmp_path / "data")
    arguments = ["--data", str(tmp_path / "data"), "--backbone", "small", "--out", str(tmp_path / "out")]
    arguments += ["--n-folds", "3", "--work", str(tmp_path / "work")]
    return [*arguments, *(text for k, v in SIZES.items() for text in (f"--{k}", str(v)))]


def test_each_patient_is_tested_once_and_folds_are_not_done_again(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*command, "--folds", "1"]) == 0
    assert read_json(tmp_path / "out" / "summary.json")["folds"] == [1]
    assert main(command) == 0
    with monkeypatch.context() as patch:
        patch.setattr(cross_validate, "run_fold", None)
        assert main(command) == 0
    summary, splits = read_json(tmp_path / "out" / "summary.json"), load_splits(tmp_path / "data")
    everyone = splits.train.join(splits.validation).join(splits.test)
    folds = [read_json(path) for path in sorted((tmp_path / "out").glob("fold*.json"))]
    tested = sorted(subject for fold in folds for subject in set(fold["test"]["subjects"]))
    assert tested == sorted(everyone.subjects.unique().tolist()) and summary["n_subjects"] == len(tested)
    assert summary["n_images"] == {"test": len(everyone), "attacked": 24}
    row = summary["rows"]["hardened"]
    assert row["metrics"][0]["4 classes"]["image"]["n"] == len(everyone)
    assert [one["4 classes"]["image"]["n"] for one in row["attacked"]["metrics"]] == [24] * 3
    right = [one["4 classes"]["image"]["accuracy"] for one in row["attacked"]["metrics"]]
    assert right == sorted(right, reverse=True)
    assert (tmp_path / "out" / "summary.png").is_file()
    again = [str(tmp_path / "elsewhere" / "out") if text == str(tmp_path / "out") else text for text in command]
    assert main([*again, "--image-size", "48"]) == 1 and not (tmp_path / "elsewhere").exists()


def test_pooled_metrics_are_those_of_all_answers_together(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    classes = ["Non", "VeryMild", "Mild", "Moderate"]
    everything = []
    for fold in range(2):
        labels = np.repeat(np.arange(4), 6)
        whose = {"labels": labels.tolist(), "subjects": (100 * fold + np.arange(24) // 2).tolist()}
        logits = draws.normal(size=(24, 4)).round(4) + 2 * np.eye(4)[labels]
        own = {"training": {}, "logits": logits.tolist(), "attacked": [logits.tolist()] * 3}
        data = {"source": "x", "protocol": "patient", "fold": fold, "n_folds": 2, "fold_seed": 0}
        record = {
            "data": data,
            "budget": {"clean_epochs": 1, "epochs": 1, "weights": "scratch"},
            "model": {"backbone": "resnet34", "image_size": 64},
            "seed": 0,
        }
        record |= {"epsilons": [0, 1 / 255, 2 / 255], "attacks": ["FGSM"], "classes": classes, "baselines": {}}
        record |= {"test": whose, "attacked": whose, "models": {"hardened": own}}
        write_json(tmp_path / f"fold{fold}.json", record)
        everything.append((whose, logits))
    summary = summarise(tmp_path)
    labels, subjects = ([x for whose, _ in everything for x in whose[key]] for key in ("labels", "subjects"))
    images = cross_validate._bare({"labels": labels, "subjects": subjects}, classes)
    expected = report(torch.tensor(np.concatenate([logits for _, logits in everything])).float(), images)
    assert summary["rows"]["hardened"]["metrics"] == [expected]
    assert len(summary["rows"]["hardened"]["auroc_by_fold"][0]) == 2
    cells = folds_table(summary).splitlines()[2].split(" | ")
    assert cells[0] == "| hardened" and cells[1].startswith(f"{100 * expected['4 classes']['image']['accuracy']:.1f} [")
    other = [{"binary": {"patient": {"auroc": 0.1, "interval": {"auroc": [0, 0.2]}}}}]
    summary["rows"]["hardened"]["attacked"]["metrics"][:1] = other  # without attack the table takes all images
    summary["n_images"]["attacked"] = 12
    figure = summary_figure(summary)
    assert figure.axes[0].get_legend_handles_labels()[1] == ["hardened"]
    drawn = [value for line in figure.axes[0].containers for value in line[0].get_ydata()]
    shown = [summary["rows"]["hardened"]["metrics"][0], *summary["rows"]["hardened"]["attacked"]["metrics"][1:]]
    assert drawn == pytest.approx([100 * one["binary"]["patient"]["auroc"] for one in shown])
    assert "48 images without attack, 12 of them attacked" in figure.get_suptitle().replace("\n", " ")
    plt.close(figure)
    write_json(tmp_path / "fold2.json", read_json(tmp_path / "fold1.json"))
    with pytest.raises(ValueError, match="test the same patient"):
        summarise(tmp_path)


def test_folds_keep_patients_apart_and_every_class_in_training(phantoms, tmp_path: Path) -> None:
    splits = split_and_save(phantoms, group_by_subject(phantoms), split="patient", out=tmp_path)
    for fold in range(5):
        own = fold_of(splits, fold, 5, seed=0)
        sides = [set(part.subjects.tolist()) for _, part in own]
        assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2] and all(sides)
        assert len(own.train.labels.unique()) == 4 and own.fingerprint != splits.fingerprint
        assert own.info["fold"] == fold
    with pytest.raises(ValueError, match="folds 0 to 4"):
        fold_of(splits, 5, 5, seed=0)
    with pytest.raises(ValueError, match="by patient"):
        fold_of(split_and_save(phantoms, group_by_subject(phantoms), split="random", out=tmp_path), 0, 5, seed=0)


def test_a_class_of_two_patients_trains_wherever_one_of_them_is_left() -> None:
    subject, labels = np.repeat(np.arange(22), 4), np.repeat([0] * 20 + [1] * 2, 4)
    for fold in range(5):
        sides = fold_sides(subject, labels, fold=fold)
        assert (sides[labels == 1] == "train").any() and (sides == "validation").sum() == 4 * 4
