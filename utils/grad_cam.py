"""Grad-CAM heat maps (Selvaraju et al., 2017, arXiv:1610.02391) by the pytorch-grad-cam package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from models.def_models import MRIClassifier
from utils.attacks.attack import Attack
from utils.core.modes import eval_mode
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet
from utils.evaluation.attacker import predict_batch
from utils.evaluation.examples import spread_over_classes
from utils.evaluation.metrics import predict

_FINEST = 7


def grad_cam(
    model: MRIClassifier, images: torch.Tensor, targets: torch.Tensor | None = None, *, layer: nn.Module | None = None
) -> np.ndarray:
    """Where the model looks.

    Args:
        model: put in eval mode; a frozen backbone works too.
        images: float tensor N x 1 x H x W or N x 3 x H x W in [0, 1].
        targets: int64 tensor N, the classes to explain; None explains the model's own answers.
        layer: layer to read; None takes :func:`pick_layer`.

    Returns:
        float array N x H x W in [0, 1], each map scaled to its own maximum.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    wanted = None if targets is None else [ClassifierOutputTarget(int(target)) for target in targets]
    with eval_mode(model):
        try:
            layers = [layer or pick_layer(model, images)]
            with GradCAM(model=model, target_layers=layers, reshape_transform=model.cam_map) as explain:
                # a frozen backbone passes gradients back only if its input asks for them
                return explain(images.detach().clone().requires_grad_(True), targets=wanted)
        finally:
            model.zero_grad(set_to_none=True)


@torch.no_grad()
def pick_layer(model: MRIClassifier, images: torch.Tensor) -> nn.Module:
    """The deepest of the backbone's layers whose map still has ``_FINEST`` cells a side, or the shallowest.

    At a small ``image_size`` the last block of a CNN has a map of 2 x 2 cells, which shows nothing.
    """
    for layer in model.cam_layers:
        if cells_of(model, layer, images) >= _FINEST:
            return layer
    return model.cam_layers[-1]


def with_cells(name: str, model: MRIClassifier, images: ImageSet) -> str:
    """A row's name with the resolution of its maps, which are enlarged to the image."""
    first = images.pixels(slice(0, 1), next(model.parameters()).device)
    cells = cells_of(model, pick_layer(model, first), first)
    return f"{name}\n({cells} x {cells} cells)"


@torch.no_grad()
def cells_of(model: MRIClassifier, layer: nn.Module, images: torch.Tensor) -> int:
    """Cells a side of a layer's map, before it is enlarged to the image."""
    sizes: list[int] = []
    hook = layer.register_forward_hook(lambda _module, _inputs, output: sizes.append(model.cam_map(output).shape[-1]))
    predict_batch(model, images[:1])
    hook.remove()
    return sizes[0]


def right_and_wrong(
    models: Sequence[MRIClassifier], images: ImageSet, *, n: int = 5, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of ``n`` images that all models get right, spread over the classes, and of at most ``n`` that none does.

    Where fewer than ``n`` are right everywhere, others fill the first up.
    """
    right = [predict(model, images, device=device).argmax(1) == images.labels for model in models]
    never = ~torch.stack(right).any(0)
    first = spread_over_classes(images.labels, torch.stack(right).all(0), n)
    return first, spread_over_classes(images.labels, never, min(n, int(never.sum())))


def explain(
    model: MRIClassifier,
    images: ImageSet,
    index: torch.Tensor,
    *,
    name: str,
    device: torch.device | str = "cpu",
    attack: tuple[Attack, float] | None = None,
) -> tuple:
    """One row for :func:`utils.reporting.slices.plot_grad_cam`: the images at ``index``, and maps of the answers.

    Args:
        name: label of the row; :func:`with_cells` adds the resolution of the maps.
        attack: attack and radius to explain the attacked images instead.
    """
    pixels, labels = images.pixels(index, device), images.labels[index].to(device)
    if attack:
        pixels = attack[0](model, pixels, labels, eps=attack[1], draws=generator("grad-cam"))
    answers = predict_batch(model, pixels).argmax(1)
    captions = [f"{images.classes[a]} → {images.classes[b]}" for a, b in zip(labels, answers)]
    return name, pixels.cpu(), grad_cam(model, pixels), captions


def explain_rows(
    model: MRIClassifier, images: ImageSet, *, n: int = 5, device: torch.device | str = "cpu"
) -> list[tuple]:
    """Rows of ``n`` images that the model gets right and, if there are any, of those that it gets wrong."""
    right, wrong = right_and_wrong([model], images, n=n, device=device)
    rows = [explain(model, images, right, name="right", device=device)]
    return rows + ([explain(model, images, wrong, name="wrong", device=device)] if len(wrong) else [])
