"""Prepare a data set: ``python -m utils.prepare --source PATH --split patient --out DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from utils.data import DataSplits, build_splits, manifest, save_splits
from utils.leak_audit import audit_splits, audit_table, cross_validated_accuracy
from utils.paths import DATASET_VARIABLES, write_json
from utils.reproducibility import environment_facts
from utils.sources import DATA_SOURCES, RawImages, load_source
from utils.splits import DEFAULT_RATIOS, PROTOCOLS, assign_splits, check_ratios
from utils.subjects import UNKNOWN, Subjects, find_subjects

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def prepare_dataset(
    source: str | Path,
    *,
    split: str = "patient",
    out: str | Path = DATASET_VARIABLES,
    ratios: tuple[float, ...] | None = None,
    seed: int = 0,
    size: int | None = None,
    subjects_csv: str | Path | None = None,
) -> DataSplits:
    """Decode a source, group its slices by patient, split, check and save.

    Args:
        source: see :func:`utils.sources.load_source`.
        split: ``patient`` (no patient on two sides), ``published`` (the source's own train/test
            folders, which share patients) or ``random`` (by image, which shares patients too).
        out: folder for ``{train,validation,test}_set.pt`` and ``manifest.csv``.
        ratios: shares of train, validation, test; None takes ``splits.DEFAULT_RATIOS``.
        seed: seed of the split.
        size: side in pixels to store; None keeps the native resolution.
        subjects_csv: CSV with columns ``path`` and ``subject`` where the patients are known.

    Raises:
        FileNotFoundError, ValueError, OSError: see :func:`load_source`, :func:`assign_splits` and
            :func:`save_splits`. Nothing saved before is touched.
    """
    check_ratios(split, ratios)
    raw = load_source(source, size=size)
    subjects = group_by_subject(raw, subjects_csv)
    return split_and_save(raw, subjects, split=split, out=out, ratios=ratios, seed=seed)


def group_by_subject(raw: RawImages, subjects_csv: str | Path | None = None) -> Subjects:
    """Patients from a CSV, from the source itself, or from the pixels, in this order."""
    known = read_subjects_csv(subjects_csv, raw.paths) if subjects_csv else raw.subjects
    return find_subjects(raw.pixels, raw.labels, known=known)


def read_subjects_csv(path: str | Path, image_paths: list[str]) -> np.ndarray:
    """Patient ids in the order of ``image_paths``; -1 in the file means nobody.

    Raises:
        ValueError: not a CSV with columns ``path`` and ``subject``, two patients for one image, or
            none.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV ({error})") from error
    if not {"path", "subject"} <= set(table.columns):
        raise ValueError(f"{path} needs the columns path and subject, it has {list(table.columns)}")
    table = table[["path", "subject"]].map(str.strip).drop_duplicates()
    doubled = table["path"][table["path"].duplicated()].tolist()
    if doubled:
        raise ValueError(f"{path} names two patients for {doubled[0]}")
    named = dict(zip(table["path"], table["subject"]))
    missing = [name for name in image_paths if not named.get(name)]
    if missing:
        raise ValueError(f"{path} names no patient for {len(missing)} images, for example {missing[0]}")
    subjects = np.array([named[name] for name in image_paths])
    return np.where(subjects == str(UNKNOWN), UNKNOWN, np.unique(subjects, return_inverse=True)[1])


def split_and_save(
    raw: RawImages,
    subjects: Subjects,
    *,
    split: str = "patient",
    out: str | Path = DATASET_VARIABLES,
    ratios: tuple[float, ...] | None = None,
    seed: int = 0,
) -> DataSplits:
    """Assign the sides and write them; the second half of :func:`prepare_dataset`."""
    splits, sides = _cut(raw, subjects, split, ratios, seed)
    save_splits(splits, manifest(raw, subjects, sides), Path(out))
    return splits


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
        **raw.info,
    }
    return build_splits(raw, subjects, sides, info), sides


