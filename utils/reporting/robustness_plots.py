"""Figures of attacked accuracy. Every function takes plain values and returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy  # loads its parts at their first use
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.core.radii import radius_label
from utils.reporting.style import COLOURS, axes_of, finish, legend_of_curves, line_style, mark_radius, percent_axis

_RADIUS = "eps (/255, L-infinity)"
_ROBUST = "robust accuracy (%)"
#: More bands than this in one axis hide each other.
MOST_BANDS = 2
#: A bin of fewer images than this, or than this share of all, says nothing.
FEWEST_IMAGES, LEAST_SHARE = 10, 0.02
#: Name -> radii, accuracies 0..1, and their intervals ([low, high] or None).
Curves = Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[Sequence[float] | None]]]


def plot_intervals(
    curves: Curves,
    *,
    title: str,
    original: float | None = None,
    radius: str = _RADIUS,
    scale: float = 255,
    note: str = "",
) -> Figure:
    """Robust accuracy over radii with bands, or, of more than ``MOST_BANDS`` curves, with bars set side by side.

    Args:
        curves: see :data:`Curves`.
        original: a radius to mark, that of the original work.
        radius: what the horizontal axis shows, with its unit.
        scale: factor from radii to that unit.
    """
    figure, axes = axes_of(size=(8.4, 4.4))
    _draw_curves(axes[0, 0], curves, scale)
    if original is not None:
        mark_radius(axes[0, 0], original, scale)
    shape = "band" if len(curves) <= MOST_BANDS else "bars"
    axes[0, 0].set(xlabel=radius, ylabel=f"{_ROBUST}, {shape}: 95 % over patients")
    legend_of_curves(axes[0, 0])
    return finish(figure, title, note)


def plot_intervals_apart(
    panels: Mapping[str, Curves], *, title: str, original: float | None = None, note: str = ""
) -> Figure:
    """A small axis for each backbone, all on the same scales, so that no more than two bands overlap.

    Args:
        panels: title of the axis -> its curves, see :func:`plot_intervals`.
        original: a radius to mark.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = axes_of(rows, columns, size=(4.6 * columns, 3 * rows + 0.7), sharex=True, sharey=True)
    for ax, (name, curves) in zip(axes.flat, panels.items()):
        _draw_curves(ax, curves, 255)
        if original is not None:
            mark_radius(ax, original)
        ax.set_title(name, fontsize=10)
        ax.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.97))
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    figure.supxlabel(_RADIUS, fontsize=10)
    figure.supylabel(f"{_ROBUST}, band: 95 % over patients", fontsize=10)
    return finish(figure, title, note)


def _draw_curves(ax: Axes, curves: Curves, scale: float) -> None:
    furthest = max((scale * max(radii) for radii, _, _ in curves.values()), default=1)
    for index, (name, (radii, accuracy, intervals)) in enumerate(curves.items()):
        bands = len(curves) <= MOST_BANDS
        aside = 0 if bands else 0.012 * furthest * (index - (len(curves) - 1) / 2)
        places = [scale * eps + aside for eps in radii]
        ax.plot(places, [100 * value for value in accuracy], label=name, **line_style(index))
        known = [(x, 100 * value, *bounds) for x, value, bounds in zip(places, accuracy, intervals) if bounds]
        if known:
            x, middle, low, high = np.array(known).T
            _draw_interval(ax, x, middle, 100 * low, 100 * high, colour=line_style(index)["color"], band=bands)
    percent_axis(ax)


def _draw_interval(
    ax: Axes, x: np.ndarray, middle: np.ndarray, low: np.ndarray, high: np.ndarray, *, colour: str, band: bool
) -> None:
    if band:
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    else:
        # a bootstrap interval need not hold the value itself
        error = [(middle - low).clip(min=0), (high - middle).clip(min=0)]
        ax.errorbar(x, middle, yerr=error, color=colour, linestyle="none", capsize=2, linewidth=1)


