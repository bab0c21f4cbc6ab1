"""Figures of all patients, each tested once in cross-validation: who is told apart, and what attacks leave of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.core.parts import read_part
from utils.core.radii import radius_label
from utils.data.classes import healthy_class
from utils.evaluation.intervals import bootstrap_counts
from utils.evaluation.metrics import Metrics
from utils.experiments.budget import describe_start
from utils.experiments.fold_records import FoldRecord, FoldsSummary
from utils.experiments.folds import SUMMARY, read_fold
from utils.experiments.patient_odds import PatientOdds, patient_odds
from utils.reporting.experiment_figures import folds_figure
from utils.reporting.style import COLOURS, axes_of, finish, percent_axis, save_figure

_GRID = np.linspace(0, 1, 101)


def save_fold_figures(folder: Path) -> list[Path]:
    """Draw all figures of one cross-validation beside its records.

    Args:
        folder: holds ``fold*.json`` and, made of all of them, ``summary.json``.
    """
    folds = [read_fold(path) for path in sorted(folder.glob("fold*.json"))]
    summary = read_part(FoldsSummary, folder / SUMMARY, "it is made by python -m utils folds")
    drawn = {"summary": folds_figure(summary), **patient_figures(folds, summary)}
    return [save_figure(figure, folder / f"{name}.png") for name, figure in drawn.items()]


def patient_figures(folds: Sequence[FoldRecord], summary: FoldsSummary) -> dict[str, Figure]:
    """All figures of the patients of one cross-validation, by file name.

    Args:
        folds: with validation answers, of which the thresholds are made; where a fold lacks them there is no figure.
    """
    if any(row.attacked is not None and row.at_threshold is None for row in summary.rows.values()):
        return {}
    models = {name: patient_odds(folds, name) for name in folds[0].models}
    return {
        "roc": roc_figure(models, summary),
        "each_patient": strip_figure(models, summary),
        "recall": recall_figure(summary),
    }


def roc_figure(models: dict[str, PatientOdds], summary: FoldsSummary) -> Figure:
    """ROC of two classes by patient at each radius, with pointwise 95 % bands over patients; a panel for each model."""
    figure, axes = axes_of(1, len(models), size=(4.3 * len(models), 4.8), sharey=True)
    for ax, (name, model) in zip(axes[0], models.items()):
        for number, (eps, odds) in enumerate(zip(summary.epsilons, model.odds)):
            middle, low, high = roc_band(odds.numpy(), model.ill.numpy())
            style = {"color": COLOURS[number], "linestyle": ("-", "--", ":")[number % 3]}
            ax.plot(100 * _GRID, 100 * middle, label=_radius(eps), **style)
            ax.fill_between(100 * _GRID, 100 * low, 100 * high, color=COLOURS[number], alpha=0.12, linewidth=0)
        ax.plot([0, 100], [0, 100], color="grey", linewidth=0.8)
        ax.set(title=name, xlabel=f"{_healthy(summary)} called ill (%)", xlim=(0, 100), ylim=(0, 100))
        ax.legend(loc="lower right", fontsize=8)
    axes[0, 0].set_ylabel("the other patients called ill (%)")
    return _finished(figure, summary, f"who is told from {_healthy(summary)}", "bands: 95 % over patients")


def roc_band(odds: np.ndarray, ill: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positive rate, and the ends of its 95 % interval over patients, at 101 false positive rates from 0 to 1.

    Args:
        odds: any score that grows with illness, P.
        ill: bool P, with both kinds in it.
    """
    counts = bootstrap_counts(len(odds))
    counts = counts[(counts @ ill > 0) & (counts @ ~ill > 0)]
    rates = true_positive_rates(odds, ill, counts)
    low, high = np.percentile(rates, [2.5, 97.5], axis=0)
    return rates[0], low, high


