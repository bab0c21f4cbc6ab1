"""Forward and backward pass of DINOv2 with torch's fused attention, and with attention as two matrix products.

    python -m benchmarks.attention_speed

Why :mod:`models.def_models` leaves the fused one out in bfloat16 on a CPU, and only there.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import FOLDER, bars, progress, save, take_turns
from models.def_models import MRIClassifier, build_model
from utils.core.precision import autocast
from utils.data.workspace import pick_device

WAYS = {"fused": True, "products": False}
ROUNDED = ("fp32", "bf16")


def measure_size(image_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of a pass in each precision, by each way, and how far the ways' gradients agree."""
    torch.manual_seed(0)
    device = pick_device()
    images = torch.rand(args.batch_size, 1, 128, 128, device=device)
    labels = torch.arange(args.batch_size, device=device) % 4
    model = build_model("dino_v2", image_size=image_size).to(device).eval()
    for block in model.backbone.blocks:
        block.attn._forward_pre_hooks.clear()  # they hold the model's own choice
    contenders = {
        f"{precision}, {way}": partial(gradient, model, images, labels, precision, fused)
        for precision in ROUNDED
        for way, fused in WAYS.items()
    }
    found = take_turns(contenders, args.repeats)
    last = {name: own.results[-1].flatten() for name, own in found.items()}
    return {
        "seconds": {name: own.median for name, own in found.items()},
        "peak_mib": {name: own.peak_mib for name, own in found.items()},
        "times_fused": {p: found[f"{p}, fused"].median / found[f"{p}, products"].median for p in ROUNDED},
        "cosine": {p: F.cosine_similarity(last[f"{p}, fused"], last[f"{p}, products"], dim=0).item() for p in ROUNDED},
        "image_size": model.image_size,
    }


def gradient(
    model: MRIClassifier, images: torch.Tensor, labels: torch.Tensor, precision: str, fused: bool
) -> torch.Tensor:
    """The images' gradient, and with it all weights' gradients, as in a step of adversarial training."""
    for block in model.backbone.blocks:
        block.attn.fused_attn = fused
    moved = images.clone().requires_grad_()
    with autocast(precision, images.device):
        F.cross_entropy(model(moved), labels).backward()
    model.zero_grad()  # each turn takes its own memory
    return moved.grad


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    found = [measure_size(size, args) for size in progress(args.image_sizes, "attention")]
    groups = {f"{own['image_size']} px": own["seconds"] for own in found}
    note = f"batches of {args.batch_size}, {torch.get_num_threads()} threads"
    figure = bars({"": groups}, ylabel="s", title="A pass of DINOv2 forward and back", note=note)
    save(args.name, {"batch_size": args.batch_size, "sizes": found}, figure, args.out)
    for own in found:
        print(f"{own['image_size']} px, times faster by products:", own["times_fused"])
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_speed", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--image-sizes", type=int, nargs="+", default=[70, 112, 224])
    add("--batch-size", type=int, default=16)
    add("--repeats", type=int, default=5)
    add("--name", default="attention_speed", help="of the files")
    add("--out", type=Path, default=FOLDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
