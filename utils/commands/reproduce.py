"""Run the notebooks in order."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from utils.commands.boundary import command
from utils.core.paths import ROOT
from utils.data.splits import PROTOCOLS
from utils.data.workspace import PROFILES
from utils.reporting.gallery import write_gallery
from utils.reporting.notebooks import QUICK_FOLDER, model_notebooks, plan, run


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m utils reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"default: {' '.join(model_notebooks())}")
    parser.add_argument(
        "--data",
        help="folder, archive, Kaggle handle, phantom, or a folder of prepared *_set.pt; "
        "default: phantom, or with --profile full what dataset/dataset_variables holds",
    )
    parser.add_argument("--skip-results", action="store_true", help="leave results.ipynb out")
    parser.add_argument("--only-results", action="store_true", help="run results.ipynb alone, on models trained before")
    parser.add_argument("--split", choices=PROTOCOLS, help="default: patient")
    parser.add_argument("--out", type=Path, help="default: quick_run/, or with --profile full the repository itself")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the notebooks")
    parser.add_argument(
        "--set-atk",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="the same, for the hardening notebooks only",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="notebooks that run at once and share the CPU threads; default: 1, or with --profile quick one a model",
    )
    args = parser.parse_args(arguments)
    if args.out is None and args.profile == "quick":
        args.out = QUICK_FOLDER
    if args.jobs is None:
        models = len(args.models or model_notebooks())
        args.jobs = max(1, min(models, os.cpu_count() or 1)) if args.profile == "quick" else 1
    args.out = args.out.expanduser().resolve() if args.out else None
    return args


@command
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _arguments(arguments)
    begun = time.perf_counter()
    steps = plan(args)
    together = f", {args.jobs} at a time" if args.jobs > 1 else ""
    print(f"{len(steps)} notebooks{together}, profile {args.profile}, results in {args.out or ROOT}")
    if args.profile == "quick":
        print("about one minute a notebook on two CPU cores; each training says how long it will take")
    run(steps, out=args.out, jobs=args.jobs)
    minutes = (time.perf_counter() - begun) / 60
    folder = args.out or ROOT
    page = write_gallery(folder)
    print(f"done in {minutes:.1f} minutes. Figures: {page}  notebooks: {args.out or ROOT / 'models'}")
    return 0
