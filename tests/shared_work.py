"""What tests/integration/test_processes.py starts in one process and in two: ``shared_work.py DATA OUT``.

Writes histories and weights of small trainings, and how far the gradient of a ResNet34 that processes share is from
that of one process. The trained model is small because a deep one with fresh BatchNorm turns the rounding of sums in
another order into another training within a few steps; in float64 the ResNet34 shows that nothing but rounding differs.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.def_models import BACKBONES, Backbone, MRIClassifier, build_model
from utils.core.processes import is_main, join_others, rank, shared_batchnorm, world_size
from utils.data.sets import DataSplits, load_splits
from utils.training.config import TrainConfig
from utils.training.loop import train
from utils.training.objectives import Adversarial, Mart, Standard

RUNS: dict[str, tuple[Standard, dict[str, Any]]] = {
    "clean": (Standard(), {}),
    "mixed": (Standard(), {"mixup": 0.4, "ema_decay": 0.9}),
    "adversarial": (Adversarial(eps=4 / 255, steps=2), {"awp": 0.05}),
    "in parts": (Adversarial(eps=4 / 255, steps=1), {"accumulation_steps": 2}),
    "mart": (Mart(eps=4 / 255, steps=1), {"label_smoothing": 0.1, "sampling": "patient"}),
}


def build_small(num_classes: int, image_size: int) -> nn.Module:
    # no bias before BatchNorm: its gradient is nothing but rounding, which Adam would scale up
    convolutions = [nn.Conv2d(3, 8, 3, 2, bias=False), nn.Conv2d(8, 16, 3, 2, bias=False)]
    body = nn.Sequential(convolutions[0], nn.BatchNorm2d(8), nn.ReLU(), convolutions[1], nn.BatchNorm2d(16), nn.ReLU())
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net.add_module("out", nn.Linear(64, num_classes))
    return net


def small_trainings(splits: DataSplits) -> dict[str, Any]:
    BACKBONES["tiny"] = Backbone("Tiny", build_small, "out", lambda net: [net[0]], lambda net: [net[0]], dict)
    found = {}
    for name, (objective, settings) in RUNS.items():
        torch.manual_seed(0)
        model = build_model("tiny", image_size=32)
        # of 64 images the last of the batches of 11 has 9: 5 for the first process and 4 for the second
        config = TrainConfig(num_epochs=3, batch_size=11, learning_rate=3e-3, validation_images=16, **settings)
        history = train(model, splits, objective=objective, config=config).history
        found[name] = {"history": history, "weights": model.state_dict()}
    return found


def gradient_error(model: MRIClassifier) -> float:
    """Largest error of a gradient shared by DistributedDataParallel, relative to the one of a single process."""
    alone, images, labels = copy.deepcopy(model), torch.rand(10, 1, 32, 32).double(), torch.randint(4, (10,))
    F.cross_entropy(alone(images), labels).backward()
    shared = nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model
    mine = slice(rank(), None, world_size())
    with shared_batchnorm(model):
        F.cross_entropy(shared(images[mine]), labels[mine]).backward()
    pairs = zip(model.parameters(), alone.parameters())
    errors = [(own.grad - one.grad).abs().max() / one.grad.abs().max() for own, one in pairs]
    statistics = zip(model.buffers(), alone.buffers())
    errors += [(own - one).abs().max().double() for own, one in statistics]
    return max(errors).item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_others()
    torch.manual_seed(0)
    found = {"gradient_error": gradient_error(build_model("resnet34", image_size=32).train().double())}
    found |= {"runs": small_trainings(load_splits(sys.argv[1])), "processes": world_size()}
    if is_main():
        torch.save(found, Path(sys.argv[2]))
