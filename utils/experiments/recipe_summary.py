"""All runs of a comparison of recipes together: mean and standard deviation over seeds, and the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from utils.core.parts import read_part
from utils.core.reproducibility import environment_facts
from utils.evaluation.metrics import Levels, Metrics
from utils.experiments.recipe_records import RecipesSummary, VariantRow
from utils.experiments.recipes import CLEAN, VARIANTS, facts_of, read_run
from utils.experiments.specification import differing

SUMMARY = "summary.json"


class Place(NamedTuple):
    """Where a value is in a run's file.

    Attributes:
        step: index of the radius.
        merged: whether the healthy are asked against all others, or every class by itself.
    """

    side: str
    step: int
    merged: bool
    level: str
    metric: str

    def value(self, metrics: Sequence[Metrics]) -> float | None:
        """The value; None where it was not measured or is undefined, as without a class that means healthy."""
        found = _asked(metrics[self.step], self.merged)
        scores = found.of(self.level) if found else None
        return getattr(scores, self.metric) if scores else None


def _asked(metrics: Metrics, merged: bool) -> Levels | None:
    every = next(iter(metrics.values()), None)
    # of two classes every class by itself is the same question
    return metrics.get("binary", every if "2 classes" in metrics else None) if merged else every


COLUMNS: dict[str, Place] = {
    "validation balanced, 2/255": Place("validation", 1, False, "image", "balanced_accuracy"),
    "clean": Place("test", 0, False, "image", "accuracy"),
    "1/255": Place("test", 1, False, "image", "accuracy"),
    "2/255": Place("test", 2, False, "image", "accuracy"),
    "clean, balanced": Place("test", 0, False, "image", "balanced_accuracy"),
    "2/255, balanced": Place("test", 2, False, "image", "balanced_accuracy"),
    "patient AUROC, clean": Place("test", 0, True, "patient", "auroc"),
    "patient AUROC, 1/255": Place("test", 1, True, "patient", "auroc"),
}
CHOSEN_BY = next(iter(COLUMNS))


def summarise(out: Path, baselines: Mapping[str, Metrics] | None = None) -> RecipesSummary:
    """Mean and standard deviation over seeds of each variant whose runs lie in ``out``, and the winner.

    Args:
        baselines: of :func:`utils.experiments.recipes.score_baselines`; None takes those of the last summary.

    Raises:
        FileNotFoundError: no runs there.
        ValueError: runs over other data, models or budgets among them, or one that is not whole.
    """
    runs = [read_run(path) for path in sorted(out.glob("*_seed*.json"))]
    if not runs:
        raise FileNotFoundError(f"no finished runs in {out}")
    same = [{"budget": asdict(run.budget), "model": run.model, **facts_of(run)} for run in runs]
    other = [name for one in same[1:] for name in differing(same[0], one)]
    if other:
        raise ValueError(f"{out} holds runs with other {', '.join(dict.fromkeys(other))}; use a folder for each")
    old: Mapping[str, Metrics] = {}
    if baselines is None and (out / SUMMARY).is_file():
        old = read_part(RecipesSummary, out / SUMMARY, "delete it, and it is made again").baselines
    order = [CLEAN, *VARIANTS]
    rows = {}
    for name in sorted({run.variant for run in runs}, key=order.index):
        own = [run for run in runs if run.variant == name]
        rows[name] = VariantRow(
            title=own[0].title,
            seeds=[run.seed for run in own],
            minutes=float(np.mean([run.training.seconds for run in own])) / 60,
            collapsed=sum(any(entry.get("collapsed") for entry in run.training.history) for run in own),
            values={
                column: [
                    place.value((run.validation if place.side == "validation" else run.test).metrics) for run in own
                ]
                for column, place in COLUMNS.items()
            },
        )
    known = {name: _known(row.values[CHOSEN_BY]) for name, row in rows.items() if name != CLEAN}
    hardened = {name: float(np.mean(values)) for name, values in known.items() if values}
    first = runs[0]
    return RecipesSummary(
        winner=max(hardened, key=hardened.__getitem__) if hardened else None,
        chosen_by=CHOSEN_BY,
        variants=rows,
        baselines=dict(old if baselines is None else baselines),
        attacks=first.test.attacks,
        n_images=first.test.n_images,
        n_subjects=first.test.n_subjects,
        model=first.model,
        budget=first.budget,
        data=first.data,
        environment=environment_facts(),
    )


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def summary_table(summary: RecipesSummary) -> pd.DataFrame:
    """Mean ± standard deviation over seeds in percent, a row a variant, the baselines below; the winner has a star."""
    rows = {}
    for name, row in summary.variants.items():
        cells = {column: _mean_and_sd(values) for column, values in row.values.items()}
        title = row.title + (" *" if name == summary.winner else "")
        rows[title] = {"seeds": str(len(row.seeds)), **cells, "minutes": f"{row.minutes:.1f}"}
    for name, metrics in summary.baselines.items():
        places = {column: place for column, place in COLUMNS.items() if (place.side, place.step) == ("test", 0)}
        rows[name] = {column: _mean_and_sd([place.value([metrics])]) for column, place in places.items()}
    return pd.DataFrame.from_dict(rows, orient="index").astype(object).fillna("-")


def _mean_and_sd(values: Sequence[float | None]) -> str:
    known = [100 * value for value in _known(values)]
    if not known:
        return "-"
    return f"{np.mean(known):.1f}" + (f" ± {np.std(known, ddof=1):.1f}" if len(known) > 1 else "")
