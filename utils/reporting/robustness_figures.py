"""Tables and figures of the records that notebooks and ``python -m utils robustness`` write, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from utils.attacks.suites import check_suite
from utils.core.parts import read_part
from utils.core.radii import NORM_SIGNS, ORIGINAL_EPS, radius_label
from utils.data.sets import ImageSet
from utils.data.workspace import Workspace
from utils.evaluation.intervals import compare
from utils.evaluation.masking import verdict_of
from utils.evaluation.metrics import Metrics
from utils.evaluation.robustness import SuiteRecord, WorstCase
from utils.experiments.records import HARDENED, display_name, known_titles
from utils.reporting.price import recalls_of
from utils.reporting.robustness_plots import (
    plot_before_after,
    plot_first_breaking,
    plot_heat_map,
    plot_intervals,
    plot_intervals_apart,
    plot_reliability,
)
from utils.reporting.style import save_figure
from utils.training.checkpoints import RECORD, read_record
from utils.training.record import Record

Worst = Mapping[str, SuiteRecord]
#: Heading of the verdicts on gradient masking.
CHECKS = "gradient checks"
IMAGES = "images (patients)"
#: Radii and columns of the table that comes first.
HEADLINE_EPS = (0.0, 1 / 255, 2 / 255)
HEADLINE = {"": ("image", "accuracy"), ", balanced": ("image", "balanced_accuracy"), ", AUROC": ("patient", "auroc")}
#: In place of a suite: the worst case over the sweeps of the notebooks, which each model's own record holds.
NOTEBOOKS = "notebooks"


def worst_cases(records: Mapping[str, Record]) -> dict[str, SuiteRecord]:
    """Title -> worst case, out of the records of models that the notebooks have attacked."""
    found = {}
    for title, record in records.items():
        if record.worst_case and record.data:
            whose = {"title": title, "classes": record.classes, "data": record.data, "note": record.note}
            found[title] = SuiteRecord.model_validate(dict(record.worst_case) | whose)
    return found


def robustness_records(
    workspace: Workspace, suite: str = "standard", n_images: int | None = None
) -> dict[str, SuiteRecord]:
    """Title -> record of every model that was evaluated with a suite under the default threat.

    Args:
        suite: key of :data:`utils.attacks.suites.SUITES`, or ``NOTEBOOKS``.
        n_images: of evaluations on so many images; None takes those on all test images.

    Raises:
        ValueError: an unknown suite, or records of different data, which cannot stand side by side.
    """
    if suite == NOTEBOOKS:
        name = RECORD
        places = sorted(workspace.root.glob(f"checkpoints/*/{name}"), key=_order)
        found = worst_cases({path.parent.name: read_record(path.parent) for path in places})
    else:
        check_suite(suite)
        name = f"robustness_{suite}" + (f"_n{n_images}" if n_images else "") + ".json"
        places = sorted(workspace.root.glob(f"checkpoints/*/{name}"), key=_order)
        found = {path.parent.name: read_part(SuiteRecord, path, "run the suite again") for path in places}
    if len({record.data.fingerprint for record in found.values()}) > 1:
        raise ValueError(f"the {name} files in {workspace.root / 'checkpoints'} are of different data; run them again")
    return found


def _order(path: Path) -> tuple[int, str]:
    """Models as everywhere, each before its hardened twin, then the vote, then what else there is."""
    titles, name = known_titles(), path.parent.name
    return titles.index(name) if name in titles else len(titles), name


def verdict(record: WorstCase) -> str:
    """How many of the gradient checks a record's number passed, ``8/8``, and which it failed; or ``unchecked``."""
    return verdict_of(record.panel.checks if record.panel else None).removeprefix(f"{CHECKS} ")


def remark(records: Worst) -> str:
    """What a figure must say of its numbers: on how many images they are, and which failed a gradient check."""
    return "; ".join([*_notes(records), sample(records), *_doubts(records)])


def _notes(records: Worst) -> list[str]:
    return list(dict.fromkeys(record.note for record in records.values() if record.note))


