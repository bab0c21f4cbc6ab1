"""Figures, all in one style. Every function takes plain values and returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.core.radii import ORIGINAL_EPS, grey_levels
from utils.evaluation.leak_audit import LeakAudit
from utils.reporting.style import COLOURS, axes_of, finish, legend_of_curves, line_style, mark_radius, percent_axis


def plot_confusion_matrix(
    confusion: Sequence[Sequence[int]], classes: Sequence[str], *, title: str, note: str = ""
) -> Figure:
    """Counts, coloured by the share of each true class.

    Args:
        confusion: K x K counts; rows are the true class, columns the prediction.
        classes: K names in label order.
    """
    counts = np.asarray(confusion)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    labels = np.array([[f"{n}\n{s:.0%}" for n, s in zip(*row)] for row in zip(counts, shares)])
    import seaborn as sns  # slow to import

    figure, axes = axes_of(size=(5.4, 4.6))
    sns.heatmap(
        shares,
        annot=labels,
        fmt="",
        vmin=0,
        vmax=1,
        cmap="Blues",
        ax=axes[0, 0],
        cbar_kws={"label": "share of the true class"},
    )
    axes[0, 0].set_xticklabels(classes, rotation=0)
    axes[0, 0].set_yticklabels(classes, rotation=0)
    axes[0, 0].set(xlabel="predicted", ylabel="true")
    axes[0, 0].grid(False)
    return finish(figure, title, note)


def plot_loss_curve(
    history: Sequence[dict[str, float]],
    *,
    title: str,
    best_epoch: int | None = None,
    training: str = "",
    note: str = "",
) -> Figure:
    """Training and validation loss over epochs.

    Args:
        training: what the training's loss is of; "" says whether its images were attacked.
    """
    attacked = "validation_robust_accuracy" in history[0]
    trained_on = training or ("attacked images" if attacked else "clean images")
    lines = {"train_loss": f"training,\n{trained_on}", "validation_loss": "validation,\nclean images"}
    return _plot_history(history, lines, "loss (nats)", title, best_epoch, note)


def plot_accuracy_curve(
    history: Sequence[dict[str, float]], *, title: str, best_epoch: int | None = None, note: str = ""
) -> Figure:
    """Training and validation accuracy over epochs, and robust accuracy where it was measured."""
    lines = {
        "train_accuracy": "training" + (" (attacked)" if "validation_robust_accuracy" in history[0] else " (clean)"),
        "validation_accuracy": "validation (clean)",
        "validation_balanced_accuracy": "validation, balanced (clean)",
        "validation_fgsm_accuracy": "validation, balanced, FGSM",
        "validation_robust_accuracy": "validation, balanced, PGD-10",
    }
    return _plot_history(history, lines, "accuracy (%)", title, best_epoch, note, percent=True)


def _plot_history(
    history: Sequence[dict[str, float]],
    lines: dict[str, str],
    unit: str,
    title: str,
    best_epoch: int | None,
    note: str,
    percent: bool = False,
) -> Figure:
    figure, axes = axes_of(size=(8.4, 4))
    epochs = [entry["epoch"] + 1 for entry in history]
    for index, (key, label) in enumerate(lines.items()):
        if key in history[0]:
            values = [entry[key] * (100 if percent else 1) for entry in history]
            axes[0, 0].plot(epochs, values, label=label, **line_style(index))
    if best_epoch is not None:
        axes[0, 0].axvline(best_epoch + 1, color="grey", linestyle=":", label="kept weights")
    collapsed = [entry["epoch"] + 1 for entry in history if entry.get("collapsed")]
    for place in collapsed:
        label = "collapsed, taken back" if place == collapsed[0] else "_again"
        axes[0, 0].axvline(place, color=COLOURS[1], linestyle="--", label=label)
    axes[0, 0].set(xlabel="epoch", ylabel=unit)
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    if percent:
        percent_axis(axes[0, 0])
    else:
        axes[0, 0].set_ylim(bottom=0)
    legend_of_curves(axes[0, 0])
    return finish(figure, title, note)


def plot_member_curves(
    histories: Mapping[str, Sequence[dict[str, float]]], key: str, *, title: str, unit: str, note: str = ""
) -> Figure:
    """One line a model over its own epochs.

    Args:
        histories: name -> history entries of :func:`utils.training.loop.train`.
        key: which number of an entry; shares in percent where ``unit`` says so.
    """
    figure, axes = axes_of(size=(8.4, 4))
    factor = 100 if "%" in unit else 1
    for index, (name, history) in enumerate(histories.items()):
        epochs = [entry["epoch"] + 1 for entry in history]
        shown = [factor * entry[key] for entry in history]
        axes[0, 0].plot(epochs, shown, label=name, clip_on=False, **line_style(index))
    axes[0, 0].set(xlabel="epoch", ylabel=unit)
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylim(bottom=0)
    if factor == 100:
        percent_axis(axes[0, 0])
    legend_of_curves(axes[0, 0])
    return finish(figure, title, note)


def plot_robustness_curve(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    chance: float | None = None,
    note: str = "",
) -> Figure:
    """Robust accuracy over the radius of the attack.

    Args:
        curves: name -> (radii in [0, 1], robust accuracies 0..1).
        chance: accuracy 0..1 of always answering the most frequent class, drawn as a line.
    """
    figure, axes = axes_of(size=(8, 4))
    for index, (name, (radii, accuracy)) in enumerate(curves.items()):
        axes[0, 0].plot(
            grey_levels(radii),
            [100 * value for value in accuracy],
            label=name,
            **line_style(index),
        )
    if chance is not None:
        axes[0, 0].axhline(100 * chance, color="grey", linestyle=":", label="most frequent class")
    mark_radius(axes[0, 0], ORIGINAL_EPS)
    axes[0, 0].set(xlabel="eps (/255, L-infinity)", ylabel="robust accuracy (%)")
    percent_axis(axes[0, 0])
    legend_of_curves(axes[0, 0])
    return finish(figure, title, note)


def plot_optuna_history(trials: Sequence[dict[str, Any]], *, title: str, unit: str, note: str = "") -> Figure:
    """Each trial's score and the best so far.

    Args:
        trials: entries with ``number``, ``state`` and ``value`` (0..1, or None where it failed).
        unit: what the score is.
    """
    figure, axes = axes_of(size=(6.4, 4))
    for state, marker, colour in (("complete", "o", COLOURS[0]), ("pruned", "x", COLOURS[4])):
        own = [t for t in trials if t["state"] == state and t["value"] is not None]
        if own:
            values = [100 * t["value"] for t in own]
            axes[0, 0].scatter([t["number"] + 1 for t in own], values, marker=marker, color=colour, label=state)
    done = [t for t in trials if t["state"] == "complete"]
    best = np.maximum.accumulate([100 * t["value"] for t in done])
    axes[0, 0].step([t["number"] + 1 for t in done], best, where="post", color=COLOURS[1], label="best so far")
    axes[0, 0].set(xlabel="trial", ylabel=f"{unit} (%)")
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].legend()
    return finish(figure, title, note)


def plot_optuna_importance(importance: dict[str, float], *, title: str, note: str = "") -> Figure:
    """Share of the score's variance that each hyperparameter explains (fANOVA)."""
    figure, axes = axes_of(size=(6.4, 0.45 * len(importance) + 1.6))
    names = sorted(importance, key=importance.__getitem__)
    bars = axes[0, 0].barh(names, [100 * importance[name] for name in names], color=COLOURS[0])
    axes[0, 0].bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axes[0, 0].set(xlabel="importance (% of the variance between trials)", xlim=(0, 108), xticks=range(0, 101, 20))
    return finish(figure, title, note)


