"""Figures of the patients of all folds: what is drawn is what the records tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from utils.core.paths import write_json
from utils.evaluation.metrics import illness_by_patient
from utils.experiments.fold_records import FoldRecord
from utils.experiments.folds import read_fold, summarise
from utils.experiments.paired import paired_gains, rankings
from utils.experiments.patient_odds import patient_odds
from utils.reporting.fold_tables import gains_table, hardening_gains_table
from utils.reporting.patient_figures import patient_figures, roc_band, true_positive_rates

CLASSES = ["Non", "VeryMild", "Mild", "Moderate"]


def write_fold(folder: Path, fold: int, *, shift: float, validation: bool = True) -> None:
    """Twelve patients of two slices; ``shift`` is added to the logit of the healthy class, as a fold's own scale."""
    draws = np.random.default_rng(fold)
    labels = np.repeat(np.arange(12) % 4, 2)
    logits = draws.normal(size=(24, 4)) + 2 * np.eye(4)[labels] + [shift, 0, 0, 0]
    attacked = logits - 3 * np.eye(4)[labels]
    simple = draws.normal(size=(24, 4)) + np.eye(4)[labels]
    whose = {"labels": labels.tolist(), "subjects": (100 * fold + np.arange(24) // 2).tolist()}
    own = {"training": {}, "logits": logits.tolist(), "attacked": [logits.tolist(), attacked.tolist()]}
    if validation:
        own["validation"] = logits.tolist()
    hard = own | {"attacked": [logits.tolist(), (logits - np.eye(4)[labels]).tolist()]}
    record = {
        "data": {"source": "x", "protocol": "patient", "fold": fold, "n_folds": 2, "fold_seed": 0},
        "budget": {"clean_epochs": 1, "epochs": 1, "weights": "scratch"},
        "model": {"backbone": "resnet34", "image_size": 64},
        "seed": 0,
        "epsilons": [0, 1 / 255],
        "attacks": ["FGSM"],
        "classes": CLASSES,
        "baselines": {"simple": simple.tolist()},
        "test": whose,
        "attacked": whose,
        "validation": whose,
        "models": {"not hardened": own, "hardened": hard},
    }
    write_json(folder / f"fold{fold}.json", record)


def folds_of(folder: Path) -> list[FoldRecord]:
    return [read_fold(path) for path in sorted(folder.glob("fold*.json"))]


def test_the_scale_of_a_fold_moves_no_patient_across_its_threshold(tmp_path: Path) -> None:
    for name, shift in (("same", 0.0), ("moved", 6.0)):
        (tmp_path / name).mkdir()
        write_fold(tmp_path / name, 0, shift=0.0)
        write_fold(tmp_path / name, 1, shift=shift)
    same, moved = (patient_odds(folds_of(tmp_path / name), "hardened") for name in ("same", "moved"))
    assert len(moved.odds[0]) == 24 and moved.ill.sum() == 18
    assert torch.equal(moved.labels != 0, moved.ill)
    areas = [roc_auc_score(model.ill, model.odds[0]) for model in (same, moved)]
    assert areas[1] == pytest.approx(areas[0], abs=0.05) and areas[0] > 0.8
    assert (moved.odds[1] < moved.odds[0])[moved.ill].float().mean() > 0.8  # attacked, the ill look healthier


def test_figures_show_the_numbers_of_the_records(tmp_path: Path) -> None:
    for fold in range(2):
        write_fold(tmp_path, fold, shift=0.0)
    folds, summary = folds_of(tmp_path), summarise(tmp_path)
    figures = patient_figures(folds, summary)
    assert set(figures) == {"roc", "each_patient", "recall"}
    left = figures["each_patient"].axes[0]
    odds = patient_odds(folds, "not hardened").odds
    for step, marks in enumerate(left.collections):
        assert np.asarray(marks.get_offsets())[:, 1] == pytest.approx(odds[step].numpy())
    assert left.get_xticklabels()[0].get_text() == "Non\n(6)"
    bars = figures["recall"].axes[0].containers
    metrics = summary.rows["hardened"].attacked.metrics[1]["4 classes"].patient
    assert [bar.get_height() for bar in bars[3]] == pytest.approx([100 * metrics.recall[name] for name in CLASSES])
    assert all("24 patients" in figure.get_suptitle() for figure in figures.values())


def test_without_validation_answers_there_is_no_threshold_and_no_figure(tmp_path: Path) -> None:
    write_fold(tmp_path, 0, shift=0.0, validation=False)
    write_fold(tmp_path, 1, shift=0.0)
    assert patient_figures(folds_of(tmp_path), summarise(tmp_path)) == {}
    with pytest.raises(ValueError, match="no threshold"):
        patient_odds(folds_of(tmp_path), "hardened")


def test_the_band_of_a_roc_holds_its_curve() -> None:
    draws = np.random.default_rng(0)
    ill = np.arange(60) % 2 == 0
    odds = draws.normal(size=60) + ill
    middle, low, high = roc_band(odds, ill)
    assert middle.mean() == pytest.approx(roc_auc_score(ill, odds), abs=0.02)
    assert (low <= middle + 1e-9).all() and (middle <= high + 1e-9).all() and (high - low).max() > 0.1
    assert roc_band(ill.astype(float), ill)[0].min() == 1.0  # told apart perfectly


def test_a_roc_over_draws_is_what_scikit_learn_says_of_each() -> None:
    draws = np.random.default_rng(0)
    ill = np.arange(40) % 3 == 0
    odds = (3 * draws.normal(size=40) + ill).round()  # with ties
    counts = np.stack([np.ones(40), *draws.multinomial(40, np.full(40, 1 / 40), size=20)])
    for row, rates in zip(counts, true_positive_rates(odds, ill, counts), strict=True):
        false, true, _ = roc_curve(ill, odds, sample_weight=row, drop_intermediate=False)
        assert rates == pytest.approx(np.interp(np.linspace(0, 1, 101), false, true), abs=1e-12)


def test_models_are_compared_with_baselines_and_each_other_on_the_same_patients(tmp_path: Path) -> None:
    for fold in (0, 1):
        write_fold(tmp_path, fold, shift=0.0)
    folds, summary = folds_of(tmp_path), summarise(tmp_path)

    def mean_area(pick) -> float:
        found = [illness_by_patient(torch.tensor(pick(fold)), fold.test.bare(CLASSES)) for fold in folds]
        return float(np.mean([roc_auc_score(ill, chances) for chances, ill in found]))

    gains = summary.rows["hardened"].gains
    assert {name: len(found) for name, found in gains.items()} == {"simple": 1, "not hardened": 2}
    simple = mean_area(lambda fold: fold.baselines["simple"])
    clean, plain, hard = (
        mean_area(lambda fold, name=name, step=step: fold.models[name].attacked[step])
        for name, step in (("hardened", 0), ("not hardened", 1), ("hardened", 1))
    )
    assert gains["simple"][0].value == pytest.approx(clean - simple)
    assert [one.value for one in gains["not hardened"]] == pytest.approx([0, hard - plain]) and hard > plain
    assert summary.rows["simple"].gains == {} and len(summary.rows["simple"].ranking) == 1
    assert [one.value for one in summary.rows["hardened"].ranking] == pytest.approx([clean, hard])
    table, hardening = gains_table([summary]), hardening_gains_table([summary])
    assert "| model minus | simple |" in table
    assert f"| ResNet34, 64 px, hardened | {100 * (clean - simple):+.1f} [" in table
    assert f"| ResNet34, 64 px | +0.0 [+0.0, +0.0] | {100 * (hard - plain):+.1f} [" in hardening
    nobody = [fold.model_copy(update={"classes": ["a", "b", "c", "d"]}) for fold in folds]
    assert paired_gains(nobody, "hardened") == {} and rankings(nobody, "hardened") == []
