"""Tables of cross-validation by patient, from its summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from utils.core.radii import radius_label
from utils.evaluation.baselines import MAJORITY
from utils.evaluation.intervals import MeanAuroc, binary_caption
from utils.evaluation.masking import Panel, verdict_of
from utils.evaluation.metrics import Metrics
from utils.experiments.budget import describe_start
from utils.experiments.fold_records import FROZEN, FoldsRow, FoldsSummary
from utils.experiments.folds import HARD, PLAIN
from utils.reporting.markdown import markdown
from utils.reporting.robustness_figures import CHECKS, column_of, headline_cells

#: End of the heading of the columns that tell of patients.
_AUROC = ", AUROC"


def folds_table(summary: FoldsSummary) -> str:
    """What :mod:`utils.experiments.folds` found over all folds, beside the baselines."""
    epsilons, rows = summary.epsilons, []
    for name, row in summary.rows.items():
        cells = headline_cells([row.metrics[0], *_attacked(row, summary)], epsilons)
        for eps, found in zip(epsilons, row.ranking):
            cells[column_of(eps) + _AUROC] = auroc_cell(found)
        by_fold = 100 * np.array(row.auroc_by_fold[0], dtype=float)
        rows.append([name, *cells.values(), f"{by_fold.min():.0f} to {by_fold.max():.0f}"])
    checked = {name: row.checks for name, row in summary.rows.items() if row.checks}
    budget = summary.budget
    said = (
        f"\n{describe_start(summary)}, {len(summary.folds)} of {summary.data.n_folds} "
        f"folds, {summary.n_subjects} patients each tested once: {summary.n_images.test} images without "
        f"attack, {summary.n_images.attacked} under the worst case in L∞ of {', '.join(summary.attacks)}; "
        f"{budget.clean_epochs} epochs without attack, then {budget.epochs} of hardening; accuracy by slice, AUROC by "
        f"patient as the mean over folds; %, 95 % intervals over patients.{_clean_on_attacked(summary)}"
        f"{_checks_of(checked)}\n"
    )
    return markdown(["model", *cells, "clean AUROC, lowest to highest fold"], rows) + said


def _checks_of(checked: Mapping[str, Sequence[Panel]]) -> str:
    """The gradient checks of each model over its folds: how many passed, and which failed."""
    if not checked:
        return ""
    told = [f"{name} {folds_verdict(panels)}" for name, panels in checked.items()]
    first = next(iter(checked.values()))
    on = f"{first[0].n_images} images of each of {len(first)} folds at {radius_label(first[0].eps)}"
    return f" {CHECKS.capitalize()}, {on}: {'; '.join(told)}."


def folds_verdict(panels: Sequence[Panel]) -> str:
    """How many of the gradient checks of all folds passed, ``44/45``, and which failed."""
    return verdict_of([check for panel in panels for check in panel.checks]).removeprefix(f"{CHECKS} ")


def _attacked(row: FoldsRow, summary: FoldsSummary) -> list[Metrics | None]:
    """Metrics at each radius above 0; None for a baseline, which nothing attacks."""
    return [*row.attacked.metrics[1:]] if row.attacked else [None] * len(summary.epsilons[1:])


def _titles(summaries: Sequence[FoldsSummary]) -> list[str]:
    """How each experiment began, and the length of its training and its suite where these tell it from another."""
    titles = [describe_start(summary) for summary in summaries]
    for told in (_length, _suite):
        titles = [
            f"{title}, {told(summary)}" if titles.count(title) > 1 else title
            for title, summary in zip(titles, summaries, strict=True)
        ]
    return [title + _unfinished(summary) for title, summary in zip(titles, summaries, strict=True)]


def _suite(summary: FoldsSummary) -> str:
    return f"suite {summary.budget.suite}"


def _unfinished(summary: FoldsSummary) -> str:
    done, all_of_them = len(summary.folds), summary.data.n_folds
    return "" if done == all_of_them else f" ({done} of {all_of_them} folds, {summary.n_subjects} patients)"


def _length(summary: FoldsSummary) -> str:
    budget = summary.budget
    drawn = f" of {budget.slices_per_patient} slices a patient" if budget.slices_per_patient else ""
    return f"{budget.clean_epochs} + {budget.epochs} epochs{drawn}"


def by_patient_table(summaries: Sequence[FoldsSummary]) -> str:
    """AUROC of two classes by patient, each patient tested once, of several models and their baselines.

    Those without a network are the same for all folds and told once.
    """
    rows, known = [], set[str]()
    for start, summary in zip(_titles(summaries), summaries, strict=True):
        for name, row in summary.rows.items():
            own = row.attacked is not None or name == FROZEN
            if own or name not in known:
                known.add(name)
                title = f"{start}, {name}" if own else name
                told = [*row.ranking[:1], *(row.attacked.ranking if row.attacked else [])]
                cells = [auroc_cell(one) for one in told]
                cells += ["-"] * (1 + len(summary.epsilons) - len(cells))
                rows.append([title, *cells, at_threshold_cell(row)])
    first = summaries[0]
    rows.sort(key=lambda row: "-" not in row[:-1])
    radii = [radius_label(eps) for eps in first.epsilons[1:]]
    asked = ["no attack, all slices", "no attack", *radii]
    decided = f"balanced accuracy by patient, {' / '.join(['no attack', *radii])}"
    header = ["model", *(f"AUROC, {column}" for column in asked), decided]
    balanced = any(row[-1] != "-" for row in rows)
    if not balanced:
        header, rows = header[:-1], [row[:-1] for row in rows]
    said = (
        f"AUROC by patient, {binary_caption(next(iter(first.rows.values())).metrics[0])}, mean over {len(first.folds)} "
        f"folds, %, with 95 % intervals over patients; {first.n_subjects} patients, each tested once; "
        f"{first.n_images.test} slices, and {first.n_images.attacked} of them without and under the worst case in L∞ "
        f"of {_attacks_of(summaries)}, which aim at the class of each slice; -: not attacked, or not told by older "
        f"runs{_checks_of_all(summaries)}"
    )
    hardened_at = dict.fromkeys(radius_label(one.budget.eps) for one in summaries)
    said += f"; hardened at {' or '.join(hardened_at)}"
    said += (
        "; balanced accuracy of the same question, without attack on all slices, each fold at the threshold that is "
        "best on its validation patients"
        if balanced
        else ""
    )
    return markdown(header, rows) + f"\n{said}.\n"


def _attacks_of(summaries: Sequence[FoldsSummary]) -> str:
    """The attacks, and whose they are where not all models met the same."""
    whose: dict[str, list[str]] = {}
    for start, summary in zip(_titles(summaries), summaries, strict=True):
        whose.setdefault(", ".join(summary.attacks), []).append(start)
    if len(whose) == 1:
        return next(iter(whose))
    return " and of ".join(f"{attacks} ({'; '.join(starts)})" for attacks, starts in whose.items())


def _checks_of_all(summaries: Sequence[FoldsSummary]) -> str:
    """The gradient checks of each model over all its folds, where they were made."""
    told = [
        f"{start}, {name} {folds_verdict(row.checks)}"
        for start, summary in zip(_titles(summaries), summaries, strict=True)
        for name, row in summary.rows.items()
        if row.checks
    ]
    return f"; {CHECKS} over all folds: {'; '.join(told)}" if told else ""


def at_threshold_cell(row: FoldsRow) -> str:
    """Balanced accuracies of :attr:`FoldsRow.at_threshold`, in percent."""
    return " / ".join(f"{100 * one.balanced_accuracy:.1f}" for one in row.at_threshold) if row.at_threshold else "-"


def auroc_cell(found: MeanAuroc) -> str:
    """An AUROC with its interval, in percent."""
    bounds = found.interval
    return f"{100 * found.value:.1f}" + (f" [{100 * bounds[0]:.0f}, {100 * bounds[1]:.0f}]" if bounds else "")


def _clean_on_attacked(summary: FoldsSummary) -> str:
    """What the attacked images alone give without attack, to set beside the columns under attack."""
    told = []
    for name, row in summary.rows.items():
        if row.attacked:
            cells = headline_cells(row.attacked.metrics[:1], [0.0])
            cells |= {column_of(0.0) + _AUROC: auroc_cell(one) for one in row.attacked.ranking[:1]}
            told.append(f"{name}: " + ", ".join(f"{column} {value}" for column, value in cells.items()))
    return f" The attacked {summary.n_images.attacked} without attack: {'; '.join(told)}." if told else ""


def gains_table(summaries: Sequence[FoldsSummary]) -> str:
    """How much better each model ranks patients by illness than each baseline does, without attack, in pairs."""
    asked = list(dict.fromkeys(name for summary in summaries for name in _learnt_baselines(summary)))
    rows = []
    for start, summary in zip(_titles(summaries), summaries, strict=True):
        for name, row in summary.rows.items():
            if row.gains:
                cells = [gain_cell(row.gains.get(other, [])[:1]) for other in asked]
                rows.append([f"{start}, {name}", *cells])
    return markdown(["model minus", *asked], rows) + f"\n{_pairs(summaries[0])}, without attack.\n"


def hardening_gains_table(summaries: Sequence[FoldsSummary]) -> str:
    """How much better each hardened model ranks patients by illness than the plain one, at each radius, in pairs."""
    epsilons, rows = summaries[0].epsilons, []
    for start, summary in zip(_titles(summaries), summaries, strict=True):
        gains = summary.rows[HARD].gains.get(PLAIN, [])
        rows.append([start, *(gain_cell(gains[step : step + 1]) for step in range(len(epsilons)))])
    header = [f"{HARD} minus {PLAIN}", "no attack", *map(radius_label, epsilons[1:])]
    return markdown(header, rows) + f"\n{_pairs(summaries[0])}.\n"


def _learnt_baselines(summary: FoldsSummary) -> list[str]:
    """All but the majority, which ranks nobody."""
    return [name for name, row in summary.rows.items() if row.attacked is None and name != MAJORITY]


def gain_cell(gains: Sequence[MeanAuroc]) -> str:
    """The first of some differences with its interval, in percentage points; a dash where there is none."""
    if not gains:
        return "-"
    told, bounds = f"{100 * gains[0].value:+.1f}", gains[0].interval
    return told + (f" [{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]" if bounds else "")


def _pairs(summary: FoldsSummary) -> str:
    question = binary_caption(next(iter(summary.rows.values())).metrics[0])
    return (
        f"Difference of the mean AUROC by patient over {len(summary.folds)} folds, {question}, in percentage points, "
        "with 95 % intervals: both meet the same patients in each draw, within their fold, ill and healthy ones apart"
    )