def plot_optuna_pareto(
    trials: Sequence[dict[str, Any]], *, chosen: int, floor: float, attack: str, title: str, note: str = ""
) -> Figure:
    """Accuracy without and under attack of each finished trial, and which ones no other beats in both.

    Args:
        trials: entries with ``number``, ``clean`` and ``robust``, 0..1.
        chosen: number of the trial whose parameters were taken.
        floor: least accuracy without attack, 0..1; 0 draws none.
        attack: what the models were attacked with.
    """
    figure, axes = axes_of(size=(6.4, 4.4))
    ax = axes[0, 0]
    points = {t["number"]: (100 * t["clean"], 100 * t["robust"]) for t in trials}
    ordered = sorted(points.values(), reverse=True)
    front = [point for rank, point in enumerate(ordered) if all(point[1] > other[1] for other in ordered[:rank])]
    ax.scatter(*zip(*points.values()), color=COLOURS[0], label="trial")
    ax.step(*zip(*front), where="post", color=COLOURS[1], label="not beaten in both")
    ax.scatter(*points[chosen], marker="*", s=180, color=COLOURS[2], edgecolor="black", zorder=3, label="chosen")
    if floor:
        ax.axvline(100 * floor, color="black", linestyle=":", label="floor")
    ax.set(xlabel="balanced accuracy without attack (%)", ylabel=f"balanced accuracy, {attack} (%)")
    ax.legend()
    return finish(figure, title, note)


def plot_leak_audit(audits: Sequence[LeakAudit], *, note: str = "") -> Figure:
    """What a split gives away: 1-NN accuracy beside the majority, and how near the training set is."""
    figure, axes = axes_of(1, 2, size=(10, 4.4))
    bars = {
        "1-NN on raw pixels": [a.accuracy for a in audits],
        "nearest image is the same patient": [a.same_patient for a in audits],
        "always the majority": [a.majority for a in audits],
    }
    places = np.arange(len(audits))
    for index, (name, values) in enumerate(bars.items()):
        heights = 100 * np.nan_to_num(np.array(values, dtype=float))
        drawn = axes[0, 0].bar(places + 0.27 * (index - 1), heights, 0.25, color=COLOURS[index], label=name)
        axes[0, 0].bar_label(drawn, fmt="%.1f", fontsize=8)
    axes[0, 0].set(
        xticks=places, xticklabels=[f"{a.protocol} split" for a in audits], ylabel="share of test images (%)"
    )
    percent_axis(axes[0, 0])
    axes[0, 0].legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    low = min(float(a.correlations.min()) for a in audits)
    for index, audit in enumerate(audits):
        axes[0, 1].hist(
            audit.correlations,
            bins=np.linspace(low, 1, 60),
            color=COLOURS[index],
            alpha=0.6,
            weights=np.full(audit.n_test, 100 / audit.n_test),
            label=f"{audit.protocol} split, highest {audit.max_correlation:.3f}",
        )
    axes[0, 1].set(xlabel="highest correlation with a training image", ylabel="share of test images (%)")
    axes[0, 1].legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return finish(figure, "A classifier that learns nothing: how much the split gives away", note)
