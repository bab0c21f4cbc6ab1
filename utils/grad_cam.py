"""Grad-CAM heat maps (Selvaraju et al., 2017, arXiv:1610.02391) by the pytorch-grad-cam package."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from models.def_models import MRIClassifier


def grad_cam(
    model: MRIClassifier, images: torch.Tensor, targets: torch.Tensor | None = None, *, layer: nn.Module | None = None
) -> np.ndarray:
    """Where the model looks.

    Args:
        model: put in eval mode; a frozen backbone works too.
        images: float tensor N x 1 x H x W or N x 3 x H x W in [0, 1].
        targets: int64 tensor N, the classes to explain; None explains the model's own answers.
        layer: convolutional layer to read; None takes the backbone's own choice.

    Returns:
        float array N x H x W in [0, 1], each map scaled to its own maximum.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    was_training = model.training
    model.eval()
    wanted = None if targets is None else [ClassifierOutputTarget(int(target)) for target in targets]
    try:
        with GradCAM(model=model, target_layers=[layer or model.cam_layer]) as explain:
            # a frozen backbone passes gradients back only if its input asks for them
            return explain(images.detach().clone().requires_grad_(True), targets=wanted)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
