"""How much a split gives away: what a classifier that learns nothing scores by recognising patients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from utils.attacks.suites import GRID
from utils.data.neighbours import pooled_features
from utils.data.patient_evidence import classes_alone
from utils.data.preparation import splits_in_memory
from utils.data.raw_images import RawImages
from utils.data.sets import DataSplits, ImageSet, patients_verified
from utils.data.splits import patient_folds
from utils.data.subject_ids import UNKNOWN
from utils.data.subjects import Subjects

_ROWS_AT_ONCE = 1024
_TRAIN_ROWS_AT_ONCE = 16_384
_PLANES_AT_ONCE = 32
#: An audit asks for at most so many test images, spread over patients.
_MOST_TEST = 4000


@dataclass
class LeakAudit:
    """Findings for one split.

    Attributes:
        protocol: name of the split.
        n_train, n_test: images that are looked up, and images that are asked for, of a large set a part.
        accuracy: of raw-pixel 1-nearest-neighbour, 0..1.
        majority: accuracy of always answering the most frequent training class, 0..1.
        expected: what the classes alone give, without recognising anybody: the better of ``majority`` and a linear
            discriminant on a few principal axes, 0..1. A nearest neighbour far above it knows patients again, whatever
            the split says of them; None where it was not measured.
        same_patient: share of test images whose nearest real training image is of the same
            patient, 0..1; None where the patients are unverified, because it would check their groups by themselves.
        max_correlation: highest correlation between a test and a training image.
        correlations: each test image's highest correlation with a training image. Shape n_test.
        certified_accuracy: share of test images that 1-nearest-neighbour answers rightly however an attacker changes
            their pixels by up to each of ``epsilons``, proven; at least, 0..1.
        epsilons: radii in L-inf, pixels in [0, 1].
    """

    protocol: str
    n_train: int
    n_test: int
    accuracy: float
    majority: float
    same_patient: float | None
    max_correlation: float
    correlations: np.ndarray = field(repr=False)
    certified_accuracy: list[float] = field(default_factory=list)
    epsilons: list[float] = field(default_factory=list)
    expected: float | None = None

    def as_dict(self) -> dict[str, float | int | str]:
        """Plain values without the per-image array."""
        return {key: value for key, value in asdict(self).items() if key != "correlations"}


def audit_leak(train: ImageSet, test: ImageSet, protocol: str) -> LeakAudit:
    """Measure how far ``test``, or a fixed part of a large one, can be answered by looking up ``train``."""
    test = test.balanced_subset(_MOST_TEST)
    labels, limit = train.labels.numpy(), 1.01 * max(GRID)
    nearest, radii = _nearest_and_radii(raw_pixels(train), labels, raw_pixels(test), test.labels.numpy(), limit)
    correlations = highest_correlations(train, test)
    usual = np.bincount(labels).argmax()
    return LeakAudit(
        protocol=protocol,
        n_train=len(train),
        n_test=len(test),
        accuracy=float((labels[nearest] == test.labels.numpy()).mean()),
        majority=float((test.labels.numpy() == usual).mean()),
        expected=expected_accuracy(train, test),
        same_patient=_same_patient_share(train, test, nearest) if patients_verified(test.info) else None,
        max_correlation=float(correlations.max()),
        correlations=correlations,
        certified_accuracy=[float((radii > eps).mean()) for eps in GRID],
        epsilons=list(GRID),
    )


def raw_pixels(part: ImageSet) -> np.ndarray:
    """Images as rows of raw pixels, uint8 N x D: a quarter of the memory that floats would take."""
    return part.images.flatten(1).numpy()


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows as floats; 8-bit pixels in [0, 1]."""
    return rows.astype(np.float32) / 255 if rows.dtype == np.uint8 else rows


