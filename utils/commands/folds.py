"""Test every patient once: cross-validation grouped by patient."""

from __future__ import annotations

import argparse

from utils.commands.boundary import command
from utils.commands.recipes import add_common, budget_of
from utils.core.paths import write_json
from utils.data.sets import load_splits
from utils.experiments.folds import (
    SUMMARY,
    VARIANT,
    fold_of,
    fold_specification,
    refuse_other_folds,
    run_fold,
    summarise,
)
from utils.experiments.recipes import VARIANTS
from utils.reporting.experiment_figures import folds_figure
from utils.reporting.style import save_figure


@command
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    splits, budget = load_splits(args.data), budget_of(args)
    wanted = range(args.n_folds) if args.folds is None else args.folds
    # each is cut before the first is trained: what cannot be done is said at once
    for fold in wanted or [0]:
        fold_of(splits, fold, args.n_folds, args.seed)
    shared = fold_specification(splits, args.backbone, args.n_folds, args.seed, budget, args.variant)
    refuse_other_folds(args.out, splits, shared)
    for fold in wanted:
        target = args.out / f"fold{fold}.json"
        if not target.is_file():
            print(f"fold {fold}", flush=True)
            own = fold_of(splits, fold, args.n_folds, args.seed)
            work = args.work / args.out.name / f"fold{fold}"
            run_fold(
                own, backbone=args.backbone, seed=args.seed, budget=budget, target=target, work=work, shared=shared
            )
    summary = summarise(args.out)
    write_json(args.out / SUMMARY, summary)
    print(save_figure(folds_figure(summary), (args.out / SUMMARY).with_suffix(".png")))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m utils folds", description="Test every patient once")
    add = parser.add_argument
    add("--n-folds", type=int, default=5)
    add("--folds", type=int, nargs="+", metavar="K", help="only these, counted from 0; default: all")
    add("--seed", type=int, default=0)
    add("--variant", choices=VARIANTS, default=VARIANT, help=f"how each model is hardened (default {VARIANT})")
    add_common(parser, "cross_validate")
    return parser.parse_args(arguments)
