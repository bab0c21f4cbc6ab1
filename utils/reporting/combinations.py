"""What :mod:`utils.experiments.combine` found: a table and a figure, each reading beside the mean of the slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.core.parts import read_part
from utils.core.radii import radius_label
from utils.evaluation.intervals import MeanAuroc
from utils.experiments.budget import describe_start
from utils.experiments.fold_records import FoldsRow, FoldsSummary
from utils.experiments.folds import SUMMARY
from utils.reporting.fold_tables import at_threshold_cell, auroc_cell, gain_cell
from utils.reporting.markdown import markdown
from utils.reporting.style import COLOURS, axes_of, finish, save_figure


def combinations_table(summary: FoldsSummary) -> str:
    """Each combination over all patients, in pairs with the first, and with the baseline that ranks patients best."""
    models, best = _models(summary), _best_baseline(summary)
    short, first = _short(summary), next(iter(models))
    radii = ["no attack", *map(radius_label, summary.epsilons[1:])]
    header = ["combination", *radii, "balanced accuracy", *(f"gain, {radius}" for radius in radii), f"minus {best}"]
    rows = []
    for name, row in models.items():
        gains = [gain_cell(row.gains[first][step : step + 1]) if name != first else "-" for step in range(len(radii))]
        against = gain_cell(row.gains[best][:1])
        rows.append([short[name], *map(auroc_cell, row.ranking), at_threshold_cell(row), *gains, against])
    said = (
        f"{_title(summary)}: AUROC by patient, healthy against ill, mean over {len(summary.folds)} folds; "
        f"{summary.n_subjects} patients, each tested once; all slices of a patient change together, and its verdict "
        f"is what {', '.join(summary.attacks)} aim at; balanced accuracy at the threshold that is best on each fold's "
        f"validation patients, without attack and at each radius; gain: minus {short[first]}, on the same patients; "
        f"{best}: the simple reader that ranks these patients best, without attack; %, 95 % intervals over patients"
    )
    return markdown(header, rows) + f"\n{said}.\n"


def save_combinations(folder: Path) -> Path:
    """Draw the figure of one combination beside its ``summary.json``."""
    summary = read_part(FoldsSummary, folder / SUMMARY, "it is made by python -m utils combine")
    return save_figure(combinations_figure(summary), folder / "gains.png")


def combinations_figure(summary: FoldsSummary) -> Figure:
    """What each combination gains over the first at each radius, with intervals over patients."""
    models, short = _models(summary), _short(summary)
    first, *others = models
    figure, axes = axes_of(1, len(summary.epsilons), size=(8.4, 1.6 + 0.32 * len(others)), sharex=True, sharey=True)
    places = np.arange(len(others))[::-1]
    for step, (ax, eps) in enumerate(zip(axes[0], summary.epsilons)):
        for place, name in zip(places, others):
            _draw_gain(ax, place, models[name].gains[first][step])
        ax.axvline(0, color="grey", linewidth=0.8)
        ax.set_title(f"within {radius_label(eps)}" if eps else "no attack")
    axes[0, 0].set_yticks(places, [short[name] for name in others])
    axes[0, len(summary.epsilons) // 2].set_xlabel(f"AUROC by patient, minus that of the {short[first]} (points)")
    said = f"What combining slices gains: {summary.n_subjects} patients, each tested once; bars: 95 % over patients"
    return finish(figure, _title(summary), said)


def _draw_gain(ax: Axes, place: float, gain: MeanAuroc) -> None:
    middle = 100 * gain.value
    low, high = (100 * end for end in gain.interval or [np.nan, np.nan])
    ax.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color=COLOURS[0], marker="o", capsize=3)


def _models(summary: FoldsSummary) -> dict[str, FoldsRow]:
    return {name: row for name, row in summary.rows.items() if row.attacked is not None}


def _best_baseline(summary: FoldsSummary) -> str:
    asked = {name: row.ranking[0].value for name, row in summary.rows.items() if row.attacked is None and row.ranking}
    return max(asked, key=lambda name: asked[name])


def _state(summary: FoldsSummary) -> str:
    return next(iter(_models(summary))).rsplit(", ", 1)[1]


def _title(summary: FoldsSummary) -> str:
    return f"{describe_start(summary)}, {_state(summary)}"


def _short(summary: FoldsSummary) -> dict[str, str]:
    """Names without what all of them share: the state, and the experiment where there is only one."""
    bare = {name: name.removesuffix(f", {_state(summary)}") for name in _models(summary)}
    members = [name.removesuffix(", mean") for name in bare.values() if name.endswith(", mean")]
    shared = f"{members[0]}, " if len(members) == 1 else ""
    return {name: own.removeprefix(shared) for name, own in bare.items()}
