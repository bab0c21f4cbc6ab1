"""Train or harden one model, in one process or in many."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.def_models import BACKBONES
from utils.commands.boundary import command
from utils.core.paths import DATASET_VARIABLES
from utils.experiments.fit import fit
from utils.training.config import parse_assignment, parse_trainable
from utils.training.objectives import RECIPES


@command
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = vars(_parse(arguments))
    settings = dict(parse_assignment(text) for text in args.pop("set"))
    record = fit(**args, settings=settings)
    if record:
        print(f"test accuracy {record['test']['image']['accuracy']:.1%}, {record['training']['seconds'] / 60:.1f} min")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m utils train", description="Train or harden one model")
    add = parser.add_argument
    add("--backbone", choices=sorted(BACKBONES), required=True)
    add("--data", type=Path, default=DATASET_VARIABLES, help="folder of prepared *_set.pt")
    add("--out", dest="folder", type=Path, help="default: the model's folder in checkpoints/")
    add("--image-size", type=int, default=224)
    add("--weights", default="scratch", help="scratch, pretrained or a path (default scratch)")
    trainable = {"type": parse_trainable, "default": "all", "metavar": "all|head|N"}
    add("--trainable", help="what is trained; N: the last N blocks", **trainable)
    add("--start", type=Path, help="folder of the model to harden; default: train a new one")
    add("--recipe", choices=RECIPES, default="adversarial")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="num_epochs=20, eps=2/255, ...")
    add("--overwrite", action="store_true", help="replace a finished model")
    return parser.parse_args(arguments)
