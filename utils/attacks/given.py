"""What an attack is given, checked before it: a model, images, labels, and what the model answers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

#: Pixels. An image of one pixel has no neighbours, and resizing and random search fail on it in words of their own.
SMALLEST_SIDE = 2

#: From so many answers on, all of them between 0 and 1 and by ``WIDE`` apart, they look like a sigmoid's.
MANY, WIDE = 8, 0.5


def check_batch(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Check what an attack is given.

    Raises:
        TypeError: the model is no module or in half precision, images are not float32 or float64, or labels not int64.
        ValueError: not N x C x H x W, a side below ``SMALLEST_SIDE``, a value outside [0, 1] or NaN, or not N labels.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module that maps images to logits, not a {type(model).__name__}")
    if next((p.dtype for p in model.parameters()), torch.float32) in (torch.float16, torch.bfloat16):
        raise TypeError("the model is in half precision, in which gradients underflow; use model.float()")
    if not isinstance(images, torch.Tensor) or not isinstance(labels, torch.Tensor):
        found = f"{type(images).__name__} and {type(labels).__name__}"
        raise TypeError(f"images and labels must be tensors, not {found}")
    if images.dtype not in (torch.float32, torch.float64) or labels.dtype != torch.int64:
        raise TypeError(f"images must be float32 and labels int64, not {images.dtype} and {labels.dtype}")
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(f"expected N x C x H x W and N, not {tuple(images.shape)} and {tuple(labels.shape)}")
    if min(images.shape[-2:]) < SMALLEST_SIDE:
        raise ValueError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels are too small to be attacked")
    if len(images) and not (images.amin() >= 0 and images.amax() <= 1):
        raise ValueError("images must lie in [0, 1]; normalise inside the model, not before the attack")


def as_logits(answer: Any) -> torch.Tensor:
    """What a model answers, float32.

    Raises:
        TypeError: not one tensor, such as a tuple with other outputs beside the logits.
    """
    if not isinstance(answer, torch.Tensor):
        raise TypeError(f"the model must give one tensor of logits, not a {type(answer).__name__}: wrap it")
    return answer.float()


def check_logits(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Check what a model answers to images that are not meant to break it.

    Args:
        logits: N x K.
        labels: int64 tensor N.

    Raises:
        ValueError: not N x K with K of at least 2, NaN, probabilities instead of logits, or a label outside 0..K-1.

    Warns where the answers could come out of a sigmoid: between 0 and 1, without summing to one.
    """
    if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        raise ValueError(f"the model must give N x K logits with K of at least 2, not {tuple(logits.shape)}")
    if logits.isnan().any():
        raise ValueError("the model gives NaN logits, and its input gradient is NaN; its weights are damaged")
    if len(labels) and not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        raise ValueError(
            f"labels must be in 0..{logits.shape[1] - 1}, the classes of the model, "
            f"not {int(labels.min())}..{int(labels.max())}"
        )
    # percent as well as shares
    whole = 100.0 if len(logits) and logits.max() > 1 else 1.0
    if len(logits) and (logits >= 0).all() and ((logits.sum(1) - whole).abs() < 1e-3 * whole).all():
        raise ValueError(
            "the model gives probabilities, whose gradient vanishes where it is sure: an attack on them overstates "
            "robustness. Take the softmax off the end of the model; a logarithm of probabilities is fine."
        )
    if len(logits) >= MANY and logits.min() >= 0 and logits.max() <= 1 and logits.max() - logits.min() > WIDE:
        warnings.warn(
            "all answers of the model lie between 0 and 1: if they come out of a sigmoid, its gradient vanishes where "
            "it is sure, and an attack overstates robustness. Take the sigmoid off the end of the model.",
            stacklevel=3,
        )
