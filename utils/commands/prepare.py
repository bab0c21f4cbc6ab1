"""Prepare a data set: decode, find the patients, split, check."""

from __future__ import annotations

import argparse
from pathlib import Path

from utils.commands.boundary import command
from utils.core.paths import DATASET_VARIABLES
from utils.data.preparation import SYNTHETIC_RULES, describe, group_by_subject, split_and_save
from utils.data.sets import data_note
from utils.data.sources import load_source
from utils.data.splits import DEFAULT_RATIOS, PROTOCOLS, check_ratios
from utils.evaluation.leak_audit import audit, audit_table
from utils.reporting.leak import save_audit


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m utils prepare", description=__doc__.splitlines()[0])
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