def true_positive_rates(odds: np.ndarray, ill: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What scikit-learn's ``roc_curve`` gives for each row of weights, for all rows at once; D x 101.

    Args:
        odds, ill: see :func:`roc_band`.
        counts: D x P, how often each patient is drawn, both kinds at least once.
    """
    order = np.argsort(-odds, kind="stable")
    # patients with the same score are called ill at the same threshold
    last = np.flatnonzero(np.diff(odds[order], append=-np.inf))
    called = [np.cumsum(counts[:, order] * kind[order], axis=1)[:, last] for kind in (~ill, ill)]
    false, true = (np.pad(number / number[:, -1:], ((0, 0), (1, 0))) for number in called)
    return np.stack([np.interp(_GRID, *rates) for rates in zip(false, true, strict=True)])


def strip_figure(models: dict[str, PatientOdds], summary: FoldsSummary) -> Figure:
    """Every patient as a mark, by true class, without attack and attacked; above the line it is called ill."""
    figure, axes = axes_of(1, len(models), size=(4.3 * len(models), 4.8), sharey=True)
    draws = np.random.default_rng(0)
    shown = range(min(2, len(summary.epsilons)))
    for ax, (name, model) in zip(axes[0], models.items()):
        for step in shown:
            aside = 0.36 * (step - (len(shown) - 1) / 2)
            x = model.labels.numpy() + aside + draws.uniform(-0.12, 0.12, len(model.labels))
            style = {"marker": "o^"[step], "color": COLOURS[step], "s": 12, "alpha": 0.7, "linewidths": 0}
            ax.scatter(x, model.odds[step].numpy(), label=_radius(summary.epsilons[step]), **style)
        ax.axhline(0, color="black", linewidth=0.8)
        names = [f"{one}\n({int((model.labels == k).sum())})" for k, one in enumerate(summary.classes)]
        ax.set_xticks(range(len(names)), names)
        ax.set_title(name)
    axes[0, 0].set_ylabel("log-odds of illness,\ncounted from the fold's threshold")
    axes[0, 0].legend(loc="best", fontsize=8)
    note = "one mark a patient; above the line it is called ill"
    return _finished(figure, summary, "where each patient lies", note)


def recall_figure(summary: FoldsSummary) -> Figure:
    """Recall of each class by patient, of both models, without attack and attacked: a collapse is seen."""
    rows = {name: row.attacked.metrics for name, row in summary.rows.items() if row.attacked is not None}
    shown = [(name, step) for step in range(min(2, len(summary.epsilons))) for name in rows]
    figure, axes = axes_of(size=(8.4, 4.4))
    ax, width = axes[0, 0], 0.8 / len(shown)
    for number, (name, step) in enumerate(shown):
        heights = [100 * share for share in _recall(rows[name][step], summary.classes)]
        x = np.arange(len(heights)) + width * (number - (len(shown) - 1) / 2)
        colour = COLOURS[list(rows).index(name)]
        style = {"color": colour if step == 0 else "none", "edgecolor": colour, "hatch": "///" * (step > 0)}
        bars = ax.bar(x, heights, 0.92 * width, label=f"{name}, {_radius(summary.epsilons[step])}", **style)
        ax.bar_label(bars, fmt="%.0f", fontsize=7)
    ax.set_xticks(range(len(summary.classes)), summary.classes)
    percent_axis(ax)
    ax.set_ylabel("recall by patient (%)")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return _finished(figure, summary, "recall before and after hardening")


def _healthy(summary: FoldsSummary) -> str:
    return f"{healthy_class(summary.classes)} patients"


def _recall(metrics: Metrics, classes: Sequence[str]) -> list[float]:
    found = metrics[f"{len(classes)} classes"].patient
    recall = found.recall if found else {}
    return [recall.get(one) or 0.0 for one in classes]


def _radius(eps: float) -> str:
    return "no attack" if eps == 0 else f"within {radius_label(eps)}"


def _finished(figure: Figure, summary: FoldsSummary, message: str, *notes: str) -> Figure:
    counts = f"{summary.n_subjects} patients, {summary.n_images.attacked} slices, each attacked by itself"
    return finish(figure, f"{describe_start(summary)}: {message}", counts, *notes)