def plot_before_after(
    bars: Mapping[str, tuple[float | None, float | None]],
    *,
    names: tuple[str, str] = ("plain", "hardened"),
    unit: str = "accuracy (%)",
    condition: str = "",
    title: str,
    note: str = "",
) -> Figure:
    """Accuracy of two models under several conditions, or another share of theirs.

    Args:
        bars: condition -> shares 0..1 before and after; None where there is none.
        names: of the two models.
        unit: what the vertical axis shows.
        condition: what the horizontal one shows.
    """
    figure, axes = axes_of(size=(max(5.4, 1.1 * len(bars) + 2.4), 4.2))
    places = np.arange(len(bars))
    for number, (name, colour) in enumerate(zip(names, COLOURS)):
        heights = 100 * np.array([pair[number] for pair in bars.values()], dtype=float)
        drawn = axes[0, 0].bar(places + 0.38 * (number - 0.5), heights, 0.36, color=colour, label=name)
        texts = ["-" if np.isnan(height) else f"{height:.1f}" for height in heights]
        axes[0, 0].bar_label(drawn, texts, fontsize=9, padding=1)
    axes[0, 0].set_xticks(places, list(bars), fontsize=9)
    axes[0, 0].set(xlabel=condition, ylabel=unit)
    percent_axis(axes[0, 0])
    axes[0, 0].grid(axis="x", visible=False)
    axes[0, 0].legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return finish(figure, title, note)


def plot_heat_map(
    values: Mapping[str, Mapping[str, float]], *, title: str, rows: str, columns: str, note: str = ""
) -> Figure:
    """A table of shares in colour.

    Args:
        values: row -> column -> share 0..1; a missing entry stays blank.
        rows, columns: what they are.
    """
    import seaborn as sns  # slow to import

    across = list(dict.fromkeys(name for row in values.values() for name in row))
    table = np.array([[100 * row.get(name, np.nan) for name in across] for row in values.values()])
    figure, axes = axes_of(size=(0.95 * len(across) + 3, 0.55 * len(values) + 2.2))
    bar = {"label": "accuracy (%)"}
    sns.heatmap(table, annot=True, fmt=".0f", vmin=0, vmax=100, cmap="cividis", ax=axes[0, 0], cbar_kws=bar)
    axes[0, 0].set_xticklabels(across, rotation=35, ha="right", fontsize=8)
    axes[0, 0].set_yticklabels(list(values), rotation=0, fontsize=8)
    axes[0, 0].set(xlabel=columns, ylabel=rows)
    axes[0, 0].grid(False)
    return finish(figure, title, note)


def plot_reliability(
    models: Mapping[str, tuple[Sequence[float], Sequence[bool]]], *, title: str, bins: int = 10, note: str = ""
) -> Figure:
    """How often a model is right when it says how sure it is, with 95 % Wilson intervals over images.

    A bin of fewer than ``FEWEST_IMAGES`` images, or than ``LEAST_SHARE`` of them, is drawn hollow, without interval,
    and joined to nothing.

    Args:
        models: name -> highest probability of each image 0..1, and whether the answer was right.
        bins: of equal width.
    """
    figure, axes = axes_of(2, 1, size=(6.4, 6.2), height_ratios=(3, 1), sharex=True)
    axes[0, 0].plot([0, 1], [0, 1], color="grey", linestyle=":", label="as sure as right")
    edges = np.linspace(0, 1, bins + 1)
    for index, (name, (sure, right)) in enumerate(models.items()):
        aside = 0.008 * (index - (len(models) - 1) / 2)
        _draw_bins(axes[0, 0], binned(sure, right, bins), name, index, aside)
        axes[1, 0].stairs(np.histogram(sure, edges)[0], edges, color=line_style(index)["color"])
    axes[0, 0].set(ylabel="share of right answers", xlim=(0, 1), ylim=(-0.02, 1.02))
    axes[0, 0].legend(fontsize=8, loc="upper left")
    axes[1, 0].set(xlabel="probability of the answer", ylabel="images")
    told = f"bars: 95 % over images; hollow: fewer than {FEWEST_IMAGES} images or {100 * LEAST_SHARE:.0f} % in a bin"
    return finish(figure, title, note, told)


def binned(sure: Sequence[float], right: Sequence[bool], bins: int) -> list[tuple[float, float, float, float, bool]]:
    """For each bin that is not empty: mean probability, share of right answers, its interval, and whether it counts."""
    chances, answers = np.asarray(sure, dtype=float), np.asarray(right, dtype=bool)
    place = np.clip((chances * bins).astype(int), 0, bins - 1)
    fewest = max(FEWEST_IMAGES, LEAST_SHARE * len(chances))
    rows = []
    for own in (place == number for number in range(bins)):
        if n := int(own.sum()):
            hits = int(answers[own].sum())
            low, high = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
            rows.append((float(chances[own].mean()), hits / n, low, high, n >= fewest))
    return rows


