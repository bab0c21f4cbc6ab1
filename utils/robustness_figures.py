"""Tables and figures of the records that ``python -m utils.robustness`` writes, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from utils.masking import NOT_TRUSTED
from utils.paths import read_json
from utils.robustness_plots import (
    plot_before_after,
    plot_first_breaking,
    plot_heat_map,
    plot_intervals,
    plot_reliability,
)
from utils.suites import ORIGINAL_EPS, SUITES
from utils.workspace import Workspace

Record = dict[str, Any]
HARDENED = "_atk"
UNCHECKED = "unchecked"


def robustness_records(workspace: Workspace, suite: str = "standard", n_images: int | None = None) -> dict[str, Record]:
    """Title -> record of every model that was evaluated with a suite under the default threat.

    Args:
        suite: key of :data:`utils.suites.SUITES`.
        n_images: of evaluations on so many images; None takes those on all test images.

    Raises:
        ValueError: an unknown suite, or records of different data, which cannot stand side by side.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, not {suite!r}")
    name = f"robustness_{suite}" + (f"_n{n_images}" if n_images else "") + ".json"
    found = {path.parent.name: read_json(path) for path in sorted(workspace.root.glob(f"checkpoints/*/{name}"))}
    if len({record["data"]["fingerprint"] for record in found.values()}) > 1:
        raise ValueError(f"the {name} files in {workspace.root / 'checkpoints'} are of different data; run them again")
    return found


def verdict(record: Record) -> str:
    """The panel's verdict, which stands wherever the record's numbers do."""
    return record["panel"]["verdict"] if record["panel"] else UNCHECKED


def remark(records: Mapping[str, Record]) -> str:
    """What a figure must say of its numbers."""
    notes = dict.fromkeys(record["note"] for record in records.values() if record["note"])
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
    return pd.DataFrame.from_dict(rows, orient="index")


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
    """The masking panel: what was asked, what was measured, whether it passed.

    Raises:
        ValueError: the evaluation was run without a panel.
    """
    if not record["panel"]:
        raise ValueError("this evaluation has no masking panel; run it again with --panel-images above 0")
    rows = [
        {"check": check["question"], "measured": check["measured"], "passed": "yes" if check["passed"] else "NO"}
        for check in record["panel"]["checks"]
    ]
    return pd.DataFrame(rows).set_index("check")


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
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" [{100 * bounds[0]:.0f}, {100 * bounds[1]:.0f}]" if bounds else "")


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
    panels = {title: record["panel"]["alone"] for title, record in records.items() if record["panel"]}
    if panels:
        first = next(record["panel"] for record in records.values() if record["panel"])
        place = f"{255 * first['eps']:.3g}/255, {first['n_images']} images"
        figures["attacks"] = plot_heat_map(
            panels, title=f"Each attack alone at {place}", rows="model", columns="attack", note=note
        )
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
