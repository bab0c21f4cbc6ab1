"""A patient's slices as one image with a channel a slice, so that a patient can be attacked and judged as one."""

from __future__ import annotations

import torch

from utils.data.sets import ImageSet
from utils.data.subject_ids import UNKNOWN


def patient_stacks(images: ImageSet, n_slices: int = 8) -> ImageSet:
    """One entry a patient: ``n_slices`` of the slices in their order, evenly spaced, as channels.

    A patient with fewer slices gives some of them twice. Images of unknown patients are left out.

    Args:
        images: N x 1 x H x W.

    Returns:
        a set of P images P x n_slices x H x W with each patient's most frequent label; ``slices`` is -1.

    Raises:
        ValueError: no patient is known, or the order of a patient's slices is not.
    """
    patients = images.subjects[images.subjects != UNKNOWN].unique()
    if not len(patients):
        raise ValueError("no patient is known, so slices cannot be put together; prepare with --split patient")
    chosen = torch.stack([_evenly(images, patient, n_slices) for patient in patients])
    first = chosen[:, 0]
    return ImageSet(
        images.images[chosen, 0],
        torch.stack([images.labels[images.subjects == patient].mode().values for patient in patients]),
        patients,
        torch.full_like(patients, -1),
        images.synthetic[first],
        [images.paths[place] for place in first.tolist()],
        images.classes,
        images.info,
    )


def _evenly(images: ImageSet, patient: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of ``count`` slices of a patient from the lowest to the highest."""
    own = torch.nonzero(images.subjects == patient)[:, 0]
    places = images.slices[own]
    if (places < 0).any():
        raise ValueError(f"the order of the slices of patient {int(patient)} is not known")
    ordered = own[places.argsort(stable=True)]
    # the middles of as many equal parts, so that one slice is the middle one
    return ordered[((torch.arange(count) + 0.5) * len(own) / count).long()]