def _squared_norms(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([(_unit(rows[part]) ** 2).sum(1) for part in _parts(len(rows))])


def _parts(n: int) -> list[slice]:
    return [slice(start, start + _TRAIN_ROWS_AT_ONCE) for start in range(0, max(n, 1), _TRAIN_ROWS_AT_ONCE)]


def _squared_distances(train: np.ndarray, norms: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Squared distances of float rows M x D to all of ``train``, less the rows' own norms. Shape M x N."""
    return np.concatenate([norms[part] - 2 * rows @ _unit(train[part]).T for part in _parts(len(train))], axis=1)


def nearest_neighbours(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of, and squared Euclidean distance to, the nearest row of ``train`` for each row of ``test``.

    Args:
        train, test: N x D and M x D, floats or 8-bit pixels, which are taken to [0, 1].
    """
    nearest = np.empty(len(test), dtype=np.int64)
    distance = np.empty(len(test), dtype=np.float32)
    for block, squared, own in _distances(train, test):
        nearest[block], distance[block] = squared.argmin(1), squared.min(1) + own[:, 0]
    return nearest, distance


def _distances(train: np.ndarray, test: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """A block of ``test``, its squared distances to ``train`` less its own squared norms, and these, M x 1."""
    norms = _squared_norms(train)
    for start in range(0, len(test), _ROWS_AT_ONCE):
        rows = _unit(test[start : start + _ROWS_AT_ONCE])
        yield (
            slice(start, start + len(rows)),
            _squared_distances(train, norms, rows),
            (rows**2).sum(1, keepdims=True),
        )


def certified_radii(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, limit: float = np.inf
) -> np.ndarray:
    """Radius in L-inf below which no change of an image turns its 1-nearest-neighbour answer wrong; 0 where it is.

    While an image stays closer to its nearest own-class row a than to every row b of another class, the answer is
    right. The border between a and b is a plane, (|x - b|^2 - |x - a|^2) / (2 |b - a|_1) away from x in L-inf; the
    nearest of these planes is the radius. It is exact for a, and a lower bound where another own-class row would take
    over (Wang et al., 2019, arXiv:1906.03972, solve that exactly).

    Args:
        train, test: as for :func:`nearest_neighbours`.
        train_labels, test_labels: whole numbers N and M.
        limit: larger radii are given as this one, which saves most of the time.

    Returns:
        float array M.
    """
    return _nearest_and_radii(train, train_labels, test, test_labels, limit)[1]


def _nearest_and_radii(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of :func:`nearest_neighbours` and radii of :func:`certified_radii`, of distances that are taken once."""
    nearest, radii = np.empty(len(test), dtype=np.int64), np.empty(len(test))
    for block, squared, own in _distances(train, test):
        nearest[block] = squared.argmin(1)
        for place, distances in enumerate((squared + own).clip(0), block.start):
            radii[place] = _nearest_plane(train, distances, train_labels == test_labels[place], limit)
    return nearest, radii


def _nearest_plane(train: np.ndarray, squared: np.ndarray, own: np.ndarray, radius: float) -> float:
    """The radius of one image, at most ``radius``, from its squared distances to all rows; ``own`` has its class."""
    if not own.any():
        return 0.0
    mine, others = np.where(own, squared, np.inf).argmin(), np.flatnonzero(~own)
    # |b - a|_1 is at most sqrt(D) (|x - b| + |x - a|), so most planes are known to be far without a look at pixels
    least = (np.sqrt(squared[others]) - np.sqrt(squared[mine])) / (2 * np.sqrt(train.shape[1]))
    order = np.argsort(least)
    for start in range(0, len(order), _PLANES_AT_ONCE):
        part = order[start : start + _PLANES_AT_ONCE]
        if least[part[0]] >= radius:
            break
        apart = np.abs(_unit(train[others[part]]) - _unit(train[mine])).sum(1).clip(1e-12)
        radius = min(radius, ((squared[others[part]] - squared[mine]) / (2 * apart)).min())
    return max(float(radius), 0.0)


def highest_correlations(train: ImageSet, test: ImageSet) -> np.ndarray:
    """Each test image's highest correlation with a training image, both pooled to 64 x 64. Shape M, -1..1."""
    known, asked = (pooled_features(part.images[:, 0].numpy()) for part in (train, test))
    chunks = (asked[start : start + _ROWS_AT_ONCE] for start in range(0, len(asked), _ROWS_AT_ONCE))
    return np.concatenate([(chunk @ known.T).max(1) for chunk in chunks])


def _same_patient_share(train: ImageSet, test: ImageSet, nearest: np.ndarray) -> float:
    """Test images whose nearest image of a known patient is of theirs; ``nearest`` is that of all training images."""
    real = train.subset(torch.nonzero(train.subjects != UNKNOWN)[:, 0])
    if not len(real):
        return float("nan")
    if len(real) < len(train):
        nearest, _ = nearest_neighbours(raw_pixels(real), raw_pixels(test))
    return float((real.subjects.numpy()[nearest] == test.subjects.numpy()).mean())


def expected_accuracy(train: ImageSet, test: ImageSet) -> float:
    """What the classes alone give, see :attr:`LeakAudit.expected`."""
    pixels = torch.cat([train.images, test.images])[:, 0].numpy()
    labels = torch.cat([train.labels, test.labels]).numpy()
    return classes_alone(pixels, labels, np.arange(len(train)), np.arange(len(train), len(labels)))


def _percent_or_unknown(share: float | None) -> str:
    return "patients unverified" if share is None else f"{share:.1%}"


def audit_splits(*splits: DataSplits) -> list[LeakAudit]:
    """One audit a split: test against all that is not test."""
    return [audit_leak(one.train.join(one.validation), one.test, one.info["protocol"]) for one in splits]


def cross_validated_accuracy(images: ImageSet, *, n_folds: int = 5, seed: int = 0) -> float:
    """Accuracy of raw-pixel 1-nearest-neighbour in patient-grouped cross-validation.

    ``images`` should be the real images without copies; every one is scored once.
    """
    pixels, labels = raw_pixels(images), images.labels.numpy()
    right = 0
    for train, test in patient_folds(images.subjects.numpy(), labels, n_folds=n_folds, seed=seed):
        nearest, _ = nearest_neighbours(pixels[train], pixels[test])
        right += int((labels[train][nearest] == labels[test]).sum())
    return right / len(images)


def audit_table(audits: list[LeakAudit]) -> pd.DataFrame:
    """The findings side by side, one row a split."""
    rows = {
        audit.protocol: {
            "train and validation images": audit.n_train,
            "test images": audit.n_test,
            "1-NN accuracy": f"{audit.accuracy:.1%}",
            "what the classes alone give": "-" if audit.expected is None else f"{audit.expected:.1%}",
            "always the majority": f"{audit.majority:.1%}",
            "nearest is the same patient": _percent_or_unknown(audit.same_patient),
            "highest correlation": f"{audit.max_correlation:.3f}",
        }
        for audit in audits
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("split")


def audit(raw: RawImages, subjects: Subjects, *, seed: int = 0, cross_validate: bool = True) -> dict[str, Any]:
    """Leak audit of the usual split beside the patient split.

    The usual split is the published one where the source has train and test folders, else a
    random one by image.

    Returns:
        ``audits``: the two :class:`utils.evaluation.leak_audit.LeakAudit`; ``cross_validation``: accuracy 0..1
        of 1-nearest-neighbour in patient-grouped five-fold over all real images, or None.
    """
    protocols = ("published" if {"train", "test"} <= set(raw.folders) else "random", "patient")
    splits = [splits_in_memory(raw, subjects, protocol, seed) for protocol in protocols]
    return {
        "audits": audit_splits(*splits),
        "cross_validation": cross_validated_accuracy(splits[1].everyone, seed=seed) if cross_validate else None,
        "data": splits[1].info,
    }
