"""Tables and figures of the records that notebooks and ``python -m utils.robustness`` write, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from utils.checkpoints import RECORD
from utils.data import ImageSet
from utils.intervals import compare
from utils.masking import NOT_TRUSTED
from utils.paths import read_json
from utils.plots import save_figure
from utils.radii import ORIGINAL_EPS
from utils.results import HARDENED, known_titles
from utils.robustness_plots import (
    plot_before_after,
    plot_first_breaking,
    plot_heat_map,
    plot_intervals,
    plot_reliability,
)
from utils.suites import check_suite
from utils.workspace import Workspace
from utils.worst_case import NEVER

Record = dict[str, Any]
UNCHECKED = "unchecked"
#: Radii and columns of the table that comes first.
HEADLINE_EPS = (0.0, 1 / 255, 2 / 255)
HEADLINE = {"": ("image", "accuracy"), ", balanced": ("image", "balanced_accuracy"), ", AUROC": ("patient", "auroc")}
#: In place of a suite: the worst case over the sweeps of the notebooks, which each model's own record holds.
NOTEBOOKS = "notebooks"


def worst_cases(records: Mapping[str, Record]) -> dict[str, Record]:
    """Title -> worst case, out of the records of models that the notebooks have attacked."""
    shared = ("note", "data", "classes")
    return {
        title: record["worst_case"] | {key: record[key] for key in shared}
        for title, record in records.items()
        if "worst_case" in record
    }


def robustness_records(workspace: Workspace, suite: str = "standard", n_images: int | None = None) -> dict[str, Record]:
    """Title -> record of every model that was evaluated with a suite under the default threat.

    Args:
        suite: key of :data:`utils.suites.SUITES`, or ``NOTEBOOKS``.
        n_images: of evaluations on so many images; None takes those on all test images.

    Raises:
        ValueError: an unknown suite, or records of different data, which cannot stand side by side.
    """
    if suite != NOTEBOOKS:
        check_suite(suite)
    name = f"robustness_{suite}" + (f"_n{n_images}" if n_images else "") + ".json"
    name = RECORD if suite == NOTEBOOKS else name
    places = sorted(workspace.root.glob(f"checkpoints/*/{name}"), key=_order)
    found = {path.parent.name: read_json(path) for path in places}
    found = worst_cases(found) if suite == NOTEBOOKS else found
    if len({record["data"]["fingerprint"] for record in found.values()}) > 1:
        raise ValueError(f"the {name} files in {workspace.root / 'checkpoints'} are of different data; run them again")
    return found


def _order(path: Path) -> tuple[int, str]:
    """Models as everywhere, each before its hardened twin, then the vote, then what else there is."""
    titles, name = known_titles(), path.parent.name
    return titles.index(name) if name in titles else len(titles), name


def verdict(record: Record) -> str:
    """The panel's verdict, which stands wherever the record's numbers do."""
    return record["panel"]["verdict"] if record["panel"] else UNCHECKED


def remark(records: Mapping[str, Record]) -> str:
    """What a figure must say of its numbers."""
    notes = dict.fromkeys(record["note"] for record in records.values() if record["note"])
    counts = {title: record["curve"]["n_images"] for title, record in records.items()}
    if len(set(counts.values())) > 1:
        most = max(counts.values())
        notes |= {f"{title} on {n} of {most} images": None for title, n in counts.items() if n < most}
    doubted = [title for title, record in records.items() if verdict(record) == NOT_TRUSTED]
    doubt = [f"{NOT_TRUSTED} (masked gradients?): {', '.join(doubted)}"] if doubted else []
    return "; ".join([*notes, *doubt])


def summary_table(records: Mapping[str, Record]) -> pd.DataFrame:
    """A row a model: robust accuracy in percent with its interval at each radius, and the panel's verdict."""
    rows = {}
    for title, record in records.items():
        curve = record["curve"]
        cells = {
            ("clean" if eps == 0 else f"{255 * eps:.3g}/255"): _with_interval(value, bounds)
            for eps, value, bounds in zip(curve["epsilons"], curve["robust_accuracy"], record["interval"])
        }
        rows[title] = {"images (patients)": f"{curve['n_images']} ({curve['n_subjects']})", **cells}
        rows[title]["panel"] = verdict(record)
    return pd.DataFrame.from_dict(rows, orient="index").fillna("-")


