"""Which image goes to training, validation and test."""

from __future__ import annotations

import warnings

import numpy as np

from utils.data.subject_ids import UNKNOWN

SPLITS = ("train", "validation", "test")
PROTOCOLS = ("patient", "published", "random")
EXCLUDED = ""

#: Shares of train, validation and test. ``published`` cuts only the published train folder, and not even that where
#: the set has a validation folder of its own.
DEFAULT_RATIOS = {
    "patient": (0.6, 0.2, 0.2),
    "published": (0.8, 0.2, 0.0),
    "random": (0.8, 0.1, 0.1),
}


def check_ratios(protocol: str, ratios: tuple[float, ...] | None) -> tuple[float, float, float]:
    """The ratios to use, checked.

    Raises:
        ValueError: unknown protocol, not three shares, a negative share, a sum other than 1, or an
            empty side (but for ``published``, whose test folder is given).
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"split must be one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    shares = tuple(float(share) for share in (ratios or DEFAULT_RATIOS[protocol]))
    if len(shares) != 3 or not all(share >= 0 for share in shares) or not abs(sum(shares) - 1) <= 1e-6:
        raise ValueError(f"ratios must be three shares >= 0 that sum to 1, not {shares}")
    if protocol == "published" and shares[2]:
        raise ValueError("the published split has its own test folder: the third ratio must be 0")
    if 0 in shares[:2] or (protocol != "published" and shares[2] == 0):
        raise ValueError(f"no side may be empty (validation chooses the weights), but the ratios are {shares}")
    return shares


def assign_splits(
    protocol: str,
    *,
    labels: np.ndarray,
    subject: np.ndarray,
    synthetic: np.ndarray,
    duplicate: np.ndarray,
    folders: list[str],
    classes: tuple[str, ...],
    ratios: tuple[float, ...] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Name the split of each image.

    ``patient`` leaves out synthetic images and copies, ``published`` and ``random`` keep
    everything, as the literature does.

    Returns:
        str array N of ``train``, ``validation``, ``test`` or ``""`` (left out).

    Raises:
        ValueError: see :func:`check_ratios`; too few patients or images; no train/test folders.
    """
    shares = check_ratios(protocol, ratios)
    rng = np.random.default_rng(seed)
    split = np.full(len(labels), EXCLUDED, dtype="<U10")
    if protocol == "patient":
        usable = ~synthetic & ~duplicate & (subject != UNKNOWN)
        sides = split_patients(subject[usable], labels[usable], classes, shares, rng)
        split[usable] = [sides[patient] for patient in subject[usable]]
    elif protocol == "random":
        split[:] = _cut(len(labels), shares, rng)
    else:
        split[:] = _published(np.array(folders), shares, given=ratios is not None, rng=rng)
    _check_sides(split, shares, protocol)
    return split


def _published(folder: np.ndarray, shares: tuple[float, ...], *, given: bool, rng: np.random.Generator) -> np.ndarray:
    """The set's own folders; its validation folder is kept, and only where there is none the train folder is cut."""
    if not {"train", "test"} <= set(folder.tolist()):
        raise ValueError("the published split needs a source with train/ and test/ folders; use --split patient")
    split = np.where(np.isin(folder, SPLITS), folder, EXCLUDED).astype("<U10")
    if (folder == "validation").any():
        if given:
            raise ValueError(
                "the set has a validation folder of its own, which the published split keeps; leave out ratios"
            )
        return split
    split[folder == "train"] = _cut(int((folder == "train").sum()), shares, rng)
    return split


def _cut(n: int, shares: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    names = np.repeat(SPLITS, _seats(n, shares, minimum=0))
    return names[rng.permutation(n)]


def split_patients(
    subject: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    shares: tuple[float, float, float],
    rng: np.random.Generator,
) -> dict[int, str]:
    """Deal the patients of each class to the three sides.

    A class with two patients trains on one and tests on the other. A group with several labels
    counts for the label it has most often.

    Returns:
        patient id -> split name.

    Raises:
        ValueError: a class has fewer than two patients.
    """
    label_of = {p: int(np.bincount(labels[subject == p]).argmax()) for p in np.unique(subject).tolist()}
    sides: dict[int, str] = {}
    for label, name in enumerate(classes):
        patients = [patient for patient, own in label_of.items() if own == label]
        if len(patients) < 2:
            raise ValueError(
                f"too few patients for a patient split: class {name} has {len(patients)}, and train "
                "and test need one each. Merge classes, leave this one out, or use --split random (which leaks)."
            )
        shuffled = rng.permutation(patients).tolist()
        sides |= dict(zip(shuffled, np.repeat(SPLITS, _seats(len(patients), shares, minimum=1)).tolist()))
    return sides


def _seats(n: int, shares: tuple[float, ...], *, minimum: int) -> list[int]:
    """Whole numbers that sum to n, by largest remainder; train and test get ``minimum`` each, then validation."""
    exact = [n * share for share in shares]
    seats = [int(value + 1e-9) for value in exact]
    for side in (0, 2):
        if shares[side] > 0:
            seats[side] = max(seats[side], minimum)
    if shares[1] > 0 and sum(seats) < n:
        seats[1] = max(seats[1], minimum)
    while sum(seats) < n:
        seats[max(range(3), key=lambda side: round(exact[side] - seats[side], 9))] += 1
    while sum(seats) > n:
        spare = [side for side in range(3) if seats[side] > (minimum if side != 1 else 0)]
        seats[max(spare, key=lambda side: seats[side] - exact[side])] -= 1
    return seats


def _check_sides(split: np.ndarray, shares: tuple[float, ...], protocol: str) -> None:
    wanted = [name for name, share in zip(SPLITS, shares) if share or (name, protocol) == ("test", "published")]
    empty = [name for name in wanted if not (split == name).any()]
    if empty:
        unit = "patients" if protocol == "patient" else "images"
        raise ValueError(f"too few {unit} for the ratios {shares}: {', '.join(empty)} would be empty")


def patient_folds(
    subject: np.ndarray, labels: np.ndarray, *, n_folds: int = 5, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cross-validation in which no patient is on both sides.

    Returns:
        ``n_folds`` pairs of index arrays (train, test); every image is tested once.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import, rarely needed

    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # it cannot be in every fold
        return list(folds.split(np.zeros(len(labels)), labels, subject))


def fold_sides(
    subject: np.ndarray, labels: np.ndarray, *, fold: int, n_folds: int = 5, validation: float = 0.25, seed: int = 0
) -> np.ndarray:
    """Sides of one fold of :func:`patient_folds`: its patients test, a share of each class's others validates.

    A class with fewer than ``1 / validation`` others trains on all of them.

    Args:
        validation: share of the patients that are not tested.

    Returns:
        str array N of ``train``, ``validation``, ``test``.

    Raises:
        ValueError: no such fold.
    """
    if not 0 <= fold < n_folds:
        raise ValueError(f"there are folds 0 to {n_folds - 1}, not {fold}")
    rest, test = patient_folds(subject, labels, n_folds=n_folds, seed=seed)[fold]
    rng = np.random.default_rng([seed, fold])
    sides = np.full(len(labels), SPLITS[0], dtype="<U10")
    sides[test] = SPLITS[2]
    for label in np.unique(labels):
        patients = rng.permutation(np.unique(subject[rest][labels[rest] == label]))
        sides[np.isin(subject, patients[: int(validation * len(patients))])] = SPLITS[1]
    return sides
