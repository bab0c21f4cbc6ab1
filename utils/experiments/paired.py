"""Models and baselines of the same folds, compared on the same patients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from utils.data.classes import healthy_class
from utils.evaluation.intervals import AurocGain, compare_auroc
from utils.evaluation.metrics import illness_by_patient
from utils.experiments.fold_records import FoldRecord, Whose


def paired_gains(folds: Sequence[FoldRecord], name: str) -> dict[str, list[AurocGain]]:
    """How much better the model ``name`` tells ill patients from healthy ones than each baseline and each other model.

    Returns:
        name of the other -> a gain at each radius at which both were asked, without attack on all test images, else on
        the attacked ones; a baseline is not attacked. Empty where no class is known to mean healthy.
    """
    first = folds[0]
    if healthy_class(first.classes) is None:
        return {}
    others = [other for other in (*first.baselines, *first.models) if other != name]
    found = {}
    for other in others:
        radii = range(len(first.epsilons)) if other in first.models else (0,)
        gains = [_gain(folds, name, other, step) for step in radii]
        found[other] = [gain for gain in gains if gain is not None]
    return found


def _gain(folds: Sequence[FoldRecord], name: str, other: str, step: int) -> AurocGain | None:
    ours, ill = zip(*(_illness(fold, name, step) for fold in folds))
    theirs, _ = zip(*(_illness(fold, other, step) for fold in folds))
    return compare_auroc(ours, theirs, ill)


def _illness(fold: FoldRecord, name: str, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chances of illness of the patients of a fold at a radius, and whether they are ill."""
    whose: Whose = fold.attacked if step else fold.test
    if name not in fold.models:
        logits = fold.baselines[name]
    else:
        logits = fold.models[name].attacked[step] if step else fold.models[name].logits
    return illness_by_patient(torch.tensor(logits), whose.bare(fold.classes))
