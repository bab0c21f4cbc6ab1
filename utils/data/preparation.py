"""Prepare a data set: ``python -m utils prepare --source PATH --split patient --out DIR``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.core.checks import LARGEST_SEED, whole
from utils.core.paths import DATASET_VARIABLES
from utils.data.archives import DATA_SOURCES
from utils.data.classes import canonical_class
from utils.data.patient_evidence import confirmed
from utils.data.raw_images import SOURCE, RawImages
from utils.data.sets import DataSplits, build_splits, manifest, save_splits, stored_source
from utils.data.sources import load_source
from utils.data.splits import assign_splits, check_ratios
from utils.data.subject_ids import UNKNOWN, NamedSubjects, find_ids, subjects_of_table
from utils.data.subjects import PIXELS, Subjects, find_subjects, find_synthetic

if TYPE_CHECKING:
    pass

SYNTHETIC_RULES = ("auto", "corners", "none")


def prepare_dataset(
    source: str | Path,
    *,
    split: str = "patient",
    out: str | Path = DATASET_VARIABLES,
    ratios: tuple[float, ...] | None = None,
    seed: int = 0,
    size: int | None = None,
    subjects_csv: str | Path | None = None,
    subject_pattern: str | None = None,
    synthetic: str = "auto",
    accept_unverified: bool = False,
    classes: Sequence[str] | None = None,
) -> DataSplits:
    """Decode a source, group its slices by patient, split, check and save.

    Args:
        source: see :func:`utils.data.sources.load_source`.
        split: ``patient`` (no patient on two sides), ``published`` (the source's own train/test
            folders, which share patients) or ``random`` (by image, which shares patients too).
        out: folder for ``{train,validation,test}_set.pt`` and ``manifest.csv``.
        ratios: shares of train, validation, test; None takes ``splits.DEFAULT_RATIOS``.
        seed: seed of the split.
        size: side in pixels to store; None keeps the native resolution.
        subjects_csv, subject_pattern, synthetic: see :func:`group_by_subject`.
        accept_unverified: split by patient although the patients were guessed from pixels and the guess failed its
            checks; everything made of it then says so.
        classes: all class names in the order of their labels; None orders them by severity.

    Raises:
        FileNotFoundError, ValueError, OSError: see :func:`load_source`, :func:`group_by_subject`,
            :func:`split_and_save` and :func:`save_splits`. Nothing saved before is touched.
    """
    check_ratios(split, ratios)
    whole("seed", seed, 0, LARGEST_SEED)
    raw = load_source(source, size=size, classes=classes)
    subjects = group_by_subject(raw, subjects_csv, subject_pattern=subject_pattern, synthetic=synthetic)
    return split_and_save(
        raw, subjects, split=split, out=out, ratios=ratios, seed=seed, accept_unverified=accept_unverified
    )


def group_by_subject(
    raw: RawImages,
    subjects_csv: str | Path | None = None,
    *,
    subject_pattern: str | None = None,
    synthetic: str = "auto",
) -> Subjects:
    """Patients from a CSV, from the source itself, from names or folders, or from the pixels, in this order.

    Args:
        subjects_csv: see :func:`utils.data.subject_ids.read_subjects_csv`.
        subject_pattern: see :func:`utils.data.subject_ids.find_ids`.
        synthetic: which images an augmentation made, and no patient split takes: ``corners`` those without black
            corners, ``none``, or ``auto``, the first on the set that this rule is made for and else the second.

    Raises:
        ValueError: the CSV or the pattern does not name a patient for each image; an unknown rule.
    """
    flagged, notes = _synthetic(raw, synthetic)
    named: NamedSubjects | None
    if subjects_csv:
        named = subjects_of_table(subjects_csv, raw.paths)
        # in a table -1 is somebody's word that this is an image of nobody
        flagged = flagged | (named.subject == UNKNOWN)
    elif raw.subjects is not None and not (subject_pattern and raw.subjects_guessed):
        if subject_pattern:
            raise ValueError(f"--subject-pattern is for ids in names; here {raw.subjects_from} names the patients")
        named = NamedSubjects(raw.subjects, raw.subjects_from, guessed=raw.subjects_guessed)
        flagged = flagged | (named.subject == UNKNOWN)
    else:
        named = find_ids(raw.paths, raw.labels.tolist(), _passed_folders(raw), pattern=subject_pattern)
        if named and named.guessed and not confirmed(raw.pixels, named.subject):
            named = None
    found = find_subjects(
        raw.pixels,
        raw.labels,
        known=named.subject if named else None,
        origin=named.origin if named else SOURCE,
        guessed=bool(named and named.guessed),
        synthetic=flagged,
    )
    found.notes = [*notes, *(named.notes if named else ()), *found.notes]
    return found


def _synthetic(raw: RawImages, rule: str) -> tuple[np.ndarray, list[str]]:
    if rule not in SYNTHETIC_RULES:
        raise ValueError(f"synthetic must be one of {', '.join(SYNTHETIC_RULES)}, not {rule!r}")
    known = DATA_SOURCES.get(raw.name)
    if rule == "corners" or (rule == "auto" and known and known.n_synthetic):
        return find_synthetic(raw.pixels)
    return np.zeros(len(raw), dtype=bool), []


def _passed_folders(raw: RawImages) -> set[str]:
    """Names of folders that mean a class or a side, and so no patient."""
    names = {part for path in raw.paths for part in path.replace("\\", "/").split("/")[:-1]}
    sides = {path.replace("\\", "/").split("/")[0] for path, side in zip(raw.paths, raw.folders) if side}
    return sides | {name for name in names if canonical_class(name) in raw.classes}


def split_and_save(
    raw: RawImages,
    subjects: Subjects,
    *,
    split: str = "patient",
    out: str | Path = DATASET_VARIABLES,
    ratios: tuple[float, ...] | None = None,
    seed: int = 0,
    accept_unverified: bool = False,
) -> DataSplits:
    """Assign the sides and write them; the second half of :func:`prepare_dataset`.

    Raises:
        ValueError: a patient split of patients that are not verified and not accepted as such; see also
            :func:`utils.data.splits.assign_splits`.
        FileExistsError: phantoms would replace real images.
    """
    if split == "patient" and subjects.doubts and not accept_unverified:
        raise ValueError(_refusal(subjects))
    _keep_real_images(raw.name, Path(out))
    splits, sides = _cut(raw, subjects, split, ratios, seed)
    save_splits(splits, manifest(raw, subjects, sides), Path(out))
    return splits


def _keep_real_images(name: str, out: Path) -> None:
    stored = stored_source(out)
    if name == "phantom" and stored not in (None, name):
        raise FileExistsError(
            f"{out} holds {stored}, which phantoms must not replace; give them another folder, or remove it first"
        )


def patients_note(subjects: Subjects) -> str:
    """What a figure of these patients must say, or nothing."""
    return "patients unverified" if subjects.doubts else ""


def _refusal(subjects: Subjects) -> str:
    ways = (
        "--subjects CSV with path and subject",
        "--subject-pattern for ids in the names",
        "--split published or random, which share patients",
        "--accept-unverified-patients, which is then said of every number",
    )
    return (
        "no patient split: neither file names nor folders name the patients, and what was found in the pixels may not "
        f"be patients: {'; '.join(subjects.doubts)}. Ways out: {'; '.join(ways)}"
    )


def splits_in_memory(raw: RawImages, subjects: Subjects, split: str, seed: int = 0) -> DataSplits:
    """A split with its default ratios that is written nowhere, to be compared with another."""
    return _cut(raw, subjects, split, None, seed)[0]


def _cut(
    raw: RawImages, subjects: Subjects, split: str, ratios: tuple[float, ...] | None, seed: int
) -> tuple[DataSplits, np.ndarray]:
    sides = assign_splits(
        split,
        labels=raw.labels,
        subject=subjects.subject,
        synthetic=subjects.synthetic,
        duplicate=subjects.duplicate,
        folders=raw.folders,
        classes=raw.classes,
        ratios=ratios,
        seed=seed,
    )
    info = {
        "source": raw.name,
        "protocol": split,
        "ratios": list(check_ratios(split, ratios)),
        "split_seed": seed,
        "patients": subjects.facts(),
        "notes": [*raw.notes, *subjects.notes],
        **raw.info,
    }
    return build_splits(raw, subjects, sides, info), sides


def slices_of_patients(raw: RawImages, subjects: Subjects, *, columns: int = 8) -> tuple[np.ndarray, list[str]]:
    """Evenly spaced slices of the first patient of each class, with captions, for a contact sheet.

    Returns:
        uint8 array (classes * columns) x H x W, and as many captions.
    """
    chosen: list[int] = []
    captions: list[str] = []
    for label, name in enumerate(raw.classes):
        own = np.flatnonzero((raw.labels == label) & (subjects.subject != UNKNOWN) & ~subjects.duplicate)
        stack = own[subjects.subject[own] == subjects.subject[own[0]]]
        stack = stack[np.argsort(subjects.slice[stack])]
        picked = stack[np.linspace(0, len(stack) - 1, columns).round().astype(int)]
        chosen.extend(picked)
        captions.extend(f"{name}, slice {subjects.slice[index]}" for index in picked)
    return raw.pixels[chosen], captions


def describe(raw: RawImages, subjects: Subjects) -> str:
    """What was found, in one paragraph."""
    lines = [
        f"{raw.name}: {len(raw)} images of {raw.pixels.shape[1]}x{raw.pixels.shape[2]} pixels, "
        f"{subjects.count} patients, {subjects.synthetic.sum()} synthetic images, "
        f"{subjects.duplicate.sum()} byte-identical copies."
    ]
    known = DATA_SOURCES.get(raw.name)
    found = (subjects.count, int(subjects.synthetic.sum()), int(subjects.duplicate.sum()))
    if known and found != (known.n_subjects, known.n_synthetic, known.n_duplicates):
        lines.append(
            f"Note: expected {known.n_subjects} patients, {known.n_synthetic} synthetic images and "
            f"{known.n_duplicates} copies in {known.title}; were the images changed?"
        )
    if subjects.origin == PIXELS:
        lines.append(
            "Patients were found from the pixels. A second scan of a person in which pixels do not show the same head "
            "counts as another patient."
        )
    else:
        lines.append(f"Patients are named by {subjects.origin}.")
    return "\n".join(lines + [f"Note: {note}" for note in raw.notes + subjects.notes])
