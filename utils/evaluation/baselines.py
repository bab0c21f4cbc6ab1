"""What a deep model has to beat: the majority, the nearest neighbour, and the fluid that a radiologist reads off.

Each baseline learns from the training patients and gives logits for other images, so that everything that is
measured of a model is measured of it in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from utils.data.anatomy import dark_in, head_of, rim_of
from utils.data.sets import DataSplits, ImageSet
from utils.data.subject_ids import UNKNOWN
from utils.evaluation.leak_audit import nearest_neighbours, raw_pixels

#: Places of a stack at which its fluid is read.
PROFILE = 32


def majority(train: ImageSet, images: ImageSet) -> torch.Tensor:
    """Log-frequencies of the classes in ``train``, the same for each image. Shape N x K."""
    counts = train.labels.bincount(minlength=len(train.classes)).double()
    return ((counts + 1) / (counts + 1).sum()).log().float().expand(len(images), -1).clone()


def nearest_neighbour(train: ImageSet, images: ImageSet) -> torch.Tensor:
    """Logits that are sure of the class of the nearest training image in raw pixels. Shape N x K."""
    nearest, _ = nearest_neighbours(raw_pixels(train), raw_pixels(images))
    answers = train.labels[torch.from_numpy(nearest)]
    return 10.0 * torch.nn.functional.one_hot(answers, len(train.classes)).float()


def anatomy(train: ImageSet, images: ImageSet) -> torch.Tensor:
    """Log-probabilities of a logistic regression on :func:`fluid_shares`, classes weighted alike. Shape N x K."""
    known, asked = (fluid_shares(part.images[:, 0].numpy()) for part in (train, images))
    return _regression(known, train.labels.numpy(), asked, len(train.classes), strength=1.0)


def fluid_by_slice(train: ImageSet, images: ImageSet) -> torch.Tensor:
    """Log-probabilities of a logistic regression on the fluid of each of a patient's slices, in their order. N x K.

    All images of a patient get its answer. Where the order of slices is not known it answers as :func:`majority`.
    """
    if any((part.slices < 0).any() or (part.subjects == UNKNOWN).any() for part in (train, images)):
        return majority(train, images)
    known, labels, _ = _fluid_profiles(train)
    asked, _, whose = _fluid_profiles(images)
    logits = _regression(known, labels, asked, len(train.classes), strength=0.03)
    return logits[whose]


def _fluid_profiles(images: ImageSet) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Dark share of each head at ``PROFILE`` places of its stack, P x PROFILE; labels P; the patient of each image."""
    shares = np.array([_dark_share(image) for image in images.images[:, 0].numpy()])
    patients, whose = images.subjects.unique(return_inverse=True)
    rows, labels = [], []
    for number in range(len(patients)):
        own = torch.nonzero(whose == number)[:, 0]
        ordered = shares[own[images.slices[own].argsort()].numpy()]
        rows.append(np.interp(np.linspace(0, 1, PROFILE), np.linspace(0, 1, len(ordered)), ordered))
        labels.append(int(images.labels[own].mode().values))
    return np.array(rows), np.array(labels), whose


def _dark_share(image: np.ndarray) -> float:
    head = head_of(image)
    return float(dark_in(image, head)[head].mean()) if head.any() else 0.0


def _regression(
    known: np.ndarray, labels: np.ndarray, asked: np.ndarray, classes: int, *, strength: float
) -> torch.Tensor:
    """Log-probabilities of a standardised logistic regression with classes weighted alike; ``strength`` is C."""
    from sklearn.linear_model import LogisticRegression  # slow to import, rarely needed
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000, C=strength))
    model.fit(known, labels)
    logits = torch.full((len(asked), classes), -30.0)
    logits[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_log_proba(asked)).float()
    return logits


MAJORITY = "always the majority"
#: By the name under which it stands in tables.
BASELINES: dict[str, Callable[[ImageSet, ImageSet], torch.Tensor]] = {
    MAJORITY: majority,
    "1-NN, raw pixels": nearest_neighbour,
    "ventricles and sulci": anatomy,
    "fluid of each slice": fluid_by_slice,
}


def baseline_answers(splits: DataSplits, images: ImageSet | None = None) -> dict[str, torch.Tensor]:
    """Name -> logits N x K of each baseline, learnt from training and validation patients.

    Args:
        images: to answer for; None takes all test images.
    """
    known = splits.train.join(splits.validation)
    return {name: baseline(known, splits.test if images is None else images) for name, baseline in BASELINES.items()}


def fluid_shares(images: np.ndarray) -> np.ndarray:
    """Dark share of the inside of each head (ventricles) and of its rim (sulci).

    Args:
        images: uint8 array N x H x W of skull-stripped axial slices on black.

    Returns:
        float array N x 2, both in [0, 1].
    """
    return np.array([_fluid_shares(image) for image in images])


def _fluid_shares(image: np.ndarray) -> tuple[float, float]:
    head = head_of(image)
    if not head.any():
        return 0.0, 0.0
    dark, rim = dark_in(image, head), rim_of(head)
    inside = head & ~rim
    return float((dark & inside).sum() / head.sum()), float((dark & rim).sum() / max(rim.sum(), 1))
