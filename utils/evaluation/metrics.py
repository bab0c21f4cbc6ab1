"""Predictions and what they are worth, at image and at patient level."""

from __future__ import annotations

import torch
from torch import nn

from utils.core.modes import eval_mode
from utils.core.parts import Part
from utils.data.classes import healthy_place
from utils.data.sets import ImageSet
from utils.data.subject_ids import UNKNOWN


class Scores(Part):
    """What answers are worth; shares are 0..1, and None where they are undefined.

    Attributes:
        n: images or patients.
        auroc: macro, one class against the rest.
        recall: by class; None for a class without images.
        confusion: rows (true) of counts (predicted).
        interval: 95 % interval of each metric over patients.
    """

    n: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    auroc: float | None
    calibration_error: float | None = None
    recall: dict[str, float | None] = {}
    confusion: list[list[int]] = []
    interval: dict[str, list[float] | None] = {}


class Levels(Part):
    """The same answers by image and by patient; None where no patient is known."""

    image: Scores | None
    patient: Scores | None

    def of(self, level: str) -> Scores | None:
        """``image`` or ``patient``."""
        return self.patient if level == "patient" else self.image


#: Question -> answers, see :func:`utils.evaluation.intervals.questions`.
Metrics = dict[str, Levels]


@torch.no_grad()
def predict(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Logits of all images in order, in eval mode. Shape N x K, float32 on the CPU."""
    with eval_mode(model):
        return torch.cat([model(batch).float().cpu() for batch, _ in images.batches(batch_size, device)])


def merge_by_patient(probabilities: torch.Tensor, images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean probability over the slices of each patient, to six digits.

    Patients with the same slices right and wrong, as of a nearest neighbour, then have the same mean whatever the order
    of their slices, and count as ties in an AUROC.

    Args:
        probabilities: N x K, rows sum to 1.

    Returns:
        P x K probabilities and P labels (each patient's most frequent one). Images of unknown
        patients are left out.
    """
    patients = images.subjects[images.subjects != UNKNOWN].unique()
    groups = [images.subjects == patient for patient in patients]
    if not groups:
        return probabilities[:0], images.labels[:0]
    means = torch.stack([probabilities[group].double().mean(0).round(decimals=6) for group in groups])
    return means.to(probabilities.dtype), torch.stack([images.labels[group].mode().values for group in groups])


def scores(probabilities: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> Scores:
    """Accuracy, balanced accuracy, macro F1, AUROC, calibration error, recall a class, confusion.

    Balanced accuracy, macro F1 and AUROC are means over the classes that ``labels`` contain, so
    that an absent class neither helps nor hurts.

    Args:
        probabilities: N x K, rows sum to 1.
        labels: int64 tensor N.
        classes: K names.

    """
    import torchmetrics.functional.classification as tm  # slow to import

    k = len(classes)
    present = labels.bincount(minlength=k) > 0
    predicted = probabilities.argmax(1)
    recall = tm.multiclass_recall(predicted, labels, k, average=None)
    f1 = tm.multiclass_f1_score(predicted, labels, k, average=None)
    auroc = torch.stack([tm.binary_auroc(probabilities[:, c], (labels == c).long()) for c in range(k) if present[c]])
    return Scores(
        n=len(labels),
        accuracy=(predicted == labels).double().mean().item(),
        balanced_accuracy=recall[present].mean().item(),
        macro_f1=f1[present].mean().item(),
        auroc=auroc.mean().item() if present.sum() > 1 else None,
        calibration_error=tm.multiclass_calibration_error(probabilities, labels, k, n_bins=15).item(),
        recall={name: recall[c].item() if present[c] else None for c, name in enumerate(classes)},
        confusion=tm.multiclass_confusion_matrix(predicted, labels, k).tolist(),
    )


def illness_by_patient(logits: torch.Tensor, images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability that a patient is not healthy, P, and whether that is so, bool P.

    Args:
        logits: N x K.

    Raises:
        ValueError: no class is known to mean healthy.
    """
    place = healthy_place(images.classes)
    means, labels = merge_by_patient(logits.softmax(1), images)
    return 1 - means[:, place], labels != place


def best_threshold(chances: torch.Tensor, ill: torch.Tensor) -> float:
    """The threshold with the highest balanced accuracy (Youden, 1950); of several as good the middle one.

    Args:
        chances: of being ill, P; who has at least the threshold counts as ill.
        ill: bool P, with both kinds in it.

    Raises:
        ValueError: all are ill, or none is.
    """
    if ill.all() or not ill.any():
        raise ValueError("a threshold needs ill and healthy patients")
    ordered = chances.unique()
    cuts = torch.cat([ordered[:1], (ordered[:-1] + ordered[1:]) / 2])
    missed, spared = (torch.searchsorted(chances[kind].sort().values, cuts) / int(kind.sum()) for kind in (ill, ~ill))
    balanced = (1 - missed + spared) / 2
    best = torch.nonzero(balanced >= balanced.max() - 1e-6)[:, 0]
    return float(cuts[best[len(best) // 2]])


def evaluate(logits: torch.Tensor, images: ImageSet) -> Levels:
    """:func:`scores` of logits N x K, once over images and once over patients."""
    probabilities = logits.softmax(1)
    by_patient = merge_by_patient(probabilities, images)
    return Levels(
        image=scores(probabilities, images.labels, images.classes),
        patient=scores(*by_patient, images.classes) if len(by_patient[1]) else None,
    )