def headline_table(records: Mapping[str, Record], baselines: Mapping[str, Record] | None = None) -> pd.DataFrame:
    """A row a model: accuracies over images and AUROC by patient, without attack and under the worst case.

    AUROC is of the coarsest question, Non against the rest where the classes are the known ones.

    Args:
        records: see :func:`worst_cases`.
        baselines: name -> :func:`utils.intervals.report` of its answers to images without attack.
    """
    rows = {}
    for title, record in records.items():
        by_radius = dict(zip(record["curve"]["epsilons"], record["metrics"]))
        rows[title] = headline_cells([by_radius.get(eps) for eps in HEADLINE_EPS])
        rows[title]["panel"] = verdict(record)
    for name, metrics in (baselines or {}).items():
        rows[name] = headline_cells([metrics]) | {"panel": "-"}
    return pd.DataFrame.from_dict(rows, orient="index").astype(object).fillna("-")


def headline_cells(metrics: Sequence[Record | None], epsilons: Sequence[float] = HEADLINE_EPS) -> dict[str, str]:
    """Column -> percent with its interval, for each radius; "-" where nothing was measured."""
    cells = {}
    for eps, found in zip(epsilons, metrics):
        for column, (level, metric) in HEADLINE.items():
            questions = list(found.values()) if found else []
            own = questions[-1 if metric == "auroc" else 0][level] if found else None
            shown = _with_interval(own[metric], own["interval"][metric]) if own else "-"
            cells[("clean" if eps == 0 else f"{255 * eps:.3g}/255") + column] = shown
    return cells


def recall_table(records: Mapping[str, Record], eps: float = 1 / 255) -> pd.DataFrame:
    """A row a model: recall of each class over images in percent, without attack / under the worst case at ``eps``.

    Raises:
        ValueError: no record of that radius.
    """
    rows = {}
    for title, record in records.items():
        epsilons = record["curve"]["epsilons"]
        if eps not in epsilons:
            raise ValueError(f"{255 * eps:.3g}/255 was not measured of {title}")
        step = epsilons.index(eps)
        clean, attacked = (next(iter(record["metrics"][i].values()))["image"]["recall"] for i in (0, step))
        rows[title] = {name: f"{_percent(clean[name])} / {_percent(attacked[name])}" for name in clean}
    return pd.DataFrame.from_dict(rows, orient="index")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def question_table(record: Record) -> pd.DataFrame:
    """A row for each question, level and radius of one model: metrics with intervals."""
    rows = []
    shown = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "calibration_error")
    for eps, metrics in zip(record["curve"]["epsilons"], record["metrics"]):
        for question, levels in metrics.items():
            for level, found in levels.items():
                if found:
                    cells = {name: _with_interval(found[name], found["interval"][name]) for name in shown}
                    rows.append({"eps": f"{255 * eps:.3g}/255", "question": question, "by": level, **cells})
    return pd.DataFrame(rows).set_index(["question", "by", "eps"])


def panel_table(record: Record) -> pd.DataFrame:
    """The masking panel: what was asked, what was measured, whether it passed; one line where it was left out."""
    columns = ["check", "measured", "passed"]
    checks = record["panel"]["checks"] if record["panel"] else []
    rows = [(check["question"], check["measured"], "yes" if check["passed"] else "NO") for check in checks]
    return pd.DataFrame(rows or [("none was made", "", "")], columns=columns).set_index("check")


def paired_table(first: Record, second: Record, images: ImageSet) -> pd.DataFrame:
    """Two models on the same images: a row a radius, see :func:`utils.intervals.compare`.

    Args:
        first, second: records of worst cases over the same radii.
        images: that both were attacked on.

    Raises:
        ValueError: not the same images or radii.
    """
    one, other = first["curve"], second["curve"]
    if one["epsilons"] != other["epsilons"]:
        raise ValueError(f"radii differ: {one['epsilons']} and {other['epsilons']}")
    rows = []
    for step, eps in enumerate(one["epsilons"]):
        found = compare(standing(one, step), standing(other, step), images.subjects)
        gain = _with_interval(found["difference"], found["interval"])
        row = {"eps": f"{255 * eps:.3g}/255", "difference (points)": gain, "only the first stands": found["only_first"]}
        rows.append(row | {"only the second": found["only_second"], "McNemar p": f"{found['mcnemar_p']:.2g}"})
    return pd.DataFrame(rows).set_index("eps")


