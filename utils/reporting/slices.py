"""Pictures of slices: attacked ones, heat maps, the first picture, contact sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.core.radii import radius_label
from utils.evaluation.examples import AdversarialExample
from utils.reporting.style import COLOURS, axes_of, finish


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
        examples: as many rows of :class:`utils.evaluation.examples.AdversarialExample`.
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
    shown: dict[str, Any] = {"vmin": 0, "vmax": 1, "cmap": "gray"}
    ax.imshow(np.asarray(image), **shown | options)
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
            ax.set_title(caption if np.any(heat > 0) else f"{caption}, no heat", fontsize=9)
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


def plot_contact_sheet(
    images: torch.Tensor | np.ndarray, captions: Sequence[str], *, columns: int = 8, title: str, note: str = ""
) -> Figure:
    """Slices in a grid.

    Args:
        images: uint8, N x H x W or N x 1 x H x W.
    """
    pictures = np.asarray(images).reshape(len(images), *images.shape[-2:])
    rows = -(-len(pictures) // columns)
    figure, axes = axes_of(rows, columns, size=(1.3 * columns, 1.5 * rows + 0.5))
    for ax in axes.flat[len(pictures) :]:
        ax.axis("off")
    for ax, picture, caption in zip(axes.flat, pictures, captions):
        _show(ax, picture, vmin=0, vmax=255)
        ax.set_title(caption, fontsize=8)
    return finish(figure, title, note)
