"""How well models and baselines of the same folds rank patients by illness, alone and in pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from utils.data.classes import healthy_class
from utils.evaluation.intervals import MeanAuroc, compare_auroc, mean_auroc
from utils.evaluation.metrics import illness_by_patient
from utils.experiments.fold_records import FoldRecord


def rankings(folds: Sequence[FoldRecord], name: str, *, attacked: bool = False) -> list[MeanAuroc]:
    """Mean AUROC over folds of a model at each radius, or of a baseline without attack.

    Args:
        attacked: on the attacked images alone, also without attack.

    Returns:
        empty where no class is known to mean healthy, or a fold tests ill or healthy patients alone.
    """
    found = [mean_auroc(*_illness(folds, name, step, attacked=attacked)) for step in _steps(folds, name)]
    return [one for one in found if one is not None]


def paired_gains(folds: Sequence[FoldRecord], name: str) -> dict[str, list[MeanAuroc]]:
    """How much better the model ``name`` ranks patients than each baseline and each other model.

    Returns:
        name of the other -> a difference at each radius at which both were asked; a baseline is not attacked.
    """
    first, found = folds[0], {}
    for other in (*first.baselines, *first.models):
        if other != name and _steps(folds, name):
            gains = [_gain(folds, name, other, step) for step in _steps(folds, other)]
            found[other] = [gain for gain in gains if gain is not None]
    return found


def _steps(folds: Sequence[FoldRecord], name: str) -> range:
    """Places of the radii at which a row can be asked who is ill."""
    if healthy_class(folds[0].classes) is None:
        return range(0)
    return range(len(folds[0].epsilons) if name in folds[0].models else 1)


def _gain(folds: Sequence[FoldRecord], name: str, other: str, step: int) -> MeanAuroc | None:
    ours, ill = _illness(folds, name, step)
    return compare_auroc(ours, _illness(folds, other, step)[0], ill)


def _illness(
    folds: Sequence[FoldRecord], name: str, step: int, *, attacked: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each fold, chances of illness of its patients at a radius, and whether they are ill."""
    chances, ill = [], []
    for fold in folds:
        few = step > 0 or attacked
        whose = fold.attacked if few else fold.test
        if name not in fold.models:
            logits = fold.baselines[name]
        else:
            logits = fold.models[name].attacked[step] if few else fold.models[name].logits
        own, kinds = illness_by_patient(torch.tensor(logits), whose.bare(fold.classes))
        chances.append(own)
        ill.append(kinds)
    return chances, ill
