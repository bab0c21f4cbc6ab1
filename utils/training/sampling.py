"""Which images make up a batch, and how they are mixed."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from utils.data.sets import ImageSet
from utils.evaluation.intervals import patient_groups


def epoch_order(
    data: ImageSet, sampling: str, generator: torch.Generator, *, slices_per_patient: int = 0
) -> torch.Tensor:
    """Indices of one epoch, as many as :func:`epoch_size` says.

    Args:
        sampling: ``shuffled`` takes each image once. ``patient`` does too, and spreads each patient's slices evenly
            over the epoch, so that a batch holds slices of as many patients as it can. ``class`` draws with
            replacement, each class equally often.
        generator: CPU generator.
        slices_per_patient: the epoch is made of so many slices of each patient, drawn anew each time; 0 takes all.
    """
    if slices_per_patient:
        chosen = _some_of_each(data, slices_per_patient, generator)
        return chosen[epoch_order(data.subset(chosen), sampling, generator)]
    n = len(data)
    if sampling == "class":
        rarity = 1 / data.labels.bincount(minlength=len(data.classes)).clamp(min=1).double()
        return torch.multinomial(rarity[data.labels], n, replacement=True, generator=generator)
    order = torch.randperm(n, generator=generator)
    if sampling == "shuffled":
        return order
    patients = torch.from_numpy(patient_groups(data.subjects))
    sizes = patients.bincount()
    # the j-th of a patient's m slices falls somewhere in the j-th of m equal parts of the epoch
    rank = torch.empty(n)
    rank[order] = _rank_within(patients[order])
    moment = (rank + torch.rand(n, generator=generator)) / sizes[patients]
    return moment.argsort()


def epoch_size(data: ImageSet, slices_per_patient: int = 0) -> int:
    """Images of one epoch; an image of an unknown patient counts as a patient of its own."""
    if not slices_per_patient:
        return len(data)
    return int(torch.from_numpy(patient_groups(data.subjects)).bincount().clamp(max=slices_per_patient).sum())


def _some_of_each(data: ImageSet, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices, in ascending order, of at most ``count`` random images of each patient."""
    patients = torch.from_numpy(patient_groups(data.subjects))
    order = torch.randperm(len(data), generator=generator)
    return order[_rank_within(patients[order]) < count].sort().values


def _rank_within(groups: torch.Tensor) -> torch.Tensor:
    """How many earlier entries are of the same group."""
    by_group = np.argsort(groups.numpy(), kind="stable")
    starts = np.searchsorted(groups.numpy()[by_group], np.arange(int(groups.max()) + 1))
    rank = np.empty(len(groups), dtype=np.float32)
    rank[by_group] = np.arange(len(groups)) - starts[groups.numpy()[by_group]]
    return torch.from_numpy(rank)


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    mixup: float,
    cutmix: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each image mixed with another of its batch: mixup (Zhang et al., 2018, arXiv:1710.09412, equation 1) or
    CutMix (Yun et al., 2019, arXiv:1905.04899, equation 1); where both are asked for, one of the two by chance.

    Args:
        images: float tensor N x C x H x W in [0, 1].
        labels: int64 tensor N.
        mixup, cutmix: parameter of the Beta distribution of the share, 0 for none.
        generator: CPU generator.

    Returns:
        mixed images; the label of each one's larger share, N; shares of all classes, N x K.
    """
    blend, first, second = torch.rand(3, generator=generator).tolist()
    mixes = mixup > 0 and (cutmix == 0 or blend < 0.5)
    rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
    width = mixup if mixes else cutmix
    share = float(rng.beta(width, width))
    share = max(share, 1 - share)
    other = torch.randperm(len(images), generator=generator).to(images.device)
    if mixes:
        mixed = share * images + (1 - share) * images[other]
    else:
        mixed, share = _paste(images, images[other], share, first, second)
    one_hot = F.one_hot(labels, num_classes).float()
    return mixed, labels, share * one_hot + (1 - share) * one_hot[other]


def _paste(
    images: torch.Tensor, others: torch.Tensor, share: float, down: float, right: float
) -> tuple[torch.Tensor, float]:
    """A rectangle of ``others`` in ``images``, and the share of the images that is left."""
    height, width = images.shape[-2:]
    side = (1 - share) ** 0.5
    tall, wide = round(side * height), round(side * width)
    top, left = round(down * (height - tall)), round(right * (width - wide))
    mixed = images.clone()
    mixed[..., top : top + tall, left : left + wide] = others[..., top : top + tall, left : left + wide]
    return mixed, 1 - tall * wide / (height * width)