def slices_of_patients(raw: RawImages, subjects: Subjects, *, columns: int = 8) -> tuple[np.ndarray, list[str]]:
    """Evenly spaced slices of the first patient of each class, with captions, for a contact sheet.

    Returns:
        uint8 array (classes * columns) x H x W, and as many captions.
    """
    chosen, captions = [], []
    for label, name in enumerate(raw.classes):
        own = np.flatnonzero((raw.labels == label) & (subjects.subject != UNKNOWN) & ~subjects.duplicate)
        stack = own[subjects.subject[own] == subjects.subject[own[0]]]
        stack = stack[np.argsort(subjects.slice[stack])]
        picked = stack[np.linspace(0, len(stack) - 1, columns).round().astype(int)]
        chosen.extend(picked)
        captions.extend(f"{name}, slice {subjects.slice[index]}" for index in picked)
    return raw.pixels[chosen], captions


def audit(raw: RawImages, subjects: Subjects, *, seed: int = 0, cross_validate: bool = True) -> dict[str, Any]:
    """Leak audit of the usual split beside the patient split.

    The usual split is the published one where the source has train and test folders, else a
    random one by image.

    Returns:
        ``audits``: the two :class:`utils.leak_audit.LeakAudit`; ``cross_validation``: accuracy 0..1
        of 1-nearest-neighbour in patient-grouped five-fold over all real images, or None.
    """
    protocols = ("published" if {"train", "test"} <= set(raw.folders) else "random", "patient")
    splits = [splits_in_memory(raw, subjects, protocol, seed) for protocol in protocols]
    return {
        "audits": audit_splits(*splits),
        "cross_validation": cross_validated_accuracy(splits[1].everyone, seed=seed) if cross_validate else None,
        "data": splits[1].info,
    }


def save_audit(found: dict[str, Any], folder: Path, *, note: str = "") -> Figure:
    """Write ``leak_audit.json`` and ``leak_audit.png`` and return the figure."""
    from utils.plots import plot_leak_audit, save_figure

    record = {
        "note": note,
        "data": found["data"],
        "splits": [one.as_dict() for one in found["audits"]],
        "patient_grouped_five_fold_accuracy": found["cross_validation"],
        "environment": environment_facts(),
    }
    figure = plot_leak_audit(found["audits"], note=note)
    write_json(Path(folder) / "leak_audit.json", record)
    save_figure(figure, Path(folder) / "leak_audit.png")
    return figure


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
    return "\n".join(lines + [f"Note: {note}" for note in raw.notes + subjects.notes])


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m utils.prepare", description=__doc__.split(":")[0])
    parser.add_argument("--source", required=True, help="folder, archive, Kaggle handle, kaggle or phantom")
    parser.add_argument("--split", choices=PROTOCOLS, default="patient")
    parser.add_argument("--out", type=Path, default=DATASET_VARIABLES)
    parser.add_argument(
        "--ratios", type=float, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"), help=f"default {DEFAULT_RATIOS}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="store squares of this side (default: native resolution)")
    parser.add_argument("--subjects", type=Path, help="CSV with columns path,subject where patients are known")
    parser.add_argument("--audit", type=Path, metavar="DIR", help="also measure the leak; figure and record go here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _arguments(arguments)
    ratios = tuple(args.ratios) if args.ratios else None
    try:
        check_ratios(args.split, ratios)
        if args.seed < 0:
            raise ValueError(f"--seed must not be negative, but is {args.seed}")
        raw = load_source(args.source, size=args.size)
        subjects = group_by_subject(raw, args.subjects)
        print(describe(raw, subjects))
        found = audit(raw, subjects, seed=args.seed) if args.audit else None
        splits = split_and_save(raw, subjects, split=args.split, out=args.out, ratios=ratios, seed=args.seed)
        if found:
            save_audit(found, args.audit)
            print(audit_table(found["audits"]).to_string())
            print(f"1-NN in patient-grouped five-fold: {found['cross_validation']:.1%}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(splits.table().to_string())
    if args.split != "patient":
        print("Note: this split shares patients between its sides; its accuracy measures recognition of patients.")
    print(f"saved to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