def _doubts(records: Worst) -> list[str]:
    failed = [title for title, record in records.items() if record.panel and ":" in verdict(record)]
    return [f"{CHECKS} of {display_name(title)} {verdict(records[title])}" for title in failed]


def sample(records: Worst) -> str:
    """On how many test images and patients the records are; those on fewer are named."""
    groups: dict[tuple[int, int], list[str]] = {}
    for title, record in records.items():
        own = record.curve.n_images, record.curve.n_subjects
        groups.setdefault(own, []).append(display_name(title))
    (most, patients), *fewer = sorted(groups, reverse=True)
    parts = [f"{most} test images of {patients} patients"]
    parts += [f"{' and '.join(groups[n, own])} on {n} of {most} images" for n, own in fewer]
    return "; ".join(parts)


def _size(record: WorstCase) -> str:
    return f"{record.curve.n_images} ({record.curve.n_subjects})"


def column_of(eps: float) -> str:
    """Heading of a radius."""
    return "clean" if eps == 0 else radius_label(eps)


def summary_table(records: Worst) -> pd.DataFrame:
    """A row a model: robust accuracy in percent with its interval at each radius, and the gradient checks."""
    rows = {}
    for title, record in records.items():
        curve = record.curve
        cells = {
            label: _with_interval(value, bounds)
            for label, value, bounds in zip(curve.labels, curve.robust_accuracy, record.interval)
        }
        rows[display_name(title)] = {IMAGES: _size(record), **cells, CHECKS: verdict(record)}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("-")


def headline_table(records: Worst, baselines: Mapping[str, Metrics] | None = None) -> pd.DataFrame:
    """A row a model: accuracies over images and AUROC by patient, without attack and under the worst case.

    AUROC is of the coarsest question, Non against the rest where the classes are the known ones.

    Args:
        records: see :func:`worst_cases`.
        baselines: name -> :func:`utils.evaluation.intervals.report` of its answers to images without attack.
    """
    rows = {}
    for title, record in records.items():
        cells = headline_cells([record.metrics_at(eps) for eps in HEADLINE_EPS])
        rows[display_name(title)] = {IMAGES: _size(record), **cells, CHECKS: verdict(record)}
    for name, metrics in (baselines or {}).items():
        rows[name] = {IMAGES: _size_of(metrics), **headline_cells([metrics]), CHECKS: "-"}
    return pd.DataFrame.from_dict(rows, orient="index").astype(object).fillna("-")


def _size_of(metrics: Metrics) -> str:
    image, patient = (next(iter(metrics.values())).of(level) for level in ("image", "patient"))
    return f"{image.n if image else '-'} ({patient.n if patient else '-'})"


def headline_cells(metrics: Sequence[Metrics | None], epsilons: Sequence[float] = HEADLINE_EPS) -> dict[str, str]:
    """Column -> percent with its interval, for each radius; "-" where nothing was measured."""
    cells = {}
    for eps, found in zip(epsilons, metrics):
        for column, (level, metric) in HEADLINE.items():
            questions = list(found.values()) if found else []
            own = questions[-1 if metric == "auroc" else 0].of(level) if questions else None
            shown = _with_interval(getattr(own, metric), own.interval.get(metric)) if own else "-"
            cells[column_of(eps) + column] = shown
    return cells


def recall_table(records: Worst, eps: float = 1 / 255) -> pd.DataFrame:
    """A row a model: recall of each class over images in percent, without attack / under the worst case at ``eps``.

    Raises:
        ValueError: no record of that radius.
    """
    rows = {}
    for title, record in records.items():
        clean, attacked = recalls_of(record), recalls_of(record, eps)
        rows[display_name(title)] = {IMAGES: _size(record)} | {
            name: f"{_percent(clean[name])} / {_percent(attacked[name])}" for name in clean
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def question_table(record: WorstCase) -> pd.DataFrame:
    """A row for each question, level and radius of one model: metrics with intervals."""
    rows = []
    shown = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "calibration_error")
    for radius, metrics in zip(record.curve.labels, record.metrics):
        for question, levels in metrics.items():
            for level in ("image", "patient"):
                if found := levels.of(level):
                    cells = {name: _with_interval(getattr(found, name), found.interval.get(name)) for name in shown}
                    rows.append({"eps": radius, "question": question, "by": level, **cells})
    return pd.DataFrame(rows).set_index(["question", "by", "eps"])


