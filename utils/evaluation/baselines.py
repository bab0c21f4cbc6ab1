"""What a deep model has to beat: the majority, the nearest neighbour, and two sizes that a radiologist reads off.

Each baseline learns from the training patients and gives logits for other images, so that everything that is
measured of a model is measured of it in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy  # loads its parts at their first use
import torch

from utils.data.sets import DataSplits, ImageSet
from utils.evaluation.leak_audit import nearest_neighbours, raw_pixels

#: An image is dark where it is below this share of its own bright end: fluid, not tissue.
DARK = 0.35
#: Share of the head's half width that counts as its rim, where the sulci are.
RIM = 0.3


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
    from sklearn.linear_model import LogisticRegression  # slow to import, rarely needed
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit(fluid_shares(train.images[:, 0].numpy()), train.labels.numpy())
    known = torch.from_numpy(model.predict_log_proba(fluid_shares(images.images[:, 0].numpy()))).float()
    logits = torch.full((len(images), len(train.classes)), -30.0)
    logits[:, torch.from_numpy(model.classes_)] = known
    return logits


#: By the name under which it stands in tables.
BASELINES: dict[str, Callable[[ImageSet, ImageSet], torch.Tensor]] = {
    "always the majority": majority,
    "1-NN, raw pixels": nearest_neighbour,
    "ventricles and sulci": anatomy,
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
    head = scipy.ndimage.binary_fill_holes(image > 5)
    if not head.any():
        return 0.0, 0.0
    depth = scipy.ndimage.distance_transform_edt(head)
    bright = np.percentile(image[head], 98)
    dark = head & (image < DARK * bright)
    rim = head & (depth <= RIM * depth.max())
    inside = head & ~rim
    return float((dark & inside).sum() / head.sum()), float((dark & rim).sum() / max(rim.sum(), 1))
