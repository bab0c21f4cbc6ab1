"""Prepare a data set: decode, find the patients, split, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from utils.commands.boundary import command
from utils.core.checks import LARGEST_SEED, whole
from utils.core.paths import DATASET_VARIABLES, check_folder
from utils.data.preparation import describe, group_by_subject, split_and_save
from utils.data.scans.cohort import ScanOptions
from utils.data.sets import data_note
from utils.data.sources import load_source
from utils.data.splits import check_ratios
from utils.data.subject_ids import own_pattern
from utils.data.text_tables import read_text_table
from utils.evaluation.leak_audit import audit, audit_table
from utils.reporting.embedding import save_embedding
from utils.reporting.leak import save_audit


@command("python -m utils prepare")
def main(
    *,
    source: str,
    split: Literal["patient", "published", "random"] = "patient",
    out: Path = DATASET_VARIABLES,
    ratios: tuple[float, float, float] | None = None,
    seed: int = 0,
    size: int | None = None,
    subjects: Path | None = None,
    subject_pattern: str | None = None,
    accept_unverified_patients: bool = False,
    synthetic: Literal["auto", "corners", "none"] = "auto",
    classes: tuple[str, ...] = (),
    audit_folder: Annotated[Path | None, Parameter(name="--audit")] = None,
    scans: Annotated[ScanOptions, Parameter(name="*")] = ScanOptions(),  # noqa: B008 - frozen
) -> None:
    """Prepare a data set: decode the images, find the patients, split them, check for leaks.

    Args:
        source: folder, archive, Kaggle handle, kaggle, phantom, or phantom-t2 (the same heads in another contrast).
        split: patient keeps all images of a person on one side; published takes the source's own test folder.
        out: folder of the sets that are written.
        ratios: shares of training, validation and test; without it those of the split.
        seed: of the split.
        size: store squares of this side; without it the images keep their resolution.
        subjects: CSV with columns path,subject where patients are known.
        subject_pattern: regular expression of what a patient's id looks like in the paths.
        accept_unverified_patients: split by patient although the patients found in the pixels failed their checks; all
            results say so.
        synthetic: which images an augmentation made: those without black corners, none, or auto: corners on the set
            that is known to hold such images, else none.
        classes: all classes in the order of their labels; without it by severity.
        audit_folder: also measure the leak; figure and record go here.
        scans: of whole heads.
    """
    check_ratios(split, ratios)
    whole("--seed", seed, 0, LARGEST_SEED)
    scans.mapping, scans.cut  # noqa: B018 - refused now, and not after the first head
    _check_ids(subjects, subject_pattern)
    for folder in filter(None, (out, audit_folder)):
        check_folder(folder)
    _check_apart(source, out)
    raw = load_source(source, size=size, classes=list(classes) or None, scans=scans, scans_folder=out / "scans")
    patients = group_by_subject(raw, subjects, subject_pattern=subject_pattern, synthetic=synthetic)
    print(describe(raw, patients))
    splits = split_and_save(
        raw, patients, split=split, out=out, ratios=ratios, seed=seed, accept_unverified=accept_unverified_patients
    )
    if audit_folder:
        found = audit(raw, patients, seed=seed)
        save_audit(found, audit_folder, note=data_note(splits.info))
        save_embedding(splits.test, audit_folder, note=data_note(splits.info))
        print(audit_table(found["audits"]).to_string())
        print(f"1-NN in patient-grouped five-fold: {found['cross_validation']:.1%}")
    print(splits.table().to_string())
    shared = splits.info["shared_patients"]
    if shared["shared"]:
        print(f"Note: {shared['shared']} of {shared['test']} test patients are on the other sides too.")
    if note := data_note(splits.info):
        print(f"Note: {note}")
    print(f"saved to {out}")


def _check_apart(source: str, out: Path) -> None:
    """The manifest that is written would be read as the source's own table the next time."""
    if Path(source).expanduser().resolve() == out.resolve():
        raise ValueError(f"--out {out} is the source itself; name another folder")


def _check_ids(subjects: Path | None, subject_pattern: str | None) -> None:
    """What names the patients can be read; said now, and not after all images are decoded."""
    if subjects:
        read_text_table(subjects)
    if subject_pattern is not None:
        own_pattern(subject_pattern)
