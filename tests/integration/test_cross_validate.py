from __future__ import annotations

import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, small_model
from sklearn.metrics import roc_auc_score

from utils.commands.folds import main
from utils.core.paths import read_json, write_json
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject, split_and_save
from utils.data.raw_images import RawImages
from utils.data.sets import load_splits
from utils.data.splits import fold_sides
from utils.evaluation.baselines import BASELINES
from utils.evaluation.intervals import report
from utils.evaluation.metrics import predict
from utils.evaluation.probe import fit_head
from utils.experiments.budget import weights_name
from utils.experiments.fold_records import FROZEN, Counts, Whose
from utils.experiments.folds import _rounded, fold_of, read_fold, read_folds, summarise
from utils.reporting.experiment_figures import folds_figure
from utils.reporting.fold_tables import by_patient_table, folds_table
from utils.reporting.robustness_figures import CHECKS

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
        patch.setattr("utils.commands.folds.run_fold", None)
        # nothing is left to do, so nothing is built, such as weights that are not on this machine any more
        patch.setattr("utils.commands.folds.check_runs", None)
        assert main(command) == 0
    summary, splits = read_json(tmp_path / "out" / "summary.json"), load_splits(tmp_path / "data")
    everyone = splits.train.join(splits.validation).join(splits.test)
    folds = [read_json(path) for path in sorted((tmp_path / "out").glob("fold*.json"))]
    tested = sorted(subject for fold in folds for subject in set(fold["test"]["subjects"]))
    assert tested == sorted(everyone.subjects.unique().tolist()) and summary["n_subjects"] == len(tested)
    assert summary["n_images"] == {"test": len(everyone), "attacked": 24}
    row = summary["rows"]["hardened"]
    assert [one["n"] for one in row["at_threshold"]] == [len(tested)] * 3
    assert all(len(one["interval"]["balanced_accuracy"]) == 2 for one in row["at_threshold"])
    assert row["metrics"][0]["4 classes"]["image"]["n"] == len(everyone)
    assert [one["4 classes"]["image"]["n"] for one in row["attacked"]["metrics"]] == [24] * 3
    right = [one["4 classes"]["image"]["accuracy"] for one in row["attacked"]["metrics"]]
    assert right == sorted(right, reverse=True)
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"summary", "roc", "each_patient", "recall"}
    again = [str(tmp_path / "elsewhere" / "out") if text == str(tmp_path / "out") else text for text in command]
    assert main([*again, "--image-size", "48"]) == 1 and not (tmp_path / "elsewhere").exists()