def panel_table(record: WorstCase) -> pd.DataFrame:
    """The gradient checks: what was asked, what was measured, whether it passed; one line where it was left out."""
    columns = ["check", "measured", "passed"]
    checks = record.panel.checks if record.panel else []
    rows = [(check.question, check.measured, "yes" if check.passed else "NO") for check in checks]
    return pd.DataFrame(rows or [("none was made", "", "")], columns=columns).set_index("check")


def paired_table(
    first: WorstCase,
    second: WorstCase,
    images: ImageSet,
    *,
    names: tuple[str, str] = ("when hardened", "when not hardened"),
) -> pd.DataFrame:
    """Two models on the same images: a row a radius, see :func:`utils.evaluation.intervals.compare`.

    Args:
        first, second: records of worst cases over the same radii.
        images: that both were attacked on.
        names: of the two, for the columns.

    Raises:
        ValueError: not the same images or radii.
    """
    one, other = first.curve, second.curve
    if one.epsilons != other.epsilons:
        raise ValueError(f"radii differ: {one.epsilons} and {other.epsilons}")
    rows = []
    for step, radius in enumerate(one.labels):
        found = compare(one.robust(step), other.robust(step), images.subjects)
        gain = _with_interval(found.difference, found.interval)
        only = {f"robust only {name}": n for name, n in zip(names, (found.only_first, found.only_second))}
        rows.append({"eps": radius, "difference (points)": gain, **only, "McNemar p": f"{found.mcnemar_p:.2g}"})
    return pd.DataFrame(rows).set_index("eps")


def vote_table(record: WorstCase) -> pd.DataFrame:
    """The vote under each attack alone, under all, and its members beside it, in percent by radius.

    Raises:
        ValueError: not the worst case of a vote.
    """
    if record.vote is None:
        raise ValueError("this is the worst case of one model; only that of a vote tells of its members")
    vote, columns = record.vote, record.curve.labels
    rows = {display_name(title): values for title, values in vote.alone.items()}
    rows |= {"all on stand-ins": vote.joint, "all from members": vote.transfer_only}
    rows["worst case"] = record.curve.robust_accuracy
    rows |= {f"{display_name(title)}, itself": values for title, values in vote.members.items()}
    rows |= {"best member": vote.best_member, "oracle": vote.oracle}
    return (100 * pd.DataFrame.from_dict(rows, orient="index", columns=columns)).round(1)


def _with_interval(value: float | None, bounds: list[float] | None) -> str:
    if value is None or bounds is None:
        return _percent(value)
    return f"{_percent(value)} [{round(100 * bounds[0])}, {round(100 * bounds[1])}]"


def model_figures(title: str, records: Worst) -> dict[str, Figure]:
    """Figures of one model by file name; a hardened one stands beside its plain twin where that was evaluated."""
    pair = [title.removesuffix(HARDENED), title] if title.endswith(HARDENED) else [title]
    own = {name: records[name] for name in pair if name in records}
    named = {display_name(name): record for name, record in own.items()}
    note, shown = remark(own), display_name(title)
    figures = {
        "worst_case": curves_figure(own, f"{shown}: worst case of each image", note),
        "first_breaking": plot_first_breaking(
            {name: record.curve.first_broken for name, record in named.items()},
            records[title].curve.epsilons,
            title=f"{shown}: the smallest radius that fools it on each image",
            note=note,
        ),
        "reliability": plot_reliability(
            {name: (record.answers.probability, record.answers.right) for name, record in named.items()},
            title=f"{shown}: sure and right, without attack",
            note=note,
        ),
    }
    if len(own) == 2:
        before_name, after_name = named
        before, after = (dict(_accuracies(record)) for record in own.values())
        bars = {name: (before[name], after[name]) for name in before if name in after}
        heading = f"{pair[0]}: accuracy under the worst case before and after hardening"
        figures["before_after"] = plot_before_after(
            bars,
            names=(before_name, after_name),
            condition=f"radius in {NORM_SIGNS[own[title].curve.threat.norm]}",
            title=heading,
            note=note,
        )
        figures["recall"] = recall_figure(pair[0], own, note)
    return figures


