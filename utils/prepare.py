"""Prepare a data set: ``python -m utils.prepare --source PATH --split patient --out DIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.command import command
from utils.data import DataSplits, build_splits, data_note, manifest, save_splits, stored_source
from utils.leak_audit import audit_splits, audit_table, cross_validated_accuracy
from utils.paths import DATASET_VARIABLES, read_json, write_json
from utils.patient_evidence import confirmed
from utils.reproducibility import environment_facts
from utils.sources import DATA_SOURCES, RawImages, canonical_class, load_source
from utils.splits import DEFAULT_RATIOS, PROTOCOLS, assign_splits, check_ratios
from utils.subject_ids import NamedSubjects, find_ids, read_subjects_csv
from utils.subjects import PIXELS, SOURCE, UNKNOWN, Subjects, find_subjects, find_synthetic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        source: see :func:`utils.sources.load_source`.
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
        subjects_csv: see :func:`utils.subject_ids.read_subjects_csv`.
        subject_pattern: see :func:`utils.subject_ids.find_ids`.
        synthetic: which images an augmentation made, and no patient split takes: ``corners`` those without black
            corners, ``none``, or ``auto``, the first on the set that this rule is made for and else the second.

    Raises:
        ValueError: the CSV or the pattern does not name a patient for each image; an unknown rule.
    """
    flagged, notes = _synthetic(raw, synthetic)
    if subjects_csv:
        named = NamedSubjects(read_subjects_csv(subjects_csv, raw.paths), f"the table {Path(subjects_csv).name}")
        # in a table -1 is somebody's word that this is an image of nobody
        flagged = flagged | (named.subject == UNKNOWN)
    elif raw.subjects is not None:
        named = NamedSubjects(raw.subjects, SOURCE)
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
            :func:`utils.splits.assign_splits`.
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
    """Write ``leak_audit.json`` and ``leak_audit.png`` and return the figure.

    Raises:
        FileExistsError: the folder holds the audit of another source, which tables may be made from.
    """
    from utils.plots import plot_leak_audit, save_figure

    target = Path(folder) / "leak_audit.json"
    _refuse_other_source(target, found["data"]["source"])
    record = {
        "note": note,
        "data": found["data"],
        "splits": [one.as_dict() for one in found["audits"]],
        "patient_grouped_five_fold_accuracy": found["cross_validation"],
        "environment": environment_facts(),
    }
    figure = plot_leak_audit(found["audits"], note=note)
    write_json(target, record)
    save_figure(figure, target.with_suffix(".png"))
    return figure


def _refuse_other_source(target: Path, source: str) -> None:
    stored = read_json(target)["data"]["source"] if target.is_file() else source
    if stored != source:
        raise FileExistsError(
            f"{target} is the audit of {stored}; give {source} a folder of its own, or remove the file first"
        )


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
    parser.add_argument("--subject-pattern", metavar="REGEX", help="what a patient's id looks like in the paths")
    parser.add_argument(
        "--accept-unverified-patients",
        action="store_true",
        help="split by patient although the patients found in the pixels failed their checks; all results say so",
    )
    parser.add_argument(
        "--synthetic",
        choices=SYNTHETIC_RULES,
        default="auto",
        help="images that an augmentation made: those without black corners, none, or auto (default): corners on the "
        "set known to hold such images, else none",
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="all classes in the order of their labels (default: by severity)"
    )
    parser.add_argument("--audit", type=Path, metavar="DIR", help="also measure the leak; figure and record go here")
    return parser.parse_args(arguments)


@command
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _arguments(arguments)
    ratios = tuple(args.ratios) if args.ratios else None
    check_ratios(args.split, ratios)
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, but is {args.seed}")
    raw = load_source(args.source, size=args.size, classes=args.classes)
    subjects = group_by_subject(raw, args.subjects, subject_pattern=args.subject_pattern, synthetic=args.synthetic)
    print(describe(raw, subjects))
    splits = split_and_save(
        raw,
        subjects,
        split=args.split,
        out=args.out,
        ratios=ratios,
        seed=args.seed,
        accept_unverified=args.accept_unverified_patients,
    )
    found = audit(raw, subjects, seed=args.seed) if args.audit else None
    if found:
        save_audit(found, args.audit, note=data_note(splits.info))
        print(audit_table(found["audits"]).to_string())
        print(f"1-NN in patient-grouped five-fold: {found['cross_validation']:.1%}")
    print(splits.table().to_string())
    shared = splits.info["shared_patients"]
    if shared["shared"]:
        print(f"Note: {shared['shared']} of {shared['test']} test patients are on the other sides too.")
    if note := data_note(splits.info):
        print(f"Note: {note}")
    print(f"saved to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
