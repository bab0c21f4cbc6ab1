"""White-box, untargeted L-infinity attacks on models that take images in [0, 1].

Only the gradient of the input is computed: parameters are frozen while an attack runs, which
leaves their ``.grad`` alone and saves a third of the work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy a sample. Shapes N x K and N to N."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Best wrong logit minus the right one (Carlini and Wagner, 2017, f6). Positive when fooled.

    Unlike cross-entropy its gradient does not vanish where the model is very sure.
    """
    right = logits.gather(1, labels[:, None]).squeeze(1)
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return wrong - right


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin}


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and frozen parameters inside; each module's own state again afterwards, always."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        yield model
    finally:
        # set directly: train(mode) would also change children and may be overridden
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def default_alpha(eps: float, steps: int) -> float:
    """Step size 2.5 * eps / steps (Madry et al., 2018): the ball's edge is reached, then searched."""
    return 2.5 * eps / steps


def check_eps(eps: float) -> float:
    """``eps`` if it is a radius in [0, 1].

    Raises:
        ValueError: negative, NaN, or above 1 (pixels are in [0, 1]: write 8/255, not 8).
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"eps must be in [0, 1] pixel units, not {eps}; for k grey levels write k/255")
    return float(eps)


def check_batch(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Check what an attack is given.

    Raises:
        TypeError: images are not float32 or float64, labels not int64, or the model is in half precision.
        ValueError: not N x C x H x W, a value outside [0, 1] or NaN, or not N labels.
    """
    if next((p.dtype for p in model.parameters()), torch.float32) in (torch.float16, torch.bfloat16):
        raise TypeError("the model is in half precision, in which gradients underflow; use model.float()")
    if images.dtype not in (torch.float32, torch.float64) or labels.dtype != torch.int64:
        raise TypeError(f"images must be float32 and labels int64, not {images.dtype} and {labels.dtype}")
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(f"expected N x C x H x W and N, not {tuple(images.shape)} and {tuple(labels.shape)}")
    if len(images) and not (images.amin() >= 0 and images.amax() <= 1):
        raise ValueError("images must lie in [0, 1]; normalise inside the model, not before the attack")


def input_gradient(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Gradient of the summed loss with respect to the images, in their own dtype."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().clone().requires_grad_(True)
        value = loss(model(leaf).float(), labels).sum()
        return torch.autograd.grad(value, leaf)[0]


def _check_gradient(gradient: torch.Tensor) -> None:
    """A NaN gradient would leave the image where it is and pass for robustness."""
    if not gradient.isfinite().all():
        raise ValueError("the model's input gradient is NaN or infinite; its weights or logits are damaged")


def fgsm(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    loss: str = "ce",
) -> torch.Tensor:
    """Fast Gradient Sign Method (Goodfellow et al., 2015, arXiv:1412.6572). Norm: L-infinity.

    Args:
        model: maps images to logits, normalisation inside.
        images: float tensor N x C x H x W in [0, 1].
        labels: int64 tensor N, the true classes.
        eps: radius in [0, 1].
        loss: ``ce`` or ``margin``.

    Returns:
        adversarial images of the same shape, in [0, 1] and within ``eps``.

    Raises:
        TypeError, ValueError: see :func:`check_batch` and :func:`check_eps`; also a NaN gradient.
    """
    check_eps(eps)
    check_batch(model, images, labels)
    with attack_mode(model):
        gradient = input_gradient(model, images, labels, LOSSES[loss])
    _check_gradient(gradient)
    return (images + eps * gradient.sign()).clamp(0, 1).detach()


def pgd(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    alpha: float | None = None,
    steps: int = 10,
    restarts: int = 1,
    random_start: bool = True,
    loss: str = "ce",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Projected Gradient Descent (Madry et al., 2018, arXiv:1706.06083). Norm: L-infinity.

    Args:
        model: maps images to logits, normalisation inside.
        images: float tensor N x C x H x W in [0, 1].
        labels: int64 tensor N, the true classes.
        eps: radius in [0, 1].
        alpha: step size in [0, 1]; None takes :func:`default_alpha`. A size that cannot reach the
            edge of the ball (alpha * steps < eps) warns: it measures the step size, not the model.
        steps: number of gradient steps, at least 1.
        restarts: number of independent starts, at least 1. Of several, each sample keeps the one
            that fools the model, or else the one with the highest loss.
        random_start: start uniformly in the ball; otherwise at the image.
        loss: ``ce`` or ``margin``.
        generator: CPU generator that makes random starts reproducible.

    Returns:
        adversarial images of the same shape, in [0, 1] and within ``eps``.

    Raises:
        TypeError, ValueError: see :func:`check_batch` and :func:`check_eps`; also steps or
            restarts below 1, a step size outside (0, 1], or a NaN gradient.
    """
    check_eps(eps)
    check_batch(model, images, labels)
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    if alpha is None:
        alpha = default_alpha(eps, steps)
    elif not (0 < alpha <= 1 or eps == 0):
        raise ValueError(f"alpha must be in (0, 1] pixel units, not {alpha}")
    warn_if_short(eps, alpha, steps)
    images = images.detach()
    best, best_score = images.clone(), None
    with attack_mode(model):
        for _ in range(restarts):
            start = _random_point(images, eps, generator) if random_start else images.clone()
            adversarial = _ascend(model, images, labels, start, eps, alpha, steps, LOSSES[loss])
            if restarts == 1:
                return adversarial
            score = _score(model, adversarial, labels, LOSSES[loss])
            better = torch.ones_like(labels, dtype=torch.bool) if best_score is None else score > best_score
            best[better] = adversarial[better]
            best_score = score if best_score is None else torch.maximum(score, best_score)
    return best


def warn_if_short(eps: float, alpha: float, steps: int) -> None:
    """Warn if ``steps`` steps of ``alpha`` cannot cross the ball of radius ``eps``."""
    if alpha * steps < eps * (1 - 1e-6):
        warnings.warn(
            f"alpha * steps = {alpha * steps:.2g} is less than eps = {eps:.2g}: the attack cannot reach "
            "the edge of the ball and will overstate robustness. Use alpha >= 2.5 * eps / steps.",
            stacklevel=3,
        )


def _random_point(images: torch.Tensor, eps: float, generator: torch.Generator | None) -> torch.Tensor:
    noise = torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    return (images + eps * (2 * noise - 1)).clamp(0, 1)


def _ascend(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    adversarial: torch.Tensor,
    eps: float,
    alpha: float,
    steps: int,
    loss: Loss,
) -> torch.Tensor:
    for step in range(steps):
        gradient = input_gradient(model, adversarial, labels, loss)
        if step == 0:
            _check_gradient(gradient)
        shift = (adversarial + alpha * gradient.sign() - images).clamp(-eps, eps)
        adversarial = (images + shift).clamp(0, 1)
    return adversarial.detach()


@torch.no_grad()
def _score(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, loss: Loss) -> torch.Tensor:
    """The loss, raised beyond any finite loss where the model is fooled."""
    logits = model(images).float()
    return loss(logits, labels).nan_to_num(posinf=1e30) + 1e6 * (logits.argmax(1) != labels)
