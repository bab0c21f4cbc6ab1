"""Records as types: every committed one reads, loses nothing, and what is none is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from sklearn.metrics import roc_auc_score

from utils.core.parts import Part, plain, read_part
from utils.core.paths import read_json, write_json
from utils.evaluation.calibration import Calibration
from utils.evaluation.curve import RobustnessCurve
from utils.evaluation.metrics import illness_by_patient
from utils.evaluation.robustness import SuiteRecord
from utils.experiments.answer_records import Answer
from utils.experiments.atlas.chapters import CHAPTERS, ChapterRecord, read_chapter
from utils.experiments.fold_records import FoldRecord, FoldsSummary
from utils.experiments.folds import read_fold
from utils.experiments.paired import paired_gains, rankings
from utils.experiments.recipe_records import RecipesSummary, RunRecord
from utils.training.record import SCHEMA, ModelRecord, VoteRecord, parse_record, read_record_file

MODELS = sorted(ROOT.glob("**/checkpoints/*/record.json"))
#: Folders of experiments whose folds are kept.
KINDS = ("benchmarks/cross_validation", "benchmarks/combinations")
ATLASES = ("assets/Atlas", "benchmarks/atlases/efficientnet_imagenet_64px")
CHAPTER_FILES = sorted(path for folder in ATLASES for path in ROOT.glob(f"{folder}/*.json"))
OTHERS: list[tuple[type[Part], Path]] = [
    *((SuiteRecord, path) for path in sorted(ROOT.glob("**/checkpoints/*/robustness_*.json"))),
    *((FoldRecord, path) for folder in KINDS for path in sorted(ROOT.glob(f"{folder}/*/fold*.json"))),
    *((FoldsSummary, path) for folder in KINDS for path in sorted(ROOT.glob(f"{folder}/*/summary.json"))),
    *((RunRecord, path) for path in sorted(ROOT.glob("benchmarks/recipes/*/*_seed*.json"))),
    *((Calibration, path) for path in sorted(ROOT.glob("checkpoints/*/calibration.json"))),
    *((Answer, path) for path in sorted(ROOT.glob("assets/Predict/*.json"))),
    *((ChapterRecord, path) for path in CHAPTER_FILES),
    *((RecipesSummary, path) for path in sorted(ROOT.glob("benchmarks/recipes/*/summary.json"))),
]
FOLDS = sorted(path.parent for folder in KINDS for path in ROOT.glob(f"{folder}/*/summary.json"))
#: Names that had blanks in older files.
RENAMED = {"best member": "best_member", "transfer only": "transfer_only"}


def _comparable(value: object) -> object:
    """Without the budget, to which newer settings are added, and with today's names."""
    if isinstance(value, dict):
        return {RENAMED.get(key, key): _comparable(own) for key, own in value.items() if key != "budget"}
    return [_comparable(own) for own in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", MODELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_records_of_models_read_and_lose_nothing(path: Path) -> None:
    record = read_record_file(path)
    assert isinstance(record, VoteRecord if path.parent.name == "Ensemble" else ModelRecord)
    assert record.tested.n > 0 and record.robustness and record.worst_case
    assert _comparable(json.loads(json.dumps(record.plain()))) == _comparable(read_json(path))


@pytest.mark.parametrize(
    "kind, path", OTHERS, ids=lambda one: str(one.relative_to(ROOT)) if isinstance(one, Path) else ""
)
def test_all_other_committed_records_read_and_lose_nothing(kind: type[Part], path: Path) -> None:
    record = read_part(kind, path, "")
    assert _comparable(json.loads(json.dumps(record.plain()))) == _comparable(read_json(path))


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDS, ids=lambda path: path.name)
def test_a_summary_of_folds_tells_what_its_folds_answered(folder: Path) -> None:
    summary = read_part(FoldsSummary, folder / "summary.json", "")
    folds = [read_fold(path) for path in sorted(folder.glob("fold*.json"))]
    assert summary.n_subjects == sum(len(set(fold.test.subjects)) for fold in folds)
    for name, row in summary.rows.items():
        assert row.ranking == rankings(folds, name)
        assert row.gains == (paired_gains(folds, name) if name in folds[0].models else {})
        answers = [fold.models[name].logits if name in fold.models else fold.baselines[name] for fold in folds]
        sets = [fold.test.bare(fold.classes) for fold in folds]
        asked = [illness_by_patient(torch.tensor(own), images) for own, images in zip(answers, sets)]
        areas = [roc_auc_score(ill, chances) for chances, ill in asked]
        assert row.auroc_by_fold[0] == pytest.approx(areas, abs=1e-5)


