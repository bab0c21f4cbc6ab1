"""Figures of whole experiments: recipes compared, and patients in folds."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.core.radii import grey_levels
from utils.evaluation.intervals import MeanAuroc, binary_caption
from utils.experiments.budget import describe_start
from utils.experiments.fold_records import FoldsRow, FoldsSummary
from utils.experiments.recipe_records import RecipesSummary
from utils.reporting.style import COLOURS, axes_of, finish


def recipes_figure(summary: RecipesSummary) -> Figure:
    """Test accuracy without and under attack of each variant, mean and standard deviation over seeds."""
    figure, axes = axes_of(size=(8.4, 5.2))
    ax = axes[0, 0]
    for index, (name, row) in enumerate(summary.variants.items()):
        clean, robust = (100 * np.array(row.values[column], dtype=float) for column in ("clean", "2/255"))
        spread = [values.std(ddof=1) if len(values) > 1 else 0 for values in (clean, robust)]
        label = row.title + (" (chosen on validation)" if name == summary.winner else "")
        style = {"color": COLOURS[index % len(COLOURS)], "marker": "osD^vPX*"[index // len(COLOURS) % 8]}
        ax.errorbar(clean.mean(), robust.mean(), xerr=spread[0], yerr=spread[1], capsize=2, label=label, **style)
    ax.set(xlabel="accuracy without attack (%)", ylabel="accuracy, worst case at 2/255 (%)")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    title = f"{describe_start(summary)}, {summary.data.split_name}: {summary.n_images} test images"
    counts = {len(row.seeds) for row in summary.variants.values()}
    note = f"bars: standard deviation over {max(counts)} seeds" if max(counts) > 1 else "one seed"
    return finish(figure, title, note + ("; no bar: one seed" if min(counts) == 1 < max(counts) else ""))


def folds_figure(summary: FoldsSummary) -> Figure:
    """Mean AUROC by patient over folds with its interval, beside the baselines: the numbers of the table.

    Without attack these are all images; under attack fewer, to which no line leads from there. Where no class is known
    to mean healthy, the images that are right.
    """
    figure, axes = axes_of(size=(8.4, 4.4))
    ax, levels, counts = axes[0, 0], grey_levels(summary.epsilons), summary.n_images
    ranked = any(row.ranking for row in summary.rows.values())
    for number, (name, row) in enumerate(summary.rows.items()):
        colour = COLOURS[number % len(COLOURS)]
        shown = row.ranking if ranked else _right(row)
        if not shown:
            continue
        clean, *attacked = shown
        if row.attacked is None:
            ax.axhline(100 * clean.value, color=colour, linestyle=":", label=f"{name} (no attack)")
            continue
        aside = 0.02 * (number - len(summary.rows) + 1.5)
        style = {"color": colour, "marker": "os^Dv<>P"[number % 8], "capsize": 3}
        _draw_auroc(ax, [levels[0] + aside], [clean], style)
        _draw_auroc(ax, [level + aside for level in levels[1:]], attacked, style | {"label": name})
    measured = (
        f"AUROC by patient, mean over folds,\n{_question(summary)} (%)" if ranked else "images that are right (%)"
    )
    ax.set(xlabel="eps (/255, L-infinity)", ylabel=measured, xticks=levels)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    folds = f"{len(summary.folds)} of {summary.data.n_folds} folds, {summary.n_subjects} patients"
    images = f"{counts.test} images without attack, {counts.attacked} of them attacked"
    title = f"{describe_start(summary)}: each patient tested once"
    return finish(figure, title, f"{folds}; bars: 95 % over patients", images)


def _right(row: FoldsRow) -> list[MeanAuroc]:
    """Share of all images that are right without attack, then of the attacked ones at each radius."""
    metrics = row.metrics if row.attacked is None else [row.metrics[0], *row.attacked.metrics[1:]]
    scores = [scores for one in metrics if (scores := next(iter(one.values())).image)]
    return [MeanAuroc(value=own.accuracy, interval=own.interval.get("accuracy")) for own in scores]


def _draw_auroc(ax: Axes, x: list[float], found: list[MeanAuroc], style: dict[str, Any]) -> None:
    middle = 100 * np.array([one.value for one in found])
    low, high = 100 * np.array([one.interval or [np.nan, np.nan] for one in found]).T
    ax.errorbar(x, middle, yerr=[middle - low, high - middle], **style)


def _question(summary: FoldsSummary) -> str:
    return binary_caption(next(iter(summary.rows.values())).metrics[0])
