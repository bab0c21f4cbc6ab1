"""Late fusion: what models of several modalities say of the same patients, put together by patient.

Each modality has images, models and a split of its own; only probabilities of patients meet. So a patient must not be
tested in one modality and trained on in another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from utils.data.sets import DataSplits, ImageSet
from utils.data.subject_ids import UNKNOWN, id_in
from utils.evaluation.metrics import merge_by_patient


@dataclass(frozen=True)
class Fused:
    """Patients that every modality has, in the order of their names.

    Attributes:
        names: of the patients, P.
        each: modality -> probabilities P x K.
        probabilities: their mean, P x K.
        labels: int64 tensor P.
        left_out: patients that some modality lacks.
    """

    names: list[str]
    each: dict[str, torch.Tensor]
    probabilities: torch.Tensor
    labels: torch.Tensor
    left_out: int


def patient_names(images: ImageSet) -> dict[int, str]:
    """Patient -> name by which other modalities know it: the id in its paths, or else its first path.

    Raises:
        ValueError: two patients have one name.
    """
    first: dict[int, str] = {}
    for subject, path in sorted(zip(images.subjects.tolist(), images.paths)):
        if subject != UNKNOWN:
            first.setdefault(subject, id_in(path) or path)
    named: dict[str, int] = {}
    for subject, name in first.items():
        if named.setdefault(name, subject) != subject:
            raise ValueError(f"two patients are called {name}, so it cannot be told whose other scan is whose")
    return first


def refuse_leak(splits: Mapping[str, DataSplits]) -> None:
    """Refuse modalities of which one tests a patient that another one trains or validates on.

    Raises:
        ValueError: it does; the message names a patient.
    """
    tested = {name: set(patient_names(own.test).values()) for name, own in splits.items()}
    for name, own in splits.items():
        known = {*patient_names(own.train).values(), *patient_names(own.validation).values()}
        for other, patients in tested.items():
            if shared := sorted(known & patients):
                raise ValueError(
                    f"{shared[0]} is tested in {other} and known to the models of {name}: split both alike, with the "
                    "same --seed and --ratios over the same patients"
                )


def fuse(answers: Mapping[str, tuple[torch.Tensor, ImageSet]]) -> Fused:
    """Mean probability of each patient over the modalities that it has all of.

    Args:
        answers: modality -> logits N x K and the images that they are of.

    Raises:
        ValueError: fewer than two modalities, other classes, no patient in common, or one with two labels.
    """
    if len(answers) < 2:
        raise ValueError(f"late fusion needs at least two modalities, not {len(answers)}")
    orders = {tuple(images.classes) for _, images in answers.values()}
    if len(orders) > 1:
        raise ValueError(f"the modalities have other classes: {' and '.join(', '.join(own) for own in sorted(orders))}")
    tables = {name: _by_name(logits, images) for name, (logits, images) in answers.items()}
    everyone = set().union(*tables.values())
    names = sorted(set.intersection(*(set(table) for table in tables.values())))
    if not names:
        raise ValueError("no patient is in all modalities; patients are known by ids in names, or by equal paths")
    for patient in names:
        labels = {name: table[patient][1] for name, table in tables.items()}
        if len(set(labels.values())) > 1:
            classes = next(iter(answers.values()))[1].classes
            told = ", ".join(f"{classes[label]} in {name}" for name, label in labels.items())
            raise ValueError(f"{patient} is {told}: one patient must have one label")
    each = {name: torch.stack([table[patient][0] for patient in names]) for name, table in tables.items()}
    return Fused(
        names=names,
        each=each,
        probabilities=torch.stack(list(each.values())).mean(0),
        labels=torch.tensor([next(iter(tables.values()))[patient][1] for patient in names]),
        left_out=len(everyone) - len(names),
    )


def _by_name(logits: torch.Tensor, images: ImageSet) -> dict[str, tuple[torch.Tensor, int]]:
    """Name -> probabilities K and label of each patient."""
    chances, labels = merge_by_patient(logits.softmax(1), images)
    names = patient_names(images)
    patients = images.subjects[images.subjects != UNKNOWN].unique().tolist()
    return {names[patient]: (own, int(label)) for patient, own, label in zip(patients, chances, labels)}