def recall_figure(title: str, pair: Worst, note: str) -> Figure:
    """What hardening costs each class: recall over images, without attack, before and after.

    Args:
        pair: the plain and the hardened model's worst case.
    """
    before, after = (recalls_of(record) for record in pair.values())
    before_name, after_name = map(display_name, pair)
    counts = _class_counts(next(iter(pair.values())))
    bars = {f"{name}\n{counts[name]} images": (before[name], after[name]) for name in before}
    heading = f"{title}: recall of each class, without attack"
    unit = "recall over images (%)"
    return plot_before_after(
        bars, names=(before_name, after_name), unit=unit, condition="true class", title=heading, note=note
    )


def _class_counts(record: WorstCase) -> dict[str, int]:
    found = next(iter(record.metrics[0].values())).image
    return dict(zip(found.recall, map(sum, found.confusion))) if found else {}


def comparison_figures(records: Worst) -> dict[str, Figure]:
    """Figures of all models together by file name."""
    note = remark(records)
    panels: dict[str, dict[str, SuiteRecord]] = {}
    for title, record in records.items():
        panels.setdefault(title.removesuffix(HARDENED), {})[title] = record
    heading = "Worst case of each image, all models"
    apart = {name: _curves(own) for name, own in panels.items()}
    figures = {"worst_case_all": plot_intervals_apart(apart, title=heading, original=ORIGINAL_EPS, note=note)}
    if any(record.panel for record in records.values()):
        figures["attacks"] = attacks_figure(records)
    return figures


def attacks_figure(records: Worst) -> Figure:
    """Robust accuracy of all models under each attack of the gradient checks alone, on their images."""
    checked = {title: record.panel for title, record in records.items() if record.panel}
    radii = dict.fromkeys(radius_label(own.eps) for own in checked.values())
    alone = {
        f"{display_name(title)} ({own.n_images})": {display_name(name): value for name, value in own.alone.items()}
        for title, own in checked.items()
    }
    most = max(record.curve.n_images for record in records.values())
    told = f"on so many test images as stand in brackets, fewer than the up to {most} of the tables"
    blank = "blank: not made" if len({frozenset(own) for own in alone.values()}) > 1 else ""
    note = "; ".join(filter(None, [told, blank, *_notes(records), *_doubts(records)]))
    heading = f"Each attack alone at {' or '.join(radii)}"
    return plot_heat_map(alone, title=heading, rows="model (images)", columns="attack", note=note)


def _curves(records: Worst) -> dict[str, tuple]:
    return {
        display_name(name): (record.curve.epsilons, record.curve.robust_accuracy, record.interval)
        for name, record in records.items()
    }


def curves_figure(records: Worst, title: str, note: str) -> Figure:
    """Robust accuracy of each model with its interval over patients."""
    return plot_intervals(_curves(records), title=title, original=ORIGINAL_EPS, note=note)


def _accuracies(record: WorstCase) -> list[tuple[str, float]]:
    return list(zip(record.curve.labels, record.curve.robust_accuracy))


def show_all(figures: Mapping[str, Figure], folder: Path) -> list[Figure]:
    """Save figures in ``folder`` by their names, and return them."""
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
    return list(figures.values())


def draw_all(workspace: Workspace, suite: str = "standard", n_images: int | None = None) -> dict[Path, Figure]:
    """Every figure of a suite's records, by the file it belongs in."""
    records = robustness_records(workspace, suite, n_images)
    figures = {}
    for title in records:
        for name, figure in model_figures(title, records).items():
            figures[workspace.assets(title) / f"{name}.png"] = figure
    if len(records) > 1:
        for name, figure in comparison_figures(records).items():
            figures[workspace.assets("Robustness") / f"{name}.png"] = figure
    return figures