def test_gradient_checks_are_added_to_a_finished_fold(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    command = [*command, "--folds", "0"]
    assert main(command) == 0
    before = read_fold(tmp_path / "out" / "fold0.json")
    assert CHECKS not in by_patient_table([summarise(tmp_path / "out")])
    command += ["--panel-images", "6"]
    with monkeypatch.context() as patch:
        patch.setattr("utils.commands.folds.run_fold", None)
        # nothing is left to do, so nothing is built, such as weights that are not on this machine any more
        patch.setattr("utils.commands.folds.check_runs", None)
        assert main(command) == 0
        patch.setattr("utils.experiments.fold_checks.masking_panel", None)
        assert main(command) == 0  # not made again
    fold, summary = read_fold(tmp_path / "out" / "fold0.json"), summarise(tmp_path / "out")
    for name, model in fold.models.items():
        assert model.checks is not None and model.checks.n_images == 6 and len(model.checks.checks) == 9
        assert model.model_copy(update={"checks": None}) == before.models[name]
        assert summary.rows[name].checks == [model.checks]
        passed = sum(check.passed for check in model.checks.checks)
        for table in (by_patient_table([summary]), folds_table(summary)):
            assert f"{name} {passed}/9" in table

    capsys.readouterr()
    command[-1] = "7"
    work = tmp_path / "work" / "out" / "fold0"
    (work / "plain").rename(work / "elsewhere")
    assert main(command) == 1 and f"no model in {work / 'plain'}" in capsys.readouterr().err
    shutil.copytree(work / "hardened", work / "plain")
    assert main(command) == 1 and "holds another model than fold 0 had" in capsys.readouterr().err
    assert read_fold(tmp_path / "out" / "fold0.json") == fold


def test_rounding_turns_no_verdict() -> None:
    logits = torch.tensor([[0.12344, 0.12343, 0.1], [0.1, 0.20001, 0.200049], [1.23456, 0.5, -2.0]])
    stored = torch.tensor(_rounded(logits))
    assert torch.equal(stored.argmax(1), logits.argmax(1)) and torch.equal(stored[:2], logits[:2])
    assert _rounded(logits)[2] == [1.2346, 0.5, -2.0]


def test_other_attacks_and_unfinished_folds_are_told_beside_the_models_they_are_of(
    command: list[str], tmp_path: Path
) -> None:
    assert main([*command, "--folds", "0"]) == 0
    own = summarise(tmp_path / "out")
    other = own.model_copy(update={"attacks": ["PGD-7"], "model": own.model | {"image_size": 48}})
    table = by_patient_table([own, other])
    assert f"{', '.join(own.attacks)} (" in table and " and of PGD-7 (" in table
    assert f"(1 of 3 folds, {own.n_subjects} patients), hardened" in table
    assert " and of " not in by_patient_table([own])


def test_published_weights_are_a_baseline_of_the_same_folds(command: list[str], tmp_path: Path) -> None:
    start = small_model(seed=3)
    body = {name: value for name, value in start.backbone.state_dict().items() if not name.startswith("out")}
    torch.save(body, tmp_path / "published.pth")
    command = [*command, "--weights", str(tmp_path / "published.pth"), "--fit-head", "--folds", "0"]
    assert main(command) == 0
    fold = read_fold(tmp_path / "out" / "fold0.json")
    own = fold_of(load_splits(tmp_path / "data"), 0, 3, 0)
    model = small_model()
    model.backbone.load_state_dict(body, strict=False)
    wanted = predict(fit_head(model, own.train.join(own.validation)), own.test)
    assert torch.allclose(torch.tensor(fold.baselines[FROZEN]), wanted, atol=1e-3)
    assert fold.models["not hardened"].training["config"]["fit_head"] is True
    assert FROZEN in by_patient_table([summarise(tmp_path / "out")])


def test_each_baseline_is_told_once_also_where_the_first_experiment_lacks_it(
    command: list[str], tmp_path: Path
) -> None:
    assert main([*command, "--folds", "0"]) == 0
    full = summarise(tmp_path / "out")
    rows = {name: row for name, row in full.rows.items() if name != "fluid of each slice"}
    table = by_patient_table([full.model_copy(update={"rows": rows}), full])
    for name in BASELINES:
        assert table.count(f"| {name} |") == 1


def _by_patient(fold: tuple[dict, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Chances of each of a fold's patients, P x 4, and whether they are ill."""
    whose, logits = fold
    subjects, chances = np.array(whose["subjects"]), torch.tensor(logits).softmax(1).numpy()
    of_each = [subjects == one for one in np.unique(subjects)]
    ill = [np.bincount(np.array(whose["labels"])[own]).argmax() > 0 for own in of_each]
    return np.array([chances[own].mean(0) for own in of_each]), np.array(ill)


def test_pooled_metrics_are_those_of_all_answers_together(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    classes = ["Non", "VeryMild", "Mild", "Moderate"]
    everything = []
    for fold in range(2):
        labels = np.repeat(np.arange(4), 6)
        whose = {"labels": labels.tolist(), "subjects": (100 * fold + np.arange(24) // 2).tolist()}
        logits = draws.normal(size=(24, 4)).round(4) + 2 * np.eye(4)[labels]
        own = {"training": {}, "logits": logits.tolist(), "attacked": [logits.tolist()] * 3}
        data = {"source": "x", "protocol": "patient", "fold": fold, "n_folds": 3, "fold_seed": 0}
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
    images = Whose(labels=labels, subjects=subjects).bare(classes)
    expected = report(torch.tensor(np.concatenate([logits for _, logits in everything])).float(), images)
    row = summary.rows["hardened"]
    assert row.metrics == [expected] and len(row.auroc_by_fold[0]) == 2
    cells = folds_table(summary).splitlines()[2].split(" | ")
    assert cells[0] == "| hardened" and cells[1].startswith(f"{100 * expected['4 classes'].image.accuracy:.1f} [")
    areas = [roc_auc_score(ill, 1 - chances[:, 0]) for chances, ill in map(_by_patient, everything)]
    assert row.ranking[0].value == pytest.approx(np.mean(areas)) and f"{100 * np.mean(areas):.1f} [" in cells[3]
    summary = summary.model_copy(update={"n_images": Counts(test=48, attacked=12)})
    figure = folds_figure(summary)
    assert figure.axes[0].get_legend_handles_labels()[1] == ["hardened"]
    drawn = [value for line in figure.axes[0].containers for value in line[0].get_ydata()]
    assert drawn == pytest.approx([100 * one.value for one in row.ranking])
    assert "48 images without attack, 12 of them attacked" in figure.get_suptitle().replace("\n", " ")
    plt.close(figure)
    again = read_json(tmp_path / "fold1.json")
    write_json(tmp_path / "fold2.json", again | {"data": again["data"] | {"fold": 2}})
    with pytest.raises(ValueError, match="test the same patient"):
        summarise(tmp_path)


def test_folds_of_classes_of_which_none_is_healthy_show_what_is_right(tmp_path: Path) -> None:
    draws, classes, labels = np.random.default_rng(0), ["apple", "pear", "plum"], np.repeat(np.arange(3), 8)
    for fold in range(2):
        whose = {"labels": labels.tolist(), "subjects": (100 * fold + np.arange(24) // 2).tolist()}
        logits = [(draws.normal(size=(24, 3)) + 2 * np.eye(3)[labels] / (1 + step)).tolist() for step in range(4)]
        own = {"training": {}, "logits": logits[0], "attacked": logits[1:]}
        data = {"source": "x", "protocol": "patient", "fold": fold, "n_folds": 2, "fold_seed": 0}
        record = {"data": data, "budget": {"clean_epochs": 1, "epochs": 1, "weights": "scratch"}, "seed": 0}
        record |= {"model": {"backbone": "resnet34", "image_size": 64}, "baselines": {"majority": logits[3]}}
        record |= {"epsilons": [0, 1 / 255, 2 / 255], "attacks": ["FGSM"], "classes": classes}
        record |= {"test": whose, "attacked": whose, "models": {"hardened": own}}
        write_json(tmp_path / f"fold{fold}.json", record)
    summary = summarise(tmp_path)
    row = summary.rows["hardened"]
    assert not row.ranking and row.attacked is not None
    figure = folds_figure(summary)
    drawn = [value for line in figure.axes[0].containers for value in line[0].get_ydata()]
    shown = [row.metrics[0], *row.attacked.metrics[1:]]
    assert drawn == pytest.approx([100 * one["3 classes"].image.accuracy for one in shown])
    assert figure.axes[0].get_legend_handles_labels()[1] == ["majority (no attack)", "hardened"]
    assert figure.axes[0].get_ylabel() == "images that are right (%)"
    plt.close(figure)


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


@pytest.mark.parametrize(
    "change, named",
    [
        (["--epochs", "2"], r"fold0.json was made with other epochs \(1, not 2\)"),
        (["--clean-epochs", "3"], r"clean_epochs \(1, not 3\)"),
        (["--seed", "4"], r"fold_seed \(0, not 4\), seed \(0, not 4\)"),
        (["--n-folds", "4"], r"n_folds \(3, not 4\)"),
        (["--backbone", "resnet34"], r"backbone \(small, not resnet34\)"),
        (["--image-size", "48"], r"image_size \(32, not 48\)"),
        (["--max-images", "9"], r"max_images \(8, not 9\)"),
        (["--weights", "WEIGHTS"], r"weights \(scratch, not start.safetensors\)"),
    ],
)
def test_finished_folds_of_another_experiment_are_refused(
    change: list[str], named: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    _store_folds(command, tmp_path, monkeypatch)
    assert main(command) == 0
    before = (tmp_path / "out" / "summary.json").read_bytes()
    (tmp_path / "start.safetensors").write_bytes(b"some weights")
    change = [text.replace("WEIGHTS", str(tmp_path / "start.safetensors")) for text in change]
    capsys.readouterr()
    assert main([*command, *change]) == 1
    assert re.search(named, capsys.readouterr().err)
    assert (tmp_path / "out" / "summary.json").read_bytes() == before


def _store_folds(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds as the command writes them, with answers that took no training."""

    def score(splits, *, backbone, seed, budget, target, work, shared) -> None:
        whose = Whose.of(splits.test).plain()
        logits = torch.eye(4)[splits.test.labels].tolist()
        own = {"training": {}, "logits": logits, "attacked": [logits] * 3}
        record = {
            "data": splits.info,
            "budget": asdict(budget) | {"weights": weights_name(budget.weights)},
            "specification": dict(shared),
            "model": {"backbone": backbone, "num_classes": 4, "image_size": budget.image_size},
            "seed": seed,
            "epsilons": shared["epsilons"],
            "attacks": shared["attacks"],
            "classes": splits.classes,
            "baselines": {},
            "models": {"not hardened": own, "hardened": own},
        }
        write_json(target, record | {"test": whose, "attacked": whose})

    monkeypatch.setattr("utils.commands.folds.run_fold", score)
    assert main(command) == 0


def test_folds_of_other_data_are_refused_also_where_old_files_tell_less(
    command: list[str], phantoms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    _store_folds(command, tmp_path, monkeypatch)
    pixels = phantoms.pixels.copy()
    pixels[0, 60, 60] ^= 1
    other = replace(phantoms, pixels=pixels)
    split_and_save(other, group_by_subject(phantoms), split="patient", out=tmp_path / "data")
    for told in ("images", "fingerprint"):
        assert main(command) == 1 and f"other {told} (" in capsys.readouterr().err
        for path in (tmp_path / "out").glob("fold*.json"):
            fold = read_json(path)
            write_json(path, {name: value for name, value in fold.items() if name != "specification"})


def test_folds_of_two_experiments_are_not_pooled(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _store_folds(command, tmp_path, monkeypatch)
    path = tmp_path / "out" / "fold1.json"
    kept = read_json(path)
    for key in ("images", "image_size"):
        write_json(path, kept | {"specification": kept["specification"] | {key: 48}})
        with pytest.raises(ValueError, match=rf"folds with other {key} \(.*a folder for each"):
            summarise(tmp_path / "out")


@pytest.mark.parametrize(
    "content, told", [({}, " lacks data"), ([], ": its content is []"), ({"data": 3}, ": data is 3")]
)
def test_a_fold_that_is_not_whole_is_named(
    content: object, told: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_json(tmp_path / "out" / "fold1.json", content)
    assert main(command) == 1
    assert f"{tmp_path / 'out' / 'fold1.json'}{told}" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize(
    "patients, n_folds, advice",
    [
        ((3, 3), 5, "no number of folds works, prepare more patients"),
        ((5, 5), 30, "give --n-folds 4 or 5 or 6"),
        ((5, 5), 2, "give --n-folds 4 or 5 or 6"),
        ((5, 5), 1, "give --n-folds 4 or 5 or 6"),
        ((6, 2), 0, "give --n-folds 3 or 4 or 5 or 6 or 7 or 8"),
    ],
)
def test_folds_for_too_few_patients_are_refused_with_numbers_that_work(
    patients: tuple[int, int], n_folds: int, advice: str, tmp_path: Path, small_backbone, capsys
) -> None:
    raw = _few_patients(patients)
    split_and_save(raw, group_by_subject(raw), split="patient", ratios=(0.4, 0.3, 0.3), out=tmp_path / "data")
    command = ["--data", str(tmp_path / "data"), "--backbone", "small", "--out", str(tmp_path / "out")]
    command += ["--work", str(tmp_path / "work")]
    assert main([*command, "--n-folds", str(n_folds)]) == 1
    error = capsys.readouterr().err
    assert f"{sum(patients)} patients cannot be tested in {n_folds} folds" in error and advice in error
    splits = load_splits(tmp_path / "data")
    for works in re.findall(r"\d+", advice):
        for fold in range(int(works)):
            assert all(len(part) for _, part in fold_of(splits, fold, int(works), seed=0))


def _few_patients(patients: tuple[int, ...]) -> RawImages:
    """As many patients of each of the first classes."""
    raw = make_phantoms(PhantomConfig(n_subjects=24, n_levels=2))
    own = [np.unique(raw.subjects[raw.labels == label])[:n] for label, n in enumerate(patients)]
    kept = np.flatnonzero(np.isin(raw.subjects, np.concatenate(own)))
    return replace(
        raw,
        pixels=raw.pixels[kept],
        labels=raw.labels[kept],
        subjects=raw.subjects[kept],
        paths=[raw.paths[i] for i in kept],
        folders=[raw.folders[i] for i in kept],
        classes=raw.classes[: len(patients)],
    )


def _cut(content: dict, *places: str | int) -> None:
    for place in places[:-1]:
        content = content[place]
    del content[places[-1]]


_DAMAGES = {
    "an answer less": (("models", "hardened", "logits", 0), "hardened, logits: 1279 answers to 1280 images"),
    "a value less": (("models", "hardened", "logits", 0, 0), "hardened, logits: an answer that does not have 4 values"),
    "an attacked one less": (("models", "hardened", "attacked", 1, 3), "attacked: 159 answers to 160 images"),
    "a radius less": (("models", "hardened", "attacked", 2), "answers at 2 radii instead of 3"),
    "no hardened model": (("models", "hardened"), "do not have the same models (hardened)"),
    "a baseline less": (("baselines", "always the majority"), "do not have the same baselines (always the majority)"),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_fold_is_named_with_what_is_wrong(damage: str, tmp_path: Path) -> None:
    places, told = _DAMAGES[damage]
    for number in (0, 1):
        shutil.copy(ROOT / f"benchmarks/cross_validation/resnet34_64px/fold{number}.json", tmp_path)
    assert len(read_folds(tmp_path)) == 2
    content = read_json(tmp_path / "fold1.json")
    _cut(content, *places)
    write_json(tmp_path / "fold1.json", content)
    with pytest.raises(ValueError, match=rf"fold1.json.*{re.escape(told)}.*delete it"):
        read_folds(tmp_path)


def test_a_fold_under_another_name_is_refused(tmp_path: Path) -> None:
    content = read_json(ROOT / "benchmarks/cross_validation/resnet34_64px/fold1.json")
    write_json(tmp_path / "fold0.json", content)
    with pytest.raises(ValueError, match="fold0.json holds fold 1, so it was copied or renamed"):
        read_folds(tmp_path)
    content["data"]["fold"] = 7
    write_json(tmp_path / "fold7.json", content)
    with pytest.raises(ValueError, match=r"fold7.json: .*there are folds 0 to 4, and this is fold 7"):
        read_fold(tmp_path / "fold7.json")
    (tmp_path / "fold2.json").mkdir()
    with pytest.raises(ValueError, match=r"fold2.json is a folder"):
        read_fold(tmp_path / "fold2.json")


def test_a_seed_that_is_none_is_no_matter_of_patients(command: list[str], capsys) -> None:
    assert main([*command, "--seed=-1"]) == 1
    assert "seed must be a whole number from 0" in capsys.readouterr().err