def standing(curve: Record, step: int) -> torch.Tensor:
    """Which images stand all radii up to the one with index ``step``, bool tensor N."""
    first = torch.tensor(curve["first_broken"])
    return (first == NEVER) | (first > step)


def vote_table(record: Record) -> pd.DataFrame:
    """The vote under each attack alone, under all, and what stands beside it, in percent by radius."""
    vote, columns = record["vote"], [f"{255 * eps:.3g}/255" for eps in record["curve"]["epsilons"]]
    rows = {title: values for title, values in vote["alone"].items()}
    rows |= {"all on stand-ins": vote["joint"], "all from members": vote["transfer only"]}
    rows["worst case"] = record["curve"]["robust_accuracy"]
    rows |= {f"{title} itself": values for title, values in vote["members"].items()}
    rows |= {"best member": vote["best member"], "oracle": vote["oracle"]}
    return (100 * pd.DataFrame.from_dict(rows, orient="index", columns=columns)).round(1)


def _with_interval(value: float | None, bounds: list[float] | None) -> str:
    if value is None or bounds is None:
        return _percent(value)
    return f"{_percent(value)} [{round(100 * bounds[0])}, {round(100 * bounds[1])}]"


def model_figures(title: str, records: Mapping[str, Record]) -> dict[str, Figure]:
    """Figures of one model by file name; a hardened one stands beside its plain twin where that was evaluated."""
    pair = [title.removesuffix(HARDENED), title] if title.endswith(HARDENED) else [title]
    own = {name: records[name] for name in pair if name in records}
    note = remark(own)
    figures = {
        "worst_case": curves_figure(own, f"{title}: worst case of each image", note),
        "first_breaking": plot_first_breaking(
            {name: record["curve"]["first_broken"] for name, record in own.items()},
            records[title]["curve"]["epsilons"],
            title=f"{title}: when each image was first broken",
            note=note,
        ),
        "reliability": plot_reliability(
            {name: (record["answers"]["probability"], record["answers"]["right"]) for name, record in own.items()},
            title=f"{title}: sure and right, without attack",
            note=note,
        ),
    }
    if len(own) == 2:
        before, after = (dict(_accuracies(record)) for record in own.values())
        bars = {name: (before[name], after[name]) for name in before if name in after}
        figures["before_after"] = plot_before_after(bars, names=tuple(own), title=f"{title}: hardening", note=note)
    return figures


def comparison_figures(records: Mapping[str, Record]) -> dict[str, Figure]:
    """Figures of all models together by file name."""
    note = remark(records)
    figures = {"worst_case_all": curves_figure(records, "Worst case of each image, all models", note)}
    panels = {title: record["panel"] for title, record in records.items() if record["panel"]}
    if panels:
        radii = dict.fromkeys(f"{255 * own['eps']:.3g}/255" for own in panels.values())
        counts = sorted({own["n_images"] for own in panels.values()})
        alone = {title: own["alone"] for title, own in panels.items()}
        title = f"Each attack alone at {' or '.join(radii)}, {' or '.join(map(str, counts))} images"
        figures["attacks"] = plot_heat_map(alone, title=title, rows="model", columns="attack", note=note)
    return figures


def curves_figure(records: Mapping[str, Record], title: str, note: str) -> Figure:
    """Robust accuracy of each model with its interval over patients."""
    lines = {
        name: (record["curve"]["epsilons"], record["curve"]["robust_accuracy"], record["interval"])
        for name, record in records.items()
    }
    return plot_intervals(lines, title=title, original=ORIGINAL_EPS, note=note)


def _accuracies(record: Record) -> list[tuple[str, float]]:
    curve = record["curve"]
    names = ["clean" if eps == 0 else f"{255 * eps:.3g}/255" for eps in curve["epsilons"]]
    return list(zip(names, curve["robust_accuracy"]))


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
