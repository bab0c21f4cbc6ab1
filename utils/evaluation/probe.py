"""The last layer fitted by logistic regression to what a frozen network sees: a baseline and a start for training."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from models.def_models import MRIClassifier
from utils.data.sets import ImageSet
from utils.evaluation.metrics import predict

#: C of scikit-learn's logistic regression, which suits hundreds of features of a few thousand slices.
STRENGTH = 1e-3
#: Log-odds of a class that no image has.
_NEVER = -10.0


def fit_head(
    model: MRIClassifier,
    images: ImageSet,
    *,
    strength: float = STRENGTH,
    device: torch.device | str = "cpu",
) -> MRIClassifier:
    """Set the last layer to the logistic regression on its inputs, classes weighted alike; nothing else changes.

    Fine-tuning that starts with a random last layer first bends the published features to fit it; one that starts
    with a fitted layer keeps them (Kumar et al., 2022, arXiv:2202.10054, "LP-FT").

    Args:
        model: on ``device``; its other layers are read in eval mode and stay as they are.
        images: to learn from.
        strength: inverse of the L2 penalty on standardised features.

    Returns:
        ``model``.

    Raises:
        ValueError: the head has no linear layer, or all images are of one class.
    """
    if len(images.labels.unique()) < 2:
        raise ValueError("a last layer cannot be fitted to images of one class")
    layer = last_linear(model)
    weight, bias = _regression(_inputs_of(layer, model, images, device), images.labels.numpy(), strength)
    present = images.labels.unique()
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[present] = torch.from_numpy(weight).to(layer.weight)
        layer.bias.fill_(_NEVER)
        layer.bias[present] = torch.from_numpy(bias).to(layer.bias)
    return model


def last_linear(model: MRIClassifier) -> nn.Linear:
    """The layer that gives the logits.

    Raises:
        ValueError: the head has no linear layer.
    """
    head = model.backbone.get_submodule(model.head_name)
    found = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError(f"the head of {model.backbone_name} has no linear layer to fit")
    return found[-1]


def _inputs_of(layer: nn.Module, model: MRIClassifier, images: ImageSet, device: torch.device | str) -> np.ndarray:
    """What reaches ``layer``, N x F."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().float().cpu()))
    try:
        predict(model, images, device=device)
    finally:
        handle.remove()
    return torch.cat(seen).numpy()


def _regression(features: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weight (classes present x F) and bias of a logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    found = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
    found.fit(scaler.transform(features), labels)
    weight, bias = found.coef_, found.intercept_
    if len(weight) == 1:  # of two classes, only the second one's
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    return weight, bias - weight @ scaler.mean_
