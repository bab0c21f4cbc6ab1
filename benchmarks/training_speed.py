"""Seconds of an epoch of clean, adversarial and single-step training, beside the least that it can take.

    python -m benchmarks.training_speed

The floor of K steps is K times (forward and gradient of the image) and one full training step, in bare loops over the
same batches; what is above it is the training loop's own: order, augmentation, optimiser, counting.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import FOLDER, bars, gpu_use, progress, save, take_turns, timed
from models.def_models import BACKBONES, MRIClassifier, build_model
from utils.attacks.gradient import ascent, cross_entropy
from utils.core.modes import attack_mode
from utils.core.precision import PRECISIONS, autocast
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject, splits_in_memory
from utils.data.sets import DataSplits
from utils.data.workspace import pick_device
from utils.training.config import TrainConfig
from utils.training.loop import train
from utils.training.objectives import Adversarial, NFgsm, Standard
from utils.training.optimization import make_optimizer

EPS = 2 / 255
STEPS = (1, 2, 3, 7)


def recipes() -> dict[str, tuple[Standard, int]]:
    """Name -> objective at full strength from the start, and its attack steps."""
    adversarial = {
        f"AT, {steps} step{'s' * (steps > 1)}": (Adversarial(eps=EPS, steps=steps, adv_weight=1.0, ramp=0), steps)
        for steps in STEPS
    }
    return {"clean": (Standard(), 0), "N-FGSM": (NFgsm(eps=EPS, ramp=0), 1), **adversarial}


def floor(model: MRIClassifier, images: torch.Tensor, labels: torch.Tensor, config: TrainConfig, steps: int) -> float:
    """Seconds of nothing but the passes of one epoch of adversarial training."""
    optimizer = make_optimizer(model, config)
    return timed(partial(_passes, model, optimizer, images, labels, config, steps))[0]


def _passes(
    model: MRIClassifier,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: TrainConfig,
    steps: int,
) -> None:
    batches = list(zip(images.split(config.batch_size), labels.split(config.batch_size)))
    model.train()
    for pixels, right in batches:
        with autocast(config.precision, pixels.device):
            with attack_mode(model):
                for _ in range(steps):
                    ascent(model, pixels, right, cross_entropy)
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), right).backward()
        optimizer.step()


def epoch(model: MRIClassifier, splits: DataSplits, objective: Standard, config: TrainConfig) -> float:
    """Seconds of one epoch by the training loop's own clock, which leaves validation out."""
    return train(model, splits, objective=objective, config=config).seconds


def measure_backbone(backbone: str, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of an epoch of each recipe and of its floor."""
    n = args.images // args.batch_size * args.batch_size
    splits = _images(n)
    sizes = {"num_epochs": 1, "batch_size": args.batch_size, "validation_images": 1, "precision": args.precision}
    config = TrainConfig(**sizes)
    device = pick_device()
    model = build_model(backbone, num_classes=len(splits.classes), image_size=args.image_size).to(device)
    pixels, labels = splits.train.pixels(slice(None), device), splits.train.labels.to(device)
    contenders: dict[str, Callable[[], Any]] = {}
    for name, (objective, steps) in recipes().items():
        contenders[name] = partial(epoch, model, splits, objective, config)
        contenders[f"{name}, floor"] = partial(floor, model, pixels, labels, config, steps)
    found = take_turns(contenders, args.repeats)
    seconds = {name: median(own.results) for name, own in found.items()}
    return {
        "seconds": seconds,
        "times_clean": {name: seconds[name] / seconds["clean"] for name in recipes()},
        "times_floor": {name: seconds[name] / seconds[f"{name}, floor"] for name in recipes()},
        "peak_mib": {name: found[name].peak_mib for name in recipes()},
        "gpu_percent": {name: gpu_use(contenders[name]) for name in recipes()},
        "train_images": n,
        "image_size": model.image_size,
    }


def _images(n: int) -> DataSplits:
    """``n`` training images, and as few others as possible."""
    phantoms = make_phantoms(PhantomConfig(n_subjects=40, n_levels=-(-n // 20)))
    splits = splits_in_memory(phantoms, group_by_subject(phantoms), "patient")
    few = torch.arange(2)
    return DataSplits(splits.train.subset(torch.arange(n)), splits.validation.subset(few), splits.test.subset(few))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    found = {name: measure_backbone(name, args) for name in progress(args.backbones, "training speed")}
    groups = {BACKBONES[name].title: own["times_clean"] for name, own in found.items()}
    threads = f"{torch.get_num_threads()} threads, {args.precision}"
    note = f"batches of {args.batch_size}, {args.image_size} px, {threads}; without validation"
    figure = bars({"": groups}, ylabel="times an epoch of clean training", title="What hardening costs", note=note)
    content = {"eps": EPS, "batch_size": args.batch_size, "precision": args.precision, "backbones": found}
    save(args.name, content, figure, args.out)
    for name, own in found.items():
        print(name, {recipe: f"{ratio:.2f} x floor" for recipe, ratio in own["times_floor"].items()})
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_speed", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backbones", nargs="+", choices=sorted(BACKBONES), default=sorted(BACKBONES))
    add("--image-size", type=int, default=64)
    add("--images", type=int, default=256, help="training images an epoch (default 256)")
    add("--batch-size", type=int, default=64)
    add("--precision", choices=PRECISIONS, default="fp32")
    add("--repeats", type=int, default=3)
    add("--name", default="training_speed", help="of the files")
    add("--out", type=Path, default=FOLDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
