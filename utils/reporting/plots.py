"""Figures, all in one style. Every function takes plain values and returns a Figure."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from utils.core.paths import atomic_write
from utils.core.radii import ORIGINAL_EPS, radius_label
from utils.evaluation.leak_audit import LeakAudit
from utils.evaluation.worst_case import AdversarialExample

#: Okabe and Ito's colours, which people with colour-blindness can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: Of a written figure.
COLOURS_OF_A_FILE = 256
_STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
}


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG of at most ``COLOURS_OF_A_FILE`` colours atomically and return its path.

    A repository is cloned with all its figures; a palette takes a third of the space and shows the same.
    """
    target, drawn = Path(path), io.BytesIO()
    with plt.rc_context(_STYLE):  # savefig.dpi counts when a figure is saved, not when it is made
        figure.savefig(drawn, format="png")
    picture = Image.open(drawn)
    # not the median cut, which gives thin lines the colours of the areas around them
    few = picture.convert("RGB").quantize(COLOURS_OF_A_FILE, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    atomic_write(target, lambda file: few.save(file, "PNG", optimize=True, dpi=picture.info["dpi"]))
    return target


def axes_of(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure in the common style and its axes as a 2-D array; ``size`` in inches."""
    with plt.rc_context(_STYLE):
        return plt.subplots(rows, columns, figsize=size, squeeze=False, **options)


def finish(figure: Figure, title: str, *notes: str) -> Figure:
    """Give a figure its title and what must be said of its numbers, each from a line of its own, and close it."""
    # about eleven characters of this size fit into an inch
    lines = [part for text in (title, *notes) if text for part in textwrap.wrap(text, int(11 * figure.get_figwidth()))]
    figure.suptitle("\n".join(lines), fontsize=11)
    for legend in [*figure.legends, *filter(None, (ax.get_legend() for ax in figure.axes))]:
        legend.set_frame_on(False)
    # notebooks show what a cell returns; closing keeps them from showing it twice
    plt.close(figure)
    return figure


def percent_axis(ax: Axes, *, room: float = 6) -> None:
    """A vertical axis of percent whose ticks end at 100; ``room`` above is for labels."""
    ax.set_ylim(0, 100 + room)
    ax.set_yticks(range(0, 101, 20))
    ax.spines["left"].set_bounds(0, 100)


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
    histories: dict[str, Sequence[dict[str, float]]], key: str, *, title: str, unit: str, note: str = ""
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
        axes[0, 0].plot(epochs, [factor * entry[key] for entry in history], label=name, **line_style(index))
    axes[0, 0].set(xlabel="epoch", ylabel=unit)
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylim(bottom=0)
    if factor == 100:
        percent_axis(axes[0, 0])
    legend_of_curves(axes[0, 0])
    return finish(figure, title, note)


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the line with this number: told apart in grey, too."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": ("-", "--", ":", "-.")[index % 4],
        "marker": "os^D"[index % 4],
        "markersize": 4,
    }


def mark_radius(ax: Axes, eps: float, scale: float = 255) -> None:
    """A thin labelled line at a radius, under the curves; ``scale`` is the axis' unit a pixel unit."""
    ax.axvline(scale * eps, color="grey", linewidth=0.8, alpha=0.6)
    inside = f" = {scale * eps:.3g}/{scale:g}" if scale != 1 else ""
    ax.annotate(f" {eps:g}{inside}", (scale * eps, 101), fontsize=8, color="grey")


def legend_of_curves(ax: Axes) -> None:
    """A legend to the right of the axes, where it hides neither a curve nor a mark."""
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def plot_robustness_curve(
    curves: dict[str, tuple[Sequence[float], Sequence[float]]],
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
            [255 * eps for eps in radii],
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


def plot_adversarial_examples(
    parameters: Sequence[float],
    examples: Sequence[Sequence[AdversarialExample]],
    attack_name: str = "fgsm",
    parameter_type: str = "Epsilon",
    *,
    classes: Sequence[str] | None = None,
    model: str = "",
    note: str = "",
) -> Figure:
    """Attacked images, a row a parameter value, each beside its perturbation, with its true class and the answer.

    Args:
        parameters: values in [0, 1] of what is varied, one a row.
        examples: as many rows of :class:`utils.evaluation.worst_case.AdversarialExample`.
        attack_name: for the title, where the examples do not name their attack.
        parameter_type: ``Epsilon`` or ``Alpha``.
        classes: class names; None shows indices.
        model: name of the model that was attacked.

    Raises:
        ValueError: the numbers of parameters and of rows differ, or there is nothing to show.
    """
    if len(parameters) != len(examples) or not examples or not examples[0]:
        raise ValueError(f"{len(parameters)} parameters need as many non-empty rows, not {len(examples)}")
    names = classes or [str(label) for label in range(1 + max(e.label for row in examples for e in row))]
    size = (1.8 * len(examples[0]) + 1, 1.18 * len(examples) + 1)
    figure, axes = axes_of(len(examples), len(examples[0]), size=size)
    for value, row, row_axes in zip(parameters, examples, axes):
        for example, ax in zip(row, row_axes):
            right = example.attacked == example.label
            _show_with_change(ax, example, value if parameter_type == "Epsilon" else None)
            answer = names[example.attacked] if example.attacked < len(names) else str(example.attacked)
            ax.set_title(f"{names[example.label]} → {answer}", fontsize=9, color="black" if right else COLOURS[1])
        label = _row_label(value, row[0], parameter_type)
        row_axes[0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    attacks = dict.fromkeys(example.attack or attack_name.upper() for row in examples for example in row)
    of = f"{model}: slices under " if model else ""
    change = (
        "; beside each slice its change, blue -eps, white 0, red +eps" if examples[0][0].clean_image is not None else ""
    )
    told = f"true class → answer, orange where misclassified{change}"
    return finish(figure, f"{of}{' and '.join(attacks)}", told, note)


def _row_label(value: float, example: AdversarialExample, parameter_type: str) -> str:
    if parameter_type == "Epsilon":
        return f"eps\n{radius_label(value)}" if value else "no attack"
    fixed = "" if example.eps is None else f"\nat eps\n{radius_label(example.eps)}"
    return f"{parameter_type}\n{value:g}\n= {255 * value:.2g}/255{fixed}"


def _show_with_change(ax: Axes, example: AdversarialExample, eps: float | None) -> None:
    """The attacked image and, where the clean one is known, to its right the change, on a scale of ± eps."""
    height, width = example.image.shape[-2:]
    _show(ax, example.image[0], extent=(0, width, height, 0))
    if example.clean_image is None:
        return
    change = (example.image - example.clean_image)[0]
    bound = example.eps or eps or max(float(change.abs().max()), 1e-9)
    _show(
        ax,
        change,
        extent=(1.04 * width, 2.04 * width, height, 0),
        cmap="RdBu_r",
        vmin=-bound,
        vmax=bound,
        interpolation="nearest",
    )
    ax.set_xlim(0, 2.04 * width)


def _show(ax: Axes, image: torch.Tensor | np.ndarray, **options: Any) -> None:
    ax.imshow(np.asarray(image), **({"vmin": 0, "vmax": 1, "cmap": "gray"} | options))
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def plot_attack_strip(
    image: torch.Tensor,
    attacked: Sequence[torch.Tensor],
    probabilities: Sequence[Sequence[float]],
    epsilons: Sequence[float],
    classes: Sequence[str],
    *,
    label: int,
    attack: str = "PGD",
    note: str = "",
) -> Figure:
    """One image at growing attack strength: the image, its perturbation, the class probabilities.

    Args:
        image: clean, 1 x H x W in [0, 1].
        attacked: one such image a radius.
        probabilities: K probabilities a radius.
        epsilons: radii in [0, 1].
        label: true class.
        attack: its name and steps.
    """
    figure, axes = axes_of(3, len(epsilons), size=(1.9 * len(epsilons) + 0.6, 5.6))
    for column, (eps, picture, chances) in enumerate(zip(epsilons, attacked, probabilities)):
        difference = picture[0] - image[0]
        _show(axes[0, column], picture[0])
        axes[0, column].set_title(f"eps {radius_label(eps)}", fontsize=9)
        # one colour scale a column, so that half a grey level can be seen too
        _show(axes[1, column], difference, cmap="RdBu_r", vmin=-max(eps, 1e-9), vmax=max(eps, 1e-9))
        colours = [COLOURS[2] if k == label else COLOURS[1] for k in range(len(classes))]
        axes[2, column].barh(range(len(classes)), chances, color=colours)
        axes[2, column].set(xlim=(0, 1), yticks=range(len(classes)), yticklabels=classes if column == 0 else [])
        axes[2, column].invert_yaxis()
        axes[2, column].set_xlabel("probability", fontsize=8)
    axes[0, 0].set_ylabel("attacked image")
    axes[1, 0].set_ylabel("change, blue -eps,\nwhite 0, red +eps")
    return finish(figure, f"{attack} on one slice; true class {classes[label]} in green", note)


def plot_grad_cam(
    rows: Sequence[tuple[str, Sequence[torch.Tensor], Sequence[np.ndarray], Sequence[str]]],
    *,
    title: str,
    note: str = "",
) -> Figure:
    """Heat maps over grey slices.

    Args:
        rows: name, images 1 x H x W in [0, 1], maps H x W in [0, 1] each scaled to its own maximum, captions.
    """
    columns = max(len(images) for _, images, _, _ in rows)
    figure, axes = axes_of(len(rows), columns, size=(1.6 * columns + 1.4, 1.8 * len(rows) + 0.8))
    for (name, images, maps, captions), row_axes in zip(rows, axes):
        for ax in row_axes[len(images) :]:
            ax.axis("off")
        for ax, image, heat, caption in zip(row_axes, images, maps, captions):
            _show(ax, image[0])
            # where the map is zero the slice stays as it is
            shown = ax.imshow(heat, cmap="inferno", alpha=0.7 * np.clip(heat, 0, 1), vmin=0, vmax=1)
            ax.set_title(caption, fontsize=9)
        row_axes[0].set_ylabel(name, fontsize=9)
    bar = figure.colorbar(plt.cm.ScalarMappable(shown.norm, shown.cmap), ax=axes, shrink=0.6, aspect=30)
    bar.set_label("weight for the answer, share of the map's maximum", fontsize=9)
    told = "true class → answer; each map is scaled to its own maximum"
    return finish(figure, title, told, note)


def plot_hero(
    image: torch.Tensor,
    rows: Mapping[str, tuple[torch.Tensor, Sequence[Sequence[float]]]],
    classes: Sequence[str],
    *,
    label: int,
    eps: float,
    title: str,
    note: str = "",
) -> Figure:
    """One slice, a row a model: its perturbation, the attacked slice, and what the model says of both.

    Args:
        image: 1 x H x W in [0, 1].
        rows: model -> the slice as attacked to fool it, and its K probabilities before and after.
        classes: K names.
        label: true class.
        eps: radius in [0, 1].
    """
    figure, axes = axes_of(len(rows), 4, size=(10.5, 2.9 * len(rows) + 0.6), width_ratios=(1, 1, 1, 1.2))
    for (name, (attacked, probabilities)), row in zip(rows.items(), axes):
        before, after = (classes[int(np.argmax(chances))] for chances in probabilities)
        _show(row[0], image[0])
        _show(row[1], (attacked - image)[0], cmap="RdBu_r", vmin=-eps, vmax=eps)
        _show(row[2], attacked[0])
        row[0].set_ylabel(name, fontsize=11)
        row[0].set_title(f"slice of true class {classes[label]}\nanswer: {before}", fontsize=10)
        row[1].set_title(f"+ a change of at most {radius_label(eps)}\nblue -eps, white 0, red +eps", fontsize=10)
        fooled = "" if classes.index(after) == label else ", misclassified"
        row[2].set_title(f"= the slice as attacked\nanswer: {after}{fooled}", fontsize=10)
        _draw_answers(row[3], probabilities, classes)
    axes[0, 3].legend(fontsize=9)
    axes[-1, 3].set_xlabel("probability (%)")
    return finish(figure, title, note)


def _draw_answers(ax: Axes, probabilities: Sequence[Sequence[float]], classes: Sequence[str]) -> None:
    places = np.arange(len(classes))
    for offset, chances, colour, name in zip((-0.2, 0.2), probabilities, COLOURS, ("slice", "attacked slice")):
        ax.barh(places + offset, [100 * chance for chance in chances], 0.38, color=colour, label=name)
    ax.set(yticks=places, yticklabels=classes, xlim=(0, 100))
    ax.invert_yaxis()


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
        heights = 100 * np.nan_to_num(values)
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
    axes[0, 1].legend(fontsize=8, loc="upper left")
    return finish(figure, "A classifier that learns nothing: how much the split gives away", note)


def plot_contact_sheet(
    images: torch.Tensor | np.ndarray, captions: Sequence[str], *, columns: int = 8, title: str, note: str = ""
) -> Figure:
    """Slices in a grid.

    Args:
        images: uint8, N x H x W or N x 1 x H x W.
    """
    pictures = np.asarray(images).reshape(len(images), *images.shape[-2:])
    rows = -(-len(pictures) // columns)
    figure, axes = axes_of(rows, columns, size=(1.45 * columns, 1.7 * rows + 0.5))
    for ax in axes.flat[len(pictures) :]:
        ax.axis("off")
    for ax, picture, caption in zip(axes.flat, pictures, captions):
        _show(ax, picture, vmin=0, vmax=255)
        ax.set_title(caption, fontsize=8)
    return finish(figure, title, note)