def test_there_are_records_of_each_kind() -> None:
    assert len(MODELS) >= 14 and len({kind for kind, _ in OTHERS}) == 8


@pytest.mark.parametrize("folder", ATLASES)
def test_an_atlas_has_all_chapters(folder: str) -> None:
    assert {path.stem for path in (ROOT / folder).glob("*.json")} == set(CHAPTERS)


@pytest.mark.parametrize("path", CHAPTER_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_chapter_of_an_atlas_found_reads_as_its_type(path: Path) -> None:
    name = path.stem
    record, found = read_chapter(path.parent, name)
    assert json.loads(json.dumps(found.plain())) == record.found
    assert record.question == CHAPTERS[name].question and record.facts["section"] == name


def _curve(**change: object) -> dict:
    whole = {"title": "FGSM", "attacks": [{"title": "FGSM", "name": "fgsm"}], "threat": {"title": "L-inf"}}
    whole |= {"epsilons": [0.0, 0.1], "robust_accuracy": [1.0, 0.5], "rounded_accuracy": [1.0, None]}
    whole |= {"first_broken": [-1, 1], "broken_by": [-1, 0], "n_images": 2, "n_subjects": 1, "max_norm": [0.0, 0.1]}
    return whole | {"seconds": 1.0} | change


def test_a_curve_tells_which_images_are_robust_and_refuses_lists_that_do_not_match() -> None:
    curve = RobustnessCurve.model_validate(_curve())
    assert curve.at(0.1) == 0.5 and curve.robust(1).tolist() == [True, False] and curve.robust(0).all()
    assert curve.labels == ["clean", "25.5/255"]
    l2 = RobustnessCurve.model_validate(_curve(threat={"title": "L2", "norm": "l2"}))
    assert l2.labels == ["clean", "L2 0.1"]
    assert curve == RobustnessCurve.model_validate(curve.plain()) and curve.attacks[0].title == "FGSM"
    for change in ({"max_norm": [0.0]}, {"first_broken": [-1]}, {"n_images": 3}, {"epsilons": [0.0, 0.1, 0.2]}):
        with pytest.raises(ValueError, match="as long as each other|entries"):
            RobustnessCurve.model_validate(_curve(**change))


def _training(best_epoch: int) -> dict:
    """A training of two epochs."""
    content = read_json(ROOT / "checkpoints" / "ResNet34" / "record.json")["training"]
    return content | {"history": content["history"][:2], "best_epoch": best_epoch}


MODEL = {"model": {"backbone": "resnet34", "num_classes": 4, "image_size": 32}}


@pytest.mark.parametrize(
    "content, told",
    [
        ([], "does not describe a model"),
        ({"classes": []}, "does not describe a model"),
        (MODEL | {"robustness": {"FGSM": _curve(seconds="long")}}, "x: robustness.FGSM.seconds is 'long'"),
        (MODEL | {"classes": "Non"}, "x: classes is 'Non'; input should be a valid list"),
        (MODEL | {"test": {"image": {}}}, "x lacks test.image.n"),
        ({"vote": {"rule": "soft", "weights": {}}}, "x lacks vote.members"),
        (MODEL | {"schema_version": SCHEMA + 1}, f"reads up to {SCHEMA}"),
        (MODEL | {"schema_version": 0}, "no version 0 of a record"),
        (MODEL | {"training": _training(best_epoch=2)}, "best_epoch 2 is none of the 2 epochs"),
    ],
)
def test_what_is_no_record_is_named(content: object, told: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_record(content, "x")
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_what_a_type_does_not_know_is_kept(tmp_path: Path) -> None:
    content = MODEL | {"scanner": {"field": 3}}
    write_json(tmp_path / "record.json", content)
    assert plain({"all": [read_record_file(tmp_path / "record.json")]}) == {"all": [content]}
