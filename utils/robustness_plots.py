"""Figures of attacked accuracy. Every function takes plain values and returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from utils.plots import COLOURS, axes_of, finish, legend_of_curves, line_style, mark_radius

_RADIUS = "eps (grey levels of 255, L-infinity)"
_ROBUST = "robust accuracy (%)"


def plot_intervals(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[Sequence[float] | None]]],
    *,
    title: str,
    original: float | None = None,
    radius: str = _RADIUS,
    scale: float = 255,
    note: str = "",
) -> Figure:
    """Robust accuracy over radii with bands.

    Args:
        curves: name -> radii, accuracies 0..1, and their intervals ([low, high] or None).
        original: a radius to mark, that of the original work.
        radius: what the horizontal axis shows, with its unit.
        scale: factor from radii to that unit.
    """
    figure, axes = axes_of(size=(8.4, 4.4))
    ax = axes[0, 0]
    for index, (name, (radii, accuracy, intervals)) in enumerate(curves.items()):
        places = [scale * eps for eps in radii]
        ax.plot(places, [100 * value for value in accuracy], label=name, **line_style(index))
        known = [(x, *bounds) for x, bounds in zip(places, intervals) if bounds]
        if known:
            x, low, high = zip(*known)
            colour = line_style(index)["color"]
            ax.fill_between(x, 100 * np.array(low), 100 * np.array(high), color=colour, alpha=0.15, linewidth=0)
    if original is not None:
        mark_radius(ax, original, scale)
    ax.set(xlabel=radius, ylabel=f"{_ROBUST}, band: 95 % over patients", ylim=(0, 106))
    legend_of_curves(ax)
    return finish(figure, title, note)


def plot_before_after(
    bars: Mapping[str, tuple[float, float]],
    *,
    names: tuple[str, str] = ("plain", "hardened"),
    title: str,
    note: str = "",
) -> Figure:
    """Accuracy of two models under several conditions.

    Args:
        bars: condition -> accuracies 0..1 before and after.
        names: of the two models.
    """
    figure, axes = axes_of(size=(1.1 * len(bars) + 2.4, 4))
    places = np.arange(len(bars))
    for number, (name, colour) in enumerate(zip(names, COLOURS)):
        heights = [100 * pair[number] for pair in bars.values()]
        drawn = axes[0, 0].bar(places + 0.38 * (number - 0.5), heights, 0.36, color=colour, label=name)
        axes[0, 0].bar_label(drawn, fmt="%.0f", fontsize=8, padding=1)
    axes[0, 0].set_xticks(places, list(bars), fontsize=8)
    axes[0, 0].set(ylabel="accuracy (%)", ylim=(0, 108))
    axes[0, 0].grid(axis="x", visible=False)
    axes[0, 0].legend()
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
    """How often a model is right when it says how sure it is.

    Args:
        models: name -> highest probability of each image 0..1, and whether the answer was right.
        bins: of equal width.
    """
    figure, axes = axes_of(2, 1, size=(5.4, 5.6), height_ratios=(3, 1), sharex=True)
    axes[0, 0].plot([0, 1], [0, 1], color="grey", linestyle=":", label="as sure as right")
    edges = np.linspace(0, 1, bins + 1)
    for index, (name, (sure, right)) in enumerate(models.items()):
        sure, right = np.asarray(sure), np.asarray(right, dtype=float)
        place = np.clip((sure * bins).astype(int), 0, bins - 1)
        filled = [bin_ for bin_ in range(bins) if (place == bin_).any()]
        means = [(sure[place == bin_].mean(), right[place == bin_].mean()) for bin_ in filled]
        axes[0, 0].plot(*zip(*means), label=name, **line_style(index))
        axes[1, 0].stairs(np.histogram(sure, edges)[0], edges, color=line_style(index)["color"])
    axes[0, 0].set(ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1.02))
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].set(xlabel="probability of the answer", ylabel="images")
    return finish(figure, title, note)


def plot_first_breaking(
    models: Mapping[str, Sequence[int]], epsilons: Sequence[float], *, title: str, scale: float = 255, note: str = ""
) -> Figure:
    """At which radius each image was first broken.

    Args:
        models: name -> for each image the index into ``epsilons``, -1 where it stood.
        epsilons: radii, the first 0.
        scale: factor to the unit of the axis.
    """
    labels = ["wrong\nclean", *(f"{scale * eps:.3g}" for eps in epsilons[1:]), "never"]
    figure, axes = axes_of(size=(0.8 * len(labels) + 2, 4))
    width = 0.8 / len(models)
    for index, (name, steps) in enumerate(models.items()):
        steps = np.asarray(steps)
        counts = [(steps == step).mean() for step in (*range(len(epsilons)), -1)]
        places = np.arange(len(labels)) + width * (index - (len(models) - 1) / 2)
        axes[0, 0].bar(places, 100 * np.array(counts), 0.94 * width, color=line_style(index)["color"], label=name)
    axes[0, 0].set_xticks(range(len(labels)), labels)
    axes[0, 0].set(xlabel="first broken at eps (grey levels of 255)", ylabel="share of images (%)")
    axes[0, 0].grid(axis="x", visible=False)
    axes[0, 0].legend(fontsize=8)
    return finish(figure, title, note)


def plot_step_sizes(
    alphas: Sequence[float],
    accuracy: Sequence[float],
    *,
    eps: float,
    steps: int,
    clean: float,
    title: str,
    note: str = "",
) -> Figure:
    """Accuracy under PGD with a fixed number of steps, over the step size: too small a step only looks like robustness.

    Args:
        alphas: step sizes in [0, 1].
        accuracy: 0..1, one a step size.
        eps: radius in [0, 1].
        steps: number of steps.
        clean: accuracy 0..1 without attack.
    """
    figure, axes = axes_of(size=(6.4, 4))
    reach = [alpha * steps / eps for alpha in alphas]
    axes[0, 0].axvspan(min(reach) / 1.3, 1, color=COLOURS[1], alpha=0.12, label="cannot reach the edge of the ball")
    axes[0, 0].axhline(100 * clean, color="grey", linestyle=":", label="without attack")
    axes[0, 0].plot(reach, [100 * value for value in accuracy], **line_style(0), label=f"PGD-{steps}")
    axes[0, 0].axvline(2.5, color=COLOURS[2], linewidth=1, label="2.5 eps / steps, the default")
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xticks(reach, [f"{value:.2g}" for value in reach])
    axes[0, 0].minorticks_off()
    axes[0, 0].set(
        xlabel=f"alpha * steps / eps   (eps = {255 * eps:.3g}/255)",
        ylabel="accuracy that is left (%)",
        ylim=(0, 106),
        xlim=(min(reach) / 1.3, max(reach) * 1.3),
    )
    axes[0, 0].legend(fontsize=8)
    return finish(figure, title, note)