def _draw_bins(
    ax: Axes, rows: Sequence[tuple[float, float, float, float, bool]], name: str, index: int, aside: float
) -> None:
    style = line_style(index)
    full = np.array([row[:4] for row in rows if row[4]]).reshape(-1, 4)
    x, middle, low, high = full.T
    error = [(middle - low).clip(min=0), (high - middle).clip(min=0)]
    ax.errorbar(x + aside, middle, yerr=error, label=name, capsize=2, elinewidth=1, **style)
    few = np.array([row[:2] for row in rows if not row[4]]).reshape(-1, 2)
    hollow = style | {"linestyle": "none", "markerfacecolor": "none", "markersize": 3}
    ax.plot(few[:, 0] + aside, few[:, 1], **hollow)


def plot_first_breaking(
    models: Mapping[str, Sequence[int]], epsilons: Sequence[float], *, title: str, scale: float = 255, note: str = ""
) -> Figure:
    """The smallest radius at which each image was misclassified.

    Args:
        models: name -> for each image the index into ``epsilons``, -1 where it stayed right.
        epsilons: radii, the first 0.
        scale: factor to the unit of the axis.
    """
    labels = ["without\nattack", *(f"{scale * eps:.3g}" for eps in epsilons[1:]), "at none"]
    figure, axes = axes_of(size=(0.8 * len(labels) + 2, 4))
    width = 0.8 / len(models)
    for index, (name, steps) in enumerate(models.items()):
        first = np.asarray(steps)
        counts = [(first == step).mean() for step in (*range(len(epsilons)), -1)]
        places = np.arange(len(labels)) + width * (index - (len(models) - 1) / 2)
        axes[0, 0].bar(places, 100 * np.array(counts), 0.94 * width, color=line_style(index)["color"], label=name)
    axes[0, 0].set_xticks(range(len(labels)), labels)
    axes[0, 0].set(xlabel="smallest eps at which misclassified (/255)", ylabel="share of images (%)")
    axes[0, 0].grid(axis="x", visible=False)
    axes[0, 0].legend(fontsize=9)
    return finish(figure, title, note)


def plot_step_sizes(
    alphas: Sequence[float],
    accuracy: Sequence[float],
    *,
    eps: float,
    steps: int,
    clean: float,
    n_images: int | None = None,
    n_subjects: int | None = None,
    title: str,
    note: str = "",
) -> Figure:
    """Accuracy under PGD with a fixed number of steps, over the step size: too small a step only looks like robustness.

    Args:
        alphas: step sizes in [0, 1].
        accuracy: 0..1, one a step size.
        eps: radius in [0, 1].
        steps: number of steps.
        clean: accuracy 0..1 without attack, on the same images.
        n_images, n_subjects: how many were attacked; None where that is not known.
    """
    figure, axes = axes_of(size=(7.6, 4.4))
    reach = [alpha * steps / eps for alpha in alphas]
    axes[0, 0].axvspan(min(reach) / 1.3, 1, color=COLOURS[1], alpha=0.12, label="cannot reach the edge of the ball")
    axes[0, 0].axhline(100 * clean, color="grey", linestyle=":", label="without attack")
    axes[0, 0].plot(reach, [100 * value for value in accuracy], **line_style(0), label=f"PGD-{steps}")
    axes[0, 0].axvline(2.5, color=COLOURS[2], linewidth=1, label="2.5 eps / steps, the default")
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xticks(reach, [f"{value:.2g}" for value in reach])
    axes[0, 0].minorticks_off()
    axes[0, 0].set(
        xlabel=f"alpha * steps / eps   (eps = {radius_label(eps)})",
        ylabel="accuracy that is left (%)",
        xlim=(min(reach) / 1.3, max(reach) * 1.3),
    )
    percent_axis(axes[0, 0])
    axes[0, 0].legend(fontsize=8)
    sample = f"{n_images} test images" if n_images else ""
    sample += f" of {n_subjects} patients" if n_images and n_subjects else ""
    return finish(figure, title, sample, note)
