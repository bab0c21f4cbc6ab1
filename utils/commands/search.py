"""Search the hyperparameters of a training."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from models.def_models import BACKBONES, MRIClassifier, build_model
from utils.commands.boundary import command
from utils.core.paths import CHECKPOINTS, DATASET_VARIABLES
from utils.core.radii import parse_radius
from utils.data.sets import DataSplits, load_splits
from utils.optuna_search import SEARCH_SPACE, optuna_search, pick_space
from utils.training.checkpoints import load_trainable
from utils.training.objectives import RECIPES, Hardening, make_objective


@command
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m utils search", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=sorted(BACKBONES), required=True)
    parser.add_argument("--data", type=Path, default=DATASET_VARIABLES, help="folder of prepared *_set.pt")
    parser.add_argument("--n-trials", type=int, required=True, help="in all, over all workers")
    parser.add_argument("--num-epochs", type=int, default=3, help="epochs a trial (default 3)")
    parser.add_argument(
        "--space", nargs="*", default=[], metavar="NAME", help=f"default: all of {' '.join(SEARCH_SPACE)}"
    )
    parser.add_argument("--weights", default="scratch", help="scratch, pretrained or a path (default scratch)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal", type=Path, help="file that workers share and an interrupted search goes on from")
    parser.add_argument("--worker", type=int, default=0, help="number of this process")
    parser.add_argument("--out", type=Path, help="default: checkpoints/optuna_params/<Model>.json")
    harden = parser.add_argument_group("hardening")
    harden.add_argument("--start", type=Path, help="folder of the model to harden; default: train new ones")
    harden.add_argument("--recipe", choices=RECIPES, default="adversarial")
    harden.add_argument("--eps", default="2/255", help="radius, such as 2/255 (default) or 0.005")
    harden.add_argument("--train-steps", type=int, default=2, help="PGD steps a training step (default 2)")
    harden.add_argument("--clean-floor", type=float, default=0.0, help="least accuracy without attack, 0..1")
    harden.add_argument("--pareto", action="store_true", help="maximise accuracy with and without attack together")
    args = parser.parse_args(arguments)
    splits = load_splits(args.data)
    title = BACKBONES[args.backbone].title + ("_atk" if args.start else "")
    found = optuna_search(
        _start_of(args, splits),
        splits,
        num_epochs=args.num_epochs,
        n_trials=args.n_trials,
        out=args.out or CHECKPOINTS / "optuna_params" / f"{title}.json",
        space=pick_space(args.space, freezing=bool(args.start) or args.weights != "scratch"),
        objective=_recipe_of(args),
        clean_floor=args.clean_floor,
        pareto=args.pareto,
        seed=args.seed,
        journal=args.journal,
        worker=args.worker,
    )
    print(f"best {found['selected_by']} {found['value']:.1%} with {found['params']}")
    if not found["floor_reached"]:
        print(f"no trial reached a clean accuracy of {args.clean_floor:.1%}; this one came closest")
    return 0


def _start_of(args: argparse.Namespace, splits: DataSplits) -> Callable[[], MRIClassifier]:
    if args.start:
        fits = {"backbone": args.backbone, "classes": splits.classes, "fingerprint": splits.fingerprint}
        load_trainable(args.start, **fits)  # a model that does not fit is refused before the first trial
        return partial(load_trainable, args.start, **fits)
    options = {"num_classes": len(splits.classes), "image_size": args.image_size, "weights": args.weights}
    return partial(build_model, args.backbone, **options)


def _recipe_of(args: argparse.Namespace) -> Hardening | None:
    return make_objective(args.recipe, eps=parse_radius(args.eps), steps=args.train_steps) if args.start else None
