"""Compare ways of hardening."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from models.def_models import BACKBONES
from utils.commands.boundary import command
from utils.core.paths import DATASET_VARIABLES, ROOT, write_json
from utils.data.sets import load_splits
from utils.experiments.recipes import (
    RECIPE_VARIANTS,
    SUMMARY,
    VARIANTS,
    Budget,
    run_seed,
    score_baselines,
    summarise,
    summary_table,
)
from utils.reporting.experiment_figures import recipes_figure
from utils.reporting.style import save_figure
from utils.training.config import parse_trainable


@command
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    splits = load_splits(args.data)
    names = list(VARIANTS) if args.variants == ["all"] else args.variants
    unknown = set(names) - set(VARIANTS)
    if unknown:
        raise ValueError(f"no variant {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    budget = budget_of(args)
    for seed in args.seeds:
        places = {"out": args.out, "work": args.work / args.out.name}
        run_seed(splits, backbone=args.backbone, variants=names, seed=seed, budget=budget, **places)
    summary = summarise(args.out, score_baselines(splits))
    write_json(args.out / SUMMARY, summary)
    save_figure(recipes_figure(summary), (args.out / SUMMARY).with_suffix(".png"))
    print(summary_table(summary).to_string())
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m utils recipes", description="Compare ways of hardening")
    add = parser.add_argument
    add("--variants", nargs="+", default=list(RECIPE_VARIANTS), metavar="NAME", help=f"all, or of {' '.join(VARIANTS)}")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_common(parser, "compare_recipes")
    return parser.parse_args(arguments)


def add_common(parser: argparse.ArgumentParser, work: str) -> None:
    """Give a command data, backbone, folders and the fields of ``Budget`` that may be chosen."""
    add = parser.add_argument
    add("--data", type=Path, default=DATASET_VARIABLES, help="folder of prepared *_set.pt")
    add("--backbone", choices=sorted(BACKBONES), default="resnet34")
    add("--out", type=Path, required=True, help="folder of the results")
    add("--work", type=Path, default=ROOT / "runs" / work, help="folder of weights and unfinished runs")
    for name, default in asdict(Budget()).items():
        if name not in ("eps", "trainable"):
            add(f"--{name.replace('_', '-')}", type=type(default), default=default)
    trainable = {"type": parse_trainable, "default": "all", "metavar": "all|head|N"}
    add("--trainable", help="what is trained; N: the last N blocks", **trainable)


def budget_of(args: argparse.Namespace) -> Budget:
    """The budget that :func:`add_common` has read."""
    return Budget(**{name: getattr(args, name) for name in Budget.__dataclass_fields__ if hasattr(args, name)})
