"""What cross-validation says of each patient, on one scale over all folds.

Answers of different folds come from different models. Each fold's log-odds of illness are counted from the threshold
that is best on its own validation patients; within a fold the order of the patients stays what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from utils.data.classes import healthy_class
from utils.data.sets import ImageSet
from utils.evaluation.intervals import with_intervals
from utils.evaluation.metrics import Scores, best_threshold, illness_by_patient, merge_by_patient, scores
from utils.experiments.fold_records import FoldModel, FoldRecord


@dataclass(frozen=True)
class PatientOdds:
    """One model's answers about the patients of all folds, on the slices that were attacked.

    Attributes:
        labels: class of each patient, int64 P.
        ill: whether that is not the healthy one, bool P.
        odds: for each radius the log-odds of illness, float P; at 0 a fold's own threshold.
    """

    labels: torch.Tensor
    ill: torch.Tensor
    odds: list[torch.Tensor]


def patient_odds(folds: Sequence[FoldRecord], name: str) -> PatientOdds:
    """The answers of the model ``name`` of each fold.

    Raises:
        ValueError: a fold does not tell its validation answers, or has one kind of patients there alone; or no class
            is known to mean healthy.
    """
    labels, ill, odds = [], [], []
    for fold in folds:
        model, images = fold.models[name], fold.attacked.bare(fold.classes)
        threshold = threshold_of(fold, model)
        if threshold is None:
            raise ValueError(f"fold {fold.data.fold} has no threshold: its validation answers are not told")
        steps = [_odds(torch.tensor(logits), images, threshold) for logits in model.attacked]
        labels.append(merge_by_patient(torch.tensor(model.attacked[0]).softmax(1), images)[1])
        ill.append(steps[0][1])
        odds.append([own for own, _ in steps])
    return PatientOdds(torch.cat(labels), torch.cat(ill), [torch.cat(step) for step in zip(*odds)])


def threshold_of(fold: FoldRecord, model: FoldModel) -> float | None:
    """Chosen on the fold's validation patients; None where their answers were not kept or only one kind is there."""
    if fold.validation is None or not model.validation or healthy_class(fold.classes) is None:
        return None
    chances, ill = illness_by_patient(torch.tensor(model.validation), fold.validation.bare(fold.classes))
    return best_threshold(chances, ill) if ill.any() and not ill.all() else None


def scores_at_thresholds(sets: Sequence[ImageSet], logits: Sequence[list], thresholds: Sequence[float]) -> Scores:
    """Scores of two classes by patient, with 95 % intervals over patients, each fold deciding at its own threshold."""
    found = [_odds(torch.tensor(own), part, cut) for own, part, cut in zip(logits, sets, thresholds)]
    ones = torch.cat([odds for odds, _ in found]).sigmoid()
    probabilities, labels = torch.stack([1 - ones, ones], 1), torch.cat([ill for _, ill in found]).long()
    told = scores(probabilities, labels, ["healthy", "ill"])
    return with_intervals(told, probabilities, labels, torch.arange(len(labels)))


def _odds(logits: torch.Tensor, images: ImageSet, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-odds of illness of each patient, counted from ``threshold``, and whether the patient is ill."""
    chances, ill = illness_by_patient(logits, images)
    return chances.logit(eps=1e-6) - torch.tensor(threshold).logit(eps=1e-6), ill
